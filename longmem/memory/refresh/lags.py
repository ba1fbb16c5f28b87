"""How far the entries of each encoder version are behind, by three clocks that agree only in what is fresh.

version     how often the encoder has changed since; cheap, and blind to how much it changed
gap         how far its weights have moved, relative to their norm, from sketches (`longmem/encoder/sketch.py`)
probe       how far its keys have moved: relative distance between stored keys and the same tokens encoded now
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from longmem.encoder.history import Encoders

CLOCKS = ("version", "gap", "probe")


@dataclass(frozen=True)
class Lags:
    """The lag of each version of a bank's encoders on a clock; the last entry is that of the unknown encoder.

    `values`: 0 for what is fresh, inf where a clock can't tell. `probed`: what the clock "probe" has measured, by version.
    """

    encoders: Encoders
    clock: str = "version"
    probed: Mapping[int, float] = field(default_factory=dict)

    @property
    def values(self) -> Float[Tensor, " versions"]:
        """Return the lags, as float64."""
        counts = self.encoders.lags()
        if self.clock == "gap":
            found = [torch.inf if gap is None else gap for gap in self.encoders.gaps()]
        elif self.clock == "probe":
            found = [self.probed.get(version, torch.inf) if count else 0.0 for version, count in enumerate(counts)]
        else:
            found = [float(count) for count in counts]
        return torch.tensor([*found, torch.inf], dtype=torch.float64)

    @property
    def is_fresh(self) -> Bool[Tensor, " versions"]:
        """Return for each version whether the current encoder is the one; where no encoder was ever named, all are."""
        counts = self.encoders.lags()
        return torch.tensor([*(count == 0 for count in counts), not counts])
