"""An encoder that is only a name: what a bank asks of a model before it is read."""

from __future__ import annotations

import torch

from longmem.encoder.sketch import Sketch
from longmem.encoder.stamp import EncoderStamp


class NamedEncoder:
    """Stands for a model, and for the encoder of that model, whose fingerprint is a word."""

    is_moving = False
    input_device = torch.device("cpu")

    def __init__(self, fingerprint: str = "encoder-a") -> None:
        self.fingerprint = fingerprint

    @property
    def encoder(self) -> NamedEncoder:
        return self

    def encoder_stamp(self) -> EncoderStamp:
        return EncoderStamp(self.fingerprint)

    def stamp(self, *, exact: bool = False) -> EncoderStamp:
        return self.encoder_stamp()

    def stamp_for_reading(self) -> EncoderStamp:
        return self.encoder_stamp()

    def sketch(self) -> Sketch:
        return Sketch(torch.full((1024,), float(len(self.fingerprint))), 1.0)
