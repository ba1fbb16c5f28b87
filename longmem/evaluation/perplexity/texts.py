"""The texts that are scored as token ids, what is known of their tokens, and the scores with the file that keeps them."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from longmem.data import load_corpus
from longmem.data.sources import unrelated_text
from longmem.evaluation.folder import digest, spread
from longmem.evaluation.perplexity.scoring import Cut, Window, WindowScores
from longmem.evaluation.perplexity.settings import PerplexitySettings
from longmem.evaluation.systems import tokenize
from longmem.files import check_tensors, damaged, make_folder, new_file, seal_tensors
from longmem.memory.folder.foreign import UNFIT


@dataclasses.dataclass(frozen=True)
class Text:
    """The tokens of a document, or as many of a book as are read; and those of the text whose memory is the wrong one."""

    name: str
    token_ids: Int[Tensor, " tokens"]
    wrong_name: str
    wrong_ids: Int[Tensor, " others"]


def token_digest(token_ids: Int[Tensor, " tokens"]) -> str:
    """Return a hash of token ids."""
    return hashlib.blake2b(token_ids.numpy().tobytes(), digest_size=8).hexdigest()


def read_texts(tokenizer: PreTrainedTokenizerBase, settings: PerplexitySettings) -> list[Text]:
    """Return the texts to score; the wrong memory of each is of the next one, that of the last of the first.

    A single text has `unrelated_text` for it. Documents of less than two tokens are left out. Raises ValueError if there are no
    others, or a book is too short.
    """
    corpus = load_corpus(
        settings.data,
        tokenizer,
        text_column=settings.text_column,
        split=settings.split or ("test" if settings.data.endswith(".json") else "train"),
        max_tokens=settings.max_tokens,
        num_documents=settings.num_documents,
    )
    lengths = np.concatenate([pc.list_value_length(chunk).to_numpy() for chunk in corpus.data["input_ids"].chunks])
    numbers = np.flatnonzero(lengths >= 2)
    if not len(numbers):
        raise ValueError(
            f"`data` must hold a document of two tokens or more, got {len(corpus)} shorter ones in {settings.data!r}."
        )

    def part(name: str, token_ids: Sequence[int], needed: int) -> tuple[str, Tensor]:
        if settings.plan == "documents":
            return name, torch.tensor(token_ids)
        if len(token_ids) < needed:
            raise ValueError(
                f"{name} must have {needed:,} tokens, the scored ones and those before them, got {len(token_ids):,}; take a "
                "longer text, or fewer `windows_per_document` or `memory_tokens`."
            )
        return name, torch.tensor(token_ids[:needed])

    rows = [corpus[int(numbers[place])] for place in spread(len(numbers), settings.limit)]
    texts = [part(row["document_id"], row["input_ids"], settings.needed_tokens) for row in rows]
    others = [*texts[1:], texts[0]]
    if len(texts) == 1:
        name, text = unrelated_text(settings.data)
        others = [part(name, tokenize(tokenizer, text), settings.first_scored)]
    return [Text(*text, *other) for text, other in zip(texts, others, strict=True)]


def digest_of(texts: Sequence[Text]) -> str:
    """Return a hash of what is read."""
    return digest([[each.name, token_digest(each.token_ids), token_digest(each.wrong_ids)] for each in texts])


# Of what lies before the window: each group ends with so many tokens.
UP_TO = {"up to 2k": 2_048, "2k to 8k": 8_192, "8k to 32k": 32_768, "32k to 65k": 65_536, "beyond": None}
DISTANCES = ("in the window", *UP_TO, "never before")
# Tokens as they are: nothing that looks like mark-up is left out, and no blank before a comma.
VERBATIM: dict[str, Any] = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}


def last_distances(token_ids: Int[Tensor, " tokens"], ngram: int) -> Int[Tensor, " tokens"]:
    """Return for each token how many tokens before it the same `ngram` tokens, itself the last of them, last ended.

    0 where they did not stand there before, as for the first tokens, which end none.

    >>> last_distances(torch.tensor([7, 8, 9, 7, 8, 7, 8]), 2).tolist()
    [0, 0, 0, 0, 3, 0, 2]
    """
    ids = token_ids.numpy().astype(np.int64)
    found = np.zeros(len(ids), dtype=np.int64)
    if len(ids) < ngram:
        return torch.from_numpy(found)
    # The number of an n-gram among all there are: no hash, so that different ones are never taken for the same.
    _, names = np.unique(ids, return_inverse=True)
    kinds, grams = int(names.max()) + 1, names
    for _ in range(ngram - 1):
        _, grams = np.unique(grams[:-1] * kinds + names[-len(grams) + 1 :], return_inverse=True)
    order = np.argsort(grams, kind="stable")
    same = grams[order][1:] == grams[order][:-1]
    found[order[1:][same] + ngram - 1] = (order[1:] - order[:-1])[same]
    return torch.from_numpy(found)


def distance_groups(
    distances: Int[Tensor, " scored"], positions: Int[Tensor, " scored"], starts: Int[Tensor, " scored"], ngram: int
) -> Int[Tensor, " scored"]:
    """Return for each scored token the number of its group in `DISTANCES`.

    What stands wholly in the window is "in the window"; what reaches over its start is not. `positions` are those of the tokens
    in their text, `starts` those of the windows that they were scored in.
    """
    ends = torch.tensor([end for end in UP_TO.values() if end is not None])
    groups = 1 + torch.searchsorted(ends, distances)
    groups[positions - distances - (ngram - 1) >= starts] = DISTANCES.index("in the window")
    groups[distances == 0] = DISTANCES.index("never before")
    return groups


def bits_per_byte(nats: Float[Tensor, " texts"], num_bytes: Int[Tensor, " texts"]) -> Float[Tensor, " texts"]:
    """Return bits per UTF-8 byte of texts whose tokens have these losses in all."""
    return nats / math.log(2) / num_bytes


def scored_bytes(
    tokenizer: PreTrainedTokenizerBase, token_ids: Int[Tensor, " tokens"], windows: Sequence[Window]
) -> Int[Tensor, " windows"]:
    """Return the UTF-8 bytes of the text of each window's scored tokens.

    The text is what the tokenizer makes of the whole document's ids. A character that several tokens share counts with the
    first of them. Where the tokenizer does not say which characters belong to a token, or makes other tokens of its own
    text (as of a document that was cut in the middle of a word), the scored tokens of a window are decoded by themselves.
    """
    if (ends := byte_ends(tokenizer, token_ids)) is not None:
        return torch.stack([ends[window.end - 1] - ends[window.first_scored - 1] for window in windows])
    spans = [token_ids[window.first_scored : window.end].tolist() for window in windows]
    return torch.tensor([len(str(tokenizer.decode(span, **VERBATIM)).encode()) for span in spans])


def byte_ends(tokenizer: PreTrainedTokenizerBase, token_ids: Int[Tensor, " tokens"]) -> Int[Tensor, " tokens"] | None:
    """Return the byte after each token in the text of all of them; None where the tokenizer cannot say."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    text = str(tokenizer.decode(token_ids.tolist(), **VERBATIM))
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    if encoded["input_ids"] != token_ids.tolist():
        return None
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    bytes_before = np.concatenate([[0], np.cumsum(sizes)])
    char_ends = np.maximum.accumulate([end for _, end in encoded["offset_mapping"]])  # of tokens that share a character
    return torch.from_numpy(bytes_before[char_ends])


