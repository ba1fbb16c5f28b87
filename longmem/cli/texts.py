"""What commands read and write: text files, and documents as lines of JSON."""

import codecs
import dataclasses
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from longmem.errors import did_you_mean

if TYPE_CHECKING:
    from longmem.memory import DocumentInfo, MemoryBank

STDIN = Path("-")
# Endings of files that are no text as they stand, or hardly; a library turns them into Markdown.
# Each with the class of markitdown that reads this kind and no other: the library as a whole takes what is not of the kind
# that its name says for a text in some encoding, or for an archive, and so makes texts of raw bytes.
DOCUMENTS = {
    f".{kind}": f"{kind.title()}Converter" for kind in ("pdf", "docx", "pptx", "xlsx", "epub", "ipynb", "html")
}
DOCUMENTS[".htm"] = DOCUMENTS[".html"]
SAID = ("dated", "valid_until", "is_superseded", "superseded_by")  # of a document, in an export
EXPORTED = ("document_id", "tags", "is_pinned", *SAID, "num_tokens", "first_resident_token")


@dataclasses.dataclass(frozen=True)
class Text:
    """A text to memorize, and what to call it."""

    name: str
    text: str
    tags: tuple[str, ...] = ()
    is_pinned: bool = False
    dated: float | None = None
    valid_until: float | None = None
    is_superseded: bool = False
    superseded_by: str | None = None


def read_text(path: Path, encoding: str | None = None) -> str:
    """Return the text of a file, of standard input for `-`, of a document (.pdf, .docx, ...) as Markdown.

    Args:
        path: what to read.
        encoding: of the characters; with it a document is read as it stands. None: UTF-8, with or without a mark.

    Raises ValueError if it is not in that encoding or blank, ImportError if what reads documents is not installed, OSError if
    it cannot be read.
    """
    if encoding is None and path.suffix.lower() in DOCUMENTS:
        text = _read_document(path)
    else:
        if path != STDIN and not path.exists():
            near = did_you_mean(path.name, sorted(os.listdir(path.parent))) if path.parent.is_dir() else ""
            leads = f", to which the link {path} leads; mend the link." if path.is_symlink() else f".{near}"
            raise FileNotFoundError(f"there is no file {path.resolve() if path.is_symlink() else path}{leads}")
        raw = sys.stdin.buffer.read() if path == STDIN else path.read_bytes()
        try:
            text = raw.decode("utf-8-sig" if encoding is None else encoding)
        except LookupError as error:
            raise ValueError(
                f'`--encoding` must be one that Python knows, such as "latin-1", got {encoding!r}.'
            ) from error
        except UnicodeError as error:
            raise ValueError(
                f"{path} is not a {encoding or 'UTF-8'} text file ({error}); name its `--encoding`, or "
                "convert it to UTF-8 text first."
            ) from error
        if "\0" in text:
            raise ValueError(f"{path} is not a text file, it holds zero bytes; name its `--encoding` if it is UTF-16.")
    if not text or text.isspace():
        raise ValueError(f"{path} holds no text.")
    return text


def _read_document(path: Path) -> str:
    """Return the text of a document as Markdown, empty lines in it being single."""
    kind, text = path.suffix.lower(), ""
    missing = (
        f"{path}: what reads {path.suffix} is not installed; `pip install 'longmem-lm[files]'`, or `--encoding utf-8` to "
        "take a file of text as it stands."
    )
    try:
        from markitdown import MissingDependencyException, StreamInfo, converters
    except ImportError as error:
        raise ImportError(missing) from error
    with path.open("rb") as file:
        try:
            if path.stat().st_size:
                text = str(getattr(converters, DOCUMENTS[kind])().convert(file, StreamInfo(extension=kind)).markdown)
        except MissingDependencyException as error:
            raise ImportError(missing) from error
        except Exception as error:  # whatever a broken document makes of the library below
            raise ValueError(
                f"{path} can't be read as {kind}: {type(error).__name__}: {' '.join(str(error).split())}; `--encoding` takes a "
                "text as it stands."
            ) from error
    if "\0" in text:
        raise ValueError(f"{path} can't be read as {kind}, for it is none; `--encoding` takes a text as it stands.")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.splitlines()))


