"""Where texts come from: files, folders, saved datasets and Hugging Face's Hub, all as a series of documents."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from longmem.data.sample_texts import python_manual, standard_library_docstrings
from longmem.errors import did_you_mean

PYTHON_MANUAL = "python-manual"
TEXT_FILES = (".txt", ".jsonl")
SAVED_DATASET_FILES = ("dataset_dict.json", "state.json")  # one of the two is what `save_to_disk` writes


class Document(NamedTuple):
    """One text, which may be empty, and what its source calls it."""

    document_id: str
    text: str


class Source(NamedTuple):
    """A series of documents that has not been read yet.

    `identity` says in values that JSON can write what the documents are made of; while it stays the same, so do they.
    """

    name: str
    identity: Any
    documents: Callable[[], Iterable[Document]]


def find_source(source: str | Path, *, text_column: str, split: str, is_bounded: bool) -> Source:
    """Return the source that `load_corpus` describes under `source`; files are hashed, but no document is read.

    `is_bounded`: whether the caller stops after so many documents or tokens; the other arguments are those of `load_corpus`.
    Raises ValueError if there is nothing to read under this name, or an option does not apply to it.
    """
    if not str(source).strip():
        raise ValueError(f"`source` must name a file, a folder, a dataset or {PYTHON_MANUAL!r}, got {source!r}.")
    if source == PYTHON_MANUAL:
        _refuse_options(source, text_column=text_column, split=split)
        text = python_manual()  # another Python, another manual
        return Source(source, hashlib.sha256(text.encode()).hexdigest(), lambda: [Document(PYTHON_MANUAL, text)])
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder_source(path, text_column, split)
    if path.is_file():
        if path.suffix == ".json":
            files = files_of_split(path, split)
            for file in files:
                if file.suffix != files[0].suffix or file.suffix not in TEXT_FILES or not file.is_file():
                    raise ValueError(
                        f"{path} must list files that are there, all .txt or all .jsonl, got {str(file)!r}."
                    )
            return _files_source(path.parent, files, text_column, "train")
        if path.suffix not in TEXT_FILES:
            raise ValueError(
                f"`source` must be a .txt or .jsonl file (or a .json list of such) when it is a file, got {str(path)!r}; for "
                "other formats name the folder that holds the file."
            )
        return _files_source(path.parent, [path], text_column, split)
    name, _, configuration = str(source).partition(":")
    if Path(name).expanduser().is_dir():
        return _loadable_source(Path(name).expanduser(), configuration, text_column, split)
    if isinstance(source, Path) or path.suffix in (*TEXT_FILES, ".json") or source.startswith((".", "/", "~")):
        raise ValueError(f"`source` must exist, got {str(source)!r}, which is neither a file nor a folder.")
    if not is_bounded:
        raise ValueError(
            f"`source` {name!r} is neither a file nor a folder, so it is the name of a dataset on Hugging Face's Hub, "
            "which is streamed and may be very long; give `num_documents` or `max_tokens` to say how much to read."
        )
    return _loadable_source(name, configuration or None, text_column, split)


def unrelated_text(source: str | Path) -> tuple[str, str]:
    """Return the name and text of what is not this source: Python's manual or, for that, its library's docstrings."""
    if source == PYTHON_MANUAL:
        return "docstrings of Python's library", standard_library_docstrings(len(python_manual()))
    return "Python's manual", python_manual()


def files_of_split(manifest: str | Path, split: str) -> list[Path]:
    """Return the files of a split, from a JSON list of objects with `file` (beside the manifest) and `split`.

    Raises ValueError if the manifest is no such list, or has no such split.
    """
    entries = json.loads(Path(manifest).read_text(encoding="utf-8"))
    if not isinstance(entries, list) or not all({"file", "split"} <= set(entry) for entry in entries):
        raise ValueError(f"{manifest} must be a JSON list of objects that have `file` and `split`.")
    files = [Path(manifest).parent / entry["file"] for entry in entries if entry["split"] == split]
    if not files:
        known = sorted({entry["split"] for entry in entries})
        raise ValueError(f"`split` must be one of {known}, those of {manifest}, got {split!r}.")
    return files


def _folder_source(folder: Path, text_column: str, split: str) -> Source:
    if _is_saved(folder):
        saved, folder = _saved_split(folder, split)
        dataset, title = saved.with_format(None), f"the dataset {str(folder)!r}"
        files = [path for path in _files_in(folder) if not path.name.startswith("cache-")]  # what `map` leaves there
        identity = [text_column, _contents(folder, files)]
        return Source(folder.name, identity, lambda: _rows(dataset, text_column, title))
    texts, lines = (_files_in(folder, suffix) for suffix in (".txt", ".jsonl"))
    if texts and lines:
        raise ValueError(
            f"`source` must hold .txt or .jsonl files, not both, got {str(folder)!r} with {len(texts)} and "
            f"{len(lines)}; move one kind to a folder of its own."
        )
    if texts or lines:
        return _files_source(folder, texts or lines, text_column, split)
    if not _files_in(folder):
        raise ValueError(f"`source` must hold documents, got the folder {str(folder)!r}, which holds no files.")
    return _loadable_source(folder, None, text_column, split)


def load_rows(path: str, configuration: str | None, split: str) -> Iterable[dict[str, Any]]:
    """Return the rows of one split of a dataset.

    `path`: name on the Hub, folder of `save_to_disk`, or folder of files that `datasets.load_dataset` reads.
    `configuration`: where the dataset has several.
    Raises ValueError if there is no such dataset or split, or no network to get it.
    """
    folder = Path(path).expanduser()
    if _is_saved(folder):
        return _saved_split(folder, split)[0]
    # What is on this machine is not copied into the cache of `datasets`, where others may read it.
    return _opened(folder if folder.is_dir() else path, configuration, split, streaming=folder.is_dir())


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in SAVED_DATASET_FILES)


def _saved_split(folder: Path, split: str) -> tuple[datasets.Dataset, Path]:
    """Return a split of what `save_to_disk` wrote, and its folder."""
    saved = datasets.load_from_disk(str(folder))
    if not isinstance(saved, datasets.DatasetDict):
        _refuse_options(str(folder), split=split)
        return saved, folder
    if split not in saved:
        raise ValueError(
            f"`split` must be one of {', '.join(saved)} for {str(folder)!r}, got {split!r}."
            + did_you_mean(split, map(str, saved))
        )
    return saved[split], folder / split


def _loadable_source(place: str | Path, configuration: str | None, text_column: str, split: str) -> Source:
    """Return what `datasets.load_dataset` streams from a folder or, by its name, from the Hub."""

    def documents() -> Iterator[Document]:
        # Opened only now: what was tokenised before is found again without a network.
        rows = _opened(place, configuration, split, streaming=True)
        yield from _rows(rows, text_column, f"the dataset {str(place)!r}")

    # A folder is known by what is in it, a dataset of the Hub by its name.
    known_by = _contents(place, _files_in(place)) if isinstance(place, Path) else place
    name = place.name if isinstance(place, Path) else place
    return Source(name, [known_by, configuration, split, text_column], documents)


def _opened(place: str | Path, configuration: str | None, split: str, *, streaming: bool = False) -> Any:
    """Return what `datasets.load_dataset` opens; ValueError where it cannot."""
    try:
        return datasets.load_dataset(str(place), configuration, split=split, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        given = f"`configuration` {configuration!r} and `split` {split!r}" if configuration else f"`split` {split!r}"
        what = "holds no .txt or .jsonl files, and `datasets.load_dataset` cannot open it"
        if isinstance(place, str):
            what = "is neither a file nor a folder, and cannot be opened as a dataset's name"
        raise ValueError(
            f"{str(place)!r} {what} with {given}: {error}. Of a name, check the spelling and the network, and that "
            "HF_HUB_OFFLINE is not set."
        ) from error


def _files_source(folder: Path, files: list[Path], text_column: str, split: str) -> Source:
    name = files[0].stem if len(files) == 1 else folder.name
    identity = _contents(folder, files)
    if files[0].suffix == ".txt":
        _refuse_options(name, text_column=text_column, split=split)
        return Source(name, identity, lambda: _texts(folder, files))
    _refuse_options(name, split=split)
    return Source(name, [text_column, identity], lambda: _lines(folder, files, text_column))


def _refuse_options(name: str, text_column: str = "text", split: str = "train") -> None:
    for option, value, default in (("text_column", text_column, "text"), ("split", split, "train")):
        if value != default:
            raise ValueError(f"`{option}` must be left out for {name!r}, which has no such thing, got {value!r}.")


def _texts(folder: Path, files: Iterable[Path]) -> Iterator[Document]:
    for path in files:
        # Not by `datasets`: its text reader tells neither a document's file nor the file of a wrong byte.
        with _utf8(path):
            text = path.read_text(encoding="utf-8")
        yield Document(path.relative_to(folder).with_suffix("").as_posix(), text)


def _lines(folder: Path, files: list[Path], text_column: str) -> Iterator[Document]:
    for path in files:
        prefix = "" if len(files) == 1 else f"{path.relative_to(folder).with_suffix('').as_posix()}:"
        # Not by `datasets`: its reader does not say which line is wrong, and wants the same columns in every line.
        with _utf8(path), path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{where}, must be one JSON object, got {line[:40]!r} ({error}).") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{where}, must be one JSON object, got {line[:40].strip()!r}.")
                yield _document(row, text_column, f"{prefix}{number}", where)


def _rows(dataset: Iterable[Mapping[str, Any]], text_column: str, title: str) -> Iterator[Document]:
    for number, row in enumerate(dataset, start=1):
        yield _document(row, text_column, str(number), f"{title}, row {number}")


def _document(row: Mapping[str, Any], text_column: str, default_id: str, where: str) -> Document:
    if text_column not in row:
        has_tokens = "; open a corpus that is tokenised with `datasets.load_from_disk`" if "input_ids" in row else ""
        raise ValueError(
            f"`text_column` must name a column, got {text_column!r} for {where}, which has {', '.join(row)}{has_tokens}."
            + did_you_mean(text_column, row)
        )
    text = row[text_column]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"`text_column` must name a column of text, got {text_column!r} with {text!r} in {where}.")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:  # JSON can write half a character, which no tokenizer takes
        raise ValueError(
            f"{where}, must hold whole characters in {text_column!r}, got half of one ({error})."
        ) from error
    given_id = row.get("id")
    return Document(default_id if given_id is None else str(given_id), text or "")


@contextlib.contextmanager
def _utf8(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8, got other bytes ({error}); convert it first.") from error


def _files_in(folder: Path, suffix: str = "") -> list[Path]:
    return sorted(path for path in folder.rglob(f"*{suffix}") if path.is_file())


def _contents(folder: Path, files: Iterable[Path]) -> list[tuple[str, int, str]]:
    """Return name, size in bytes and hash of each file."""
    found = []
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        found.append((path.relative_to(folder).as_posix(), path.stat().st_size, digest))
    return found