@dataclasses.dataclass(frozen=True)
class TextScores:
    """Losses on windows of a text by system, and what the scored tokens are; longer contexts may have the first windows only.

    `distances` of the scored tokens of each window are those of `last_distances`; `num_bytes` are of their text.
    """

    name: str
    num_tokens: int
    windows: tuple[Window, ...]
    distances: tuple[Int[Tensor, " _scored"], ...]
    num_bytes: Int[Tensor, " windows"]
    systems: dict[str, WindowScores]

    @property
    def places(self) -> tuple[Int[Tensor, " scored"], Int[Tensor, " scored"]]:
        """Return where the scored tokens stand in the text, and where their windows begin."""
        positions = [torch.arange(window.first_scored, window.end) for window in self.windows]
        starts = [torch.full((window.num_scored,), window.start) for window in self.windows]
        return torch.cat(positions), torch.cat(starts)

    def part(self, windows: slice) -> "TextScores":
        """Return the scores of some windows."""
        own = {name: getattr(self, name)[windows] for name in ("windows", "distances", "num_bytes")}
        systems = {name: each.part(windows) for name, each in self.systems.items()}
        return dataclasses.replace(self, **own, systems=systems)

    def by_window(self) -> "list[TextScores]":
        """Return the scores of each window."""
        return [self.part(slice(number, number + 1)) for number in range(len(self.windows))]


