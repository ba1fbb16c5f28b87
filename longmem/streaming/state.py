"""What a stream is beside its model and its bank, and the file that holds it."""

import base64
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import GenerationConfig

from longmem.files import not_opened, read_json, write_file
from longmem.memory.protocols import EncodingModel

STATE_FILE = "stream.json"
BANK_NAME = "bank-[0-9a-f]{16}"  # a new name for every save, so that no bank is overwritten


# Of the fields of a state, as JSON has them.
KINDS = dict(document_id=str, window=int, keep=int, random=dict, num_tokens=int, local_ids=list, is_written=bool)


class StreamingModel(EncodingModel, Protocol):
    """What a stream needs of a model."""

    training: bool
    generation_config: GenerationConfig

    @property
    def input_device(self) -> torch.device: ...
    @property
    def generate(self) -> Callable[..., Any]: ...
    @property
    def __call__(self) -> Callable[..., Any]: ...


@dataclasses.dataclass
class StreamState:
    """Enough to go on from.

    `local_ids` are the tokens in the window; `is_written` tells whether the document is in the bank; `random` holds the
    states of the random number generators, as text.
    """

    document_id: str
    window: int
    keep: int
    random: dict[str, str]
    num_tokens: int = 0
    local_ids: list[int] = dataclasses.field(default_factory=list)
    is_written: bool = False

    def validate(self, model: StreamingModel, chunk_size: int) -> None:
        """Raise ValueError if the state is not one of a stream of this model."""
        segment_length, vocab_size = model.config.segment_length, model.config.get_text_config().vocab_size
        if not chunk_size < self.window <= segment_length:
            raise ValueError(
                f"`window` must be more than one chunk of {chunk_size} tokens and at most the model's `segment_length`, "
                f"{segment_length}, got {self.window}."
            )
        if not 0 <= self.keep < self.window or (self.window - self.keep) % chunk_size:
            raise ValueError(
                "`keep` must be 0 or more and leave whole chunks to go, `window - keep` a multiple of `chunk_size`, got "
                f"window {self.window}, keep {self.keep} and chunks of {chunk_size}; {self.window - chunk_size} would do."
            )
        if not len(self.local_ids) <= min(self.window, self.num_tokens) or not all(
            isinstance(token, int) and 0 <= token < vocab_size for token in self.local_ids
        ):
            raise ValueError(
                f"`local_ids` must be at most {self.window} ids from 0 to {vocab_size - 1}, got {len(self.local_ids)}."
            )
        try:
            with own_random_numbers(model.input_device):
                set_random_state(self.random, model.input_device)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"`random` must hold states of random number generators, got {error!r}.") from error


def read_state(folder: Path) -> tuple[str, StreamState]:
    """Return the name of the bank that belongs to a saved stream, and its state.

    Raises ValueError if there is none, or it is not as `write_state` wrote it; one of an earlier version has no checksum.
    """
    try:
        saved = read_json(folder / STATE_FILE)
        if saved.keys() - {"checksum"} != {"bank", "stream"}:
            raise ValueError(f"{STATE_FILE} has the entries {sorted(saved)}")
        if saved.pop("checksum", checksum(saved)) != checksum(saved):
            raise ValueError(f"{STATE_FILE} was changed after it was written")
        if not re.fullmatch(BANK_NAME, saved["bank"]):
            raise ValueError(f"{saved['bank']!r} is no bank of a stream")
        state = StreamState(**saved["stream"])
        for field in dataclasses.fields(StreamState):
            if type(value := getattr(state, field.name)) is not KINDS[field.name]:
                raise ValueError(f"`{field.name}` is {value!r:.80}")
        return saved["bank"], state
    except PermissionError as error:
        raise not_opened(folder / STATE_FILE, error) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"`folder` must hold a saved stream, got {str(folder)!r}: {error!r}.") from error


def may_name(folder: Path, bank: str) -> bool:
    """Return whether the state in a folder names this bank, or can't be read: then the bank must stay."""
    try:
        os.lstat(folder / STATE_FILE)
        return read_state(folder)[0] == bank
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True


def write_state(folder: Path, bank: str, state: StreamState) -> None:
    """Put the state of a stream into its folder, in one step. Raises OSError where there is no room or no permission."""
    content = {"bank": bank, "stream": dataclasses.asdict(state)}
    write_file(folder / STATE_FILE, json.dumps({**content, "checksum": checksum(content)}))


def checksum(content: Mapping[str, Any]) -> str:
    """Return a hash of plain values."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def own_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which random numbers can be drawn from other states without a trace outside."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def random_state(device: torch.device) -> dict[str, str]:
    """Return the states of the generators that sampling on `device` draws from, as text."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {kind: base64.b64encode(state.numpy().tobytes()).decode() for kind, state in states.items()}


def set_random_state(states: dict[str, str], device: torch.device) -> None:
    """Put the generators into these states; that of a GPU is left as it is when the stream has not been on one."""
    numbers = {kind: bytearray(base64.b64decode(text)) for kind, text in states.items()}
    decoded = {kind: torch.frombuffer(each, dtype=torch.uint8) for kind, each in numbers.items()}
    torch.set_rng_state(decoded["cpu"])
    if device.type == "cuda" and "cuda" in decoded:
        torch.cuda.set_rng_state(decoded["cuda"], device)
