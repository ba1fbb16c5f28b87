"""What commands read and write: text files, and documents as lines of JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longmem.memory import DocumentInfo, MemoryBank

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


def read_text(path: Path) -> str:
    """Return the text of a file. Raises ValueError if it is no UTF-8 or blank, OSError if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a UTF-8 text file ({error}); convert it to UTF-8 text first.") from error
    if not text.strip():
        raise ValueError(f"{path} holds no text.")
    return text


def read_texts(files: Iterable[Path], name: str | None = None) -> list[Text]:
    """Return the texts of files, those of an export (`export_line`) one by one; `name` is for a single one.

    Raises ValueError for a file without text or not in UTF-8, or a name that is given twice.
    """
    texts = [text for path in files for text in _texts_of(path)]
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


def export_line(bank: MemoryBank, info: DocumentInfo) -> str:
    """Return a document as one line of JSON, for `datasets.load_dataset("json")` and `read_texts`.

    Token ids and text are those from `first_resident_token` on; None where the bank does not know them.
    """
    token_ids = bank.token_ids(info.document_id)
    document = {name: getattr(info, name) for name in EXPORTED}
    ids = None if token_ids is None else token_ids.tolist()
    return json.dumps({**document, "token_ids": ids, "text": bank.text(info.document_id)}) + "\n"


def _texts_of(path: Path) -> list[Text]:
    text = read_text(path)
    if path.suffix != ".jsonl" or '"first_resident_token"' not in text.partition("\n")[0]:
        return [Text(path.name, text)]
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