def file_of(folder: Path, number: int, name: str) -> Path:
    """Return the file of a text: its number, since names may be long or differ in signs that no file name has."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:60].strip(".-")
    return folder / "documents" / f"{number:05d}-{readable or 'document'}.safetensors"


def save_scores(path: Path, text: Text, scores: Mapping[Cut, TextScores]) -> None:
    """Write a finished text; another process sees the whole file or none.

    For each cut, written as window/stride: `CUT/positions`, `token_ids`, `distances` and `starts` (of the window) of each
    scored token, `CUT/num_bytes` of each window, and for each system `CUT/SYSTEM/losses`, `seconds`, `preparing_seconds` and,
    where it was asked for, `memory_share`.
    """
    tensors: dict[str, Tensor] = {}
    for cut, own in scores.items():
        positions, starts = own.places
        found = {"positions": positions, "starts": starts, "token_ids": text.token_ids[positions]}
        found |= {"distances": torch.cat(own.distances), "num_bytes": own.num_bytes}
        for system, each in own.systems.items():
            found[f"{system}/losses"] = torch.cat(each.losses)
            for name in ("seconds", "preparing_seconds"):
                found[f"{system}/{name}"] = torch.tensor(getattr(each, name), dtype=torch.float64)
            if each.memory_share is not None:
                found[f"{system}/memory_share"] = each.memory_share
        tensors |= {f"{cut}/{name}": tensor.contiguous() for name, tensor in found.items()}
    systems = list(next(iter(scores.values())).systems)
    about = {"name": text.name, "num_tokens": len(text.token_ids), "cuts": [*map(str, scores)], "systems": systems}
    make_folder(path.parent, follow=False)
    with new_file(path) as draft:
        save_file(tensors, draft, {"text": json.dumps(about)})
        seal_tensors(draft, {})


def load_scores(path: Path) -> dict[Cut, TextScores]:
    """Return what `save_scores` wrote. Raises ValueError, which names the file, if it is damaged."""
    check_tensors(path)
    try:
        return _scores_in(path)
    except UNFIT as error:
        raise damaged(path, f"it holds no scores ({type(error).__name__}: {error})") from error


def _scores_in(path: Path) -> dict[Cut, TextScores]:
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["text"])
    tensors, found = load_file(path), {}
    for cut in about["cuts"]:
        own = {name.removeprefix(f"{cut}/"): each for name, each in tensors.items() if name.startswith(f"{cut}/")}
        starts, sizes = own["starts"].unique_consecutive(return_counts=True)
        parts = zip(starts.tolist(), own["positions"].split(sizes.tolist()), strict=True)
        windows = tuple(Window(start, int(part[0]), int(part[-1]) + 1) for start, part in parts)
        systems = {}
        for name in about["systems"]:
            count = int((sizes.cumsum(0) <= len(own[f"{name}/losses"])).sum())  # all windows, or the first ones
            losses, share = own[f"{name}/losses"].split(sizes[:count].tolist()), own.get(f"{name}/memory_share")
            seconds, preparing = (own[f"{name}/{each}"].item() for each in ("seconds", "preparing_seconds"))
            systems[name] = WindowScores(losses, seconds, preparing, share)
        distances, num_bytes = own["distances"].split(sizes.tolist()), own["num_bytes"]
        found[Cut.parse(cut)] = TextScores(about["name"], about["num_tokens"], windows, distances, num_bytes, systems)
    return found