def find_files(given: Iterable[Path], pattern: str | None = None) -> tuple[list[tuple[Path, str]], list[Path]]:
    """Return (path, name) of each file, those in folders included, and the files in folders that hold no text.

    A file that is named bears its own name, one in a folder its path from there; where two would be called the same, each
    bears its path as it was given. Hidden files of a folder, and those of a bank, are left out, and without a pattern those
    that are no text.

    Args:
        given: files and folders.
        pattern: of the files in folders, such as "*.md"; None: all that hold text.

    Raises ValueError if a folder holds no such file, or there is a pattern and no folder.
    """
    found: list[tuple[Path, str]] = []
    passed_over: list[Path] = []
    given = list(given)
    if given.count(STDIN) > 1:
        raise ValueError(
            f"standard input, `-`, must be named once, got it {given.count(STDIN)} times; leave out the others."
        )
    if pattern is not None and not any(path.is_dir() for path in given):
        raise ValueError(f"`--glob` must come with a folder, got {pattern!r} for files alone; leave it out.")
    for path in given:
        if not path.is_dir():
            found.append((path, "stdin" if path == STDIN else path.name))
            continue
        try:
            matching = sorted(each for each in path.rglob("*" if pattern is None else pattern) if each.is_file())
        except (ValueError, NotImplementedError) as error:  # of an empty pattern, or one that begins at the root
            raise ValueError(f'`--glob` must be a pattern such as "*.md", got {pattern!r}: {error}.') from error
        seen = [each for each in matching if not any(part[0] == "." for part in each.relative_to(path).parts)]
        inside = [each for each in seen if not in_bank(each, path)]
        texts = [each for each in inside if pattern is not None or looks_like_text(each)]
        passed_over += [each for each in inside if each not in set(texts)]
        if not texts:
            raise ValueError(
                f"{path} must hold text files{'' if pattern is None else f' that match {pattern!r}'}, got none."
            )
        found += [(each, each.relative_to(path).as_posix()) for each in texts]
    paths: dict[str, set[Path]] = {}
    for path, name in found:
        paths.setdefault(name, set()).add(path)
    known = [(path, path.as_posix() if len(paths[name]) > 1 else name) for path, name in found]
    return [(path, readable_name(name)) for path, name in known], passed_over


def in_bank(path: Path, top: Path) -> bool:
    """Return whether a file in the folder `top` belongs to a bank, such as the one that it would be memorized in."""
    from longmem.memory import has_bank

    return any(has_bank(each) for each in path.parents if each.is_relative_to(top))


def looks_like_text(path: Path) -> bool:
    """Return whether a file is a document that can be read, or begins with UTF-8 text."""
    if path.suffix.lower() in DOCUMENTS:
        return True
    with path.open("rb") as file:
        start = file.read(4096)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)  # a character may go on behind the end
    except UnicodeDecodeError:
        return False
    return bool(start.strip()) and b"\0" not in start


def readable_name(name: str) -> str:
    r"""Return the name of a file whose bytes the system could not read as characters, with these bytes written out.

    >>> readable_name("caf\udce9.txt")
    'caf\\xe9.txt'
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def read_texts(
    files: Iterable[Path | tuple[Path, str]], name: str | None = None, encoding: str | None = None
) -> list[Text]:
    """Return the texts of files, each called as its file or as is said with it; those of an export (`export_line`) one by one.

    `name` is for a single one; `encoding` as for `read_text`. Raises ValueError for a file without text or not in its encoding,
    or a name that is given twice.
    """
    named = ((each, each.name) if isinstance(each, Path) else each for each in files)
    texts = [text for path, known in named for text in _texts_of(path, known, encoding)]
    if name is not None:
        if len(texts) > 1:
            raise ValueError(f"`--id` names one document, got {len(texts)}; leave it out, or memorize them one by one.")
        texts = [dataclasses.replace(text, name=name) for text in texts]
    names = [text.name for text in texts]
    if twice := sorted({each for each in names if names.count(each) > 1}):
        raise ValueError(
            f"documents must have different names, got {twice[0]} twice; memorize them one by one with `--id`."
        )
    return texts


def export_line(bank: "MemoryBank", info: "DocumentInfo") -> str:
    """Return a document as one line of JSON, for `datasets.load_dataset("json")` and `read_texts`.

    Token ids and text are those from `first_resident_token` on; None where the bank does not know them.
    """
    token_ids = bank.token_ids(info.document_id)
    document = {name: getattr(info, name) for name in EXPORTED}
    ids = None if token_ids is None else token_ids.tolist()
    return json.dumps({**document, "token_ids": ids, "text": bank.text(info.document_id)}) + "\n"


def _texts_of(path: Path, name: str, encoding: str | None) -> list[Text]:
    text = read_text(path, encoding)
    end = text.find("\n")
    if not is_export(path, text[:end] if end >= 0 else text):
        return [Text(name, text)]
    documents = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        try:
            read = json.loads(line)
            said = {name: read[name] for name in SAID if name in read}  # earlier versions wrote no dates
            documents.append(Text(read["document_id"], read["text"], tuple(read["tags"]), read["is_pinned"], **said))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}, is not a document that `longmem bank export` wrote.") from error
        if not documents[-1].text:
            raise ValueError(f"{path}: the text of {documents[-1].name!r} is not known; take its line out.")
    return documents


def is_export(path: Path, first: str) -> bool:
    """Return whether a file, whatever it is called, is one that `longmem bank export` wrote, by its first line."""
    if '"first_resident_token"' not in first:
        return False
    try:
        return path.suffix == ".jsonl" or "document_id" in json.loads(first)
    except (ValueError, TypeError):
        return False
