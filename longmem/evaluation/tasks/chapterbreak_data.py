"""Examples in the format of github.com/SimengSun/ChapterBreak, from a file or from the Hugging Face Hub."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longmem.evaluation.folder import spread
from longmem.evaluation.tasks.files import in_format, read_text

FORMAT = "{split: {work: [{ctx: text, pos: text, negs: [texts]}]}}"


@dataclasses.dataclass(frozen=True)
class Example:
    """A context that ends where a chapter ends, and passages of which the first begins the next chapter."""

    work: str
    number: int
    context: str
    suffixes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Return what identifies the example in its split."""
        return f"{self.work}/{self.number}"


class Split(NamedTuple):
    """The examples of a split in the order of its file; the name is empty where a file has no splits."""

    name: str
    examples: list[Example]


def load_split(data: str, *, split: str | None = None, file: str | None = None, longest: int = 8192) -> Split:
    """Return the examples of a split, by default the only one, of a JSON file or of a dataset on the Hub.

    `longest` tokens of context are needed, which choose the dataset's `file` where none is named. Raises ValueError if there is
    no such file or split, or it has another format.
    """
    path = Path(data)
    if path.is_file():
        if file is not None:
            raise ValueError(
                f"`file` is of a dataset on the Hub, got {file!r} beside {data}, a file itself; leave it out."
            )
    elif not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", data) and not data.endswith((".json", ".gz")):
        path = download(data, file, longest)
    else:
        raise ValueError(
            f"`data` must be a JSON file of ChapterBreak's format, or a dataset on the Hub such as "
            f"simsun131/chapterbreak, got {data!r}, which is neither."
        )
    with in_format(FORMAT, path):
        content = json.loads(read_text(path))
    name, works = pick_split(content, split, str(path))
    return Split(name, examples_of(works, str(path)))


def pick_split(content: Any, split: str | None, source: str) -> tuple[str, Mapping[str, Any]]:
    """Return name and works of a split; a file may be a split itself."""
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{source} must hold {FORMAT}, got {type(content).__name__}.")
    if all(isinstance(works, list) for works in content.values()):
        if split is not None:
            raise ValueError(f"`split` must be left out for {source}, which is a split itself, got {split!r}.")
        return "", content
    if split is None and len(content) == 1:
        (split,) = content
    if split is None or split not in content:
        raise ValueError(f"`split` must be one of {list(content)}, those of {source}, got {split!r}.")
    if not isinstance(content[split], dict):
        raise ValueError(f"{source} must hold {FORMAT}, got {type(content[split]).__name__} in {split!r}.")
    return split, content[split]


def examples_of(works: Mapping[str, Any], source: str) -> list[Example]:
    """Return the examples of a split, each checked."""
    found = []
    for work, entries in works.items():
        for number, entry in enumerate(entries):
            try:
                texts = [entry["ctx"], entry["pos"], *entry["negs"]]
                whole = len(texts) > 2 and all(isinstance(text, str) and text.strip() for text in texts)
            except (TypeError, KeyError):
                whole = False
            if not whole or isinstance(entry["negs"], str):
                raise ValueError(
                    f"{source} must hold {FORMAT}, no text empty and at least one in `negs`; example {number} of {work!r} "
                    f"is not like that: {str(entry)[:80]}"
                )
            found.append(Example(work, number, texts[0], tuple(texts[1:])))
    if not found:
        raise ValueError(f"{source} must have at least one example, got none.")
    return found


def choose(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """Return at most `limit` examples, spread over the works, in turns: one of each work, then the next of each.

    So the next example is of another work, whose memory is both its own and the wrong one of the example before.
    """
    works: dict[str, list[Example]] = {}
    for number in spread(len(examples), limit):
        works.setdefault(examples[number].work, []).append(examples[number])
    rounds = max(map(len, works.values()))
    return [own[turn] for turn in range(rounds) for own in works.values() if turn < len(own)]


def download(repository: str, file: str | None, longest: int) -> Path:
    """Return a file of a dataset on the Hub, or of the local cache. Raises ValueError where it cannot be had."""
    from huggingface_hub import hf_hub_download, list_repo_files

    try:
        if file is None:
            file = file_for(list_repo_files(repository, repo_type="dataset"), longest)
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except (OSError, LookupError) as error:
        raise ValueError(
            f"`data` {repository!r} is no local file, and could not be had from the Hugging Face Hub: {error} "
            "Without the network, download its JSON elsewhere and give its path as `data`; with it, name the file with "
            "`file`, such as file=chapterbreak_ctx_8192.json. experiments/chapterbreak makes data from books of your own."
        ) from error


def file_for(files: Sequence[str], longest: int) -> str:
    """Return the file with the smallest ctx_N in its name that has `longest` tokens, or the largest there is.

    >>> file_for(["README.md", "chapterbreak_ctx_512.json", "chapterbreak_ctx_8192.json"], 1000)
    'chapterbreak_ctx_8192.json'
    """
    sizes = {
        file: int(found[1]) for file in files if (found := re.search(r"ctx_?(\d+)\D*\.json(\.gz)?$", file)) is not None
    }
    if not sizes:
        raise LookupError(f"it has no JSON file with ctx_N in its name, but {', '.join(files) or 'no files'}.")
    enough = [file for file, size in sizes.items() if size >= longest]
    return min(enough, key=sizes.__getitem__) if enough else max(sizes, key=sizes.__getitem__)
