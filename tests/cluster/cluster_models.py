"""What workers of a cluster make by name: this module is on the path of every node."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from fake_encoder import CHUNK, DIM, HEADS, LAYERS, FakeModel
from torch import Tensor

from longmem.cluster.workers import EncodingWorker
from longmem.encoder.stamp import EncoderStamp
from longmem.memory.memorize import memorize

OPTIONS = {"segment_length": 16, "num_retrieved_tokens": 8, "memory_layers": [1, 3], "layer_reduction_factor": 1}


class Path(NamedTuple):
    """What `EncoderPath` says of a model: its only weight is the number of its version."""

    model: VersionedModel

    @property
    def leaves(self) -> list[tuple[str, VersionedModel, str]]:
        return [("version", self.model, "number")]

    def tensors(self) -> list[tuple[str, Tensor]]:
        return [("version", self.model.number.clone())]


class VersionedModel(FakeModel):
    """An encoder whose values are the number of its version, so that who reads sees how old it is."""

    class Config:
        memory_layers, chunk_size, search, segment_length = LAYERS, CHUNK, "chunk_mean", 8

        def get_text_config(self) -> Any:
            return type("Text", (), {"vocab_size": 100})()

    config, tokenizer = Config(), None

    def __init__(self, version: int = 0) -> None:
        super().__init__()
        self.number = torch.tensor(version)
        self.path = Path(self)

    @property
    def version(self) -> int:
        return int(self.number)

    @version.setter
    def version(self, version: int) -> None:
        self.number.fill_(version)

    def encoder_stamp(self) -> EncoderStamp:
        return EncoderStamp(f"version-{self.version}")

    def encode(self, ids: Tensor) -> Any:
        keys = torch.randn(len(LAYERS), 1, HEADS, ids.shape[1], DIM, generator=torch.Generator().manual_seed(0))
        return list(keys), [torch.full_like(each, float(self.version)) for each in keys]


def memorize_once(bank: Any, model: VersionedModel, task: tuple[str, list[int]]) -> None:
    """Memorize token ids, unless a worker before this one has."""
    name, ids = task
    if name not in bank:
        memorize(model, bank, ids, name)


class SlowWorker(EncodingWorker):
    """A worker that takes so many seconds longer for each segment, and knows how many it did in which time."""

    pause = 0.0

    def slow_down(self, pause: float, version: int = 0) -> None:
        """Take so long from now on, with the encoder of this version, and count anew."""
        self.pause, self.times, self.model.version, self._stamp = pause, [], version, None

    def speed(self) -> float:
        """Return segments per second, from the first that was begun to the last that was done."""
        return len(self.times) / (self.times[-1][1] - self.times[0][0])

    def encode(self, stamp: Any, ids: Any) -> Any:
        began = time.monotonic()
        time.sleep(self.pause)
        answer = super().encode(stamp, ids)
        if self.pause:
            self.times.append((began, time.monotonic()))
        return answer
