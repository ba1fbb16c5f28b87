"""The encoders that wrote a bank, in the order in which they came: version v of an entry names the v-th of them."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from longmem.encoder.sketch import SIZE, Sketch
from longmem.encoder.stamp import EncoderStamp

UNKNOWN = -1  # version of what was written by nobody knows which encoder


@dataclass
class EncoderVersion:
    """One encoder of a bank."""

    stamp: EncoderStamp
    sketch: Sketch | None = None  # of its weights, where one was made


class Encoders:
    """The history of a bank's encoders; the last one is current, and writes.

    >>> encoders = Encoders(["1f"]); encoders.enter(EncoderStamp("2a")), encoders.enter(EncoderStamp("2a"))
    (1, 1)
    >>> encoders.lags(), encoders.enter(EncoderStamp("1f")), encoders.lags()  # back to the first: what it wrote is fresh
    ([1, 0], 2, [0, 1, 0])
    """

    def __init__(self, fingerprints: Sequence[str | EncoderStamp] = ()) -> None:
        self.versions = [EncoderVersion(EncoderStamp(each) if isinstance(each, str) else each) for each in fingerprints]
        self._json: list[dict[str, Any]] = []  # of these versions, empty where one has changed

    @property
    def current(self) -> int:
        """Return the version of what is written now; `UNKNOWN` if no encoder was ever named."""
        return len(self.versions) - 1

    @property
    def stamp(self) -> EncoderStamp | None:
        return self.versions[-1].stamp if self.versions else None

    def enter(self, stamp: EncoderStamp, sketch: Sketch | None = None) -> int:
        """Make an encoder the current one, a new version unless it is that already; return its version."""
        known, self._json = self.stamp, []
        if known is None or known.digest != stamp.digest:
            self.versions.append(EncoderVersion(stamp, sketch))
        elif len(stamp.recipe) > len(known.recipe):  # the same encoder, told of by its hash alone before
            self.versions[-1].stamp = stamp
        if sketch is not None:
            self.versions[-1].sketch = sketch
        return self.current

    def lags(self) -> list[int]:
        """Return for each version by how many changes of the encoder it is behind; 0 for an encoder that has come back."""
        if not self.versions:
            return []
        last, current = self.versions[-1].stamp.digest, self.current
        return [0 if each.stamp.digest == last else current - number for number, each in enumerate(self.versions)]

    def version_of(self, digest: str) -> int:
        """Return the latest version of an encoder; the current one if it never wrote here."""
        numbers = range(self.current, -1, -1)
        return next((each for each in numbers if self.versions[each].stamp.digest == digest), self.current)

    def gaps(self) -> list[float | None]:
        """Return for each version how far the weights have moved since, relative to their norm; None if not known."""
        now = self.versions[-1].sketch if self.versions else None
        return [
            0.0 if lag == 0 else None if now is None or version.sketch is None else now.gap(version.sketch)
            for lag, version in zip(self.lags(), self.versions, strict=True)
        ]

    def copy(self) -> "Encoders":
        """Return a history that goes on by itself."""
        twin = Encoders()
        twin.versions = [EncoderVersion(version.stamp, version.sketch) for version in self.versions]
        return twin

    def to_json(self) -> list[dict[str, Any]]:
        """Return plain values for `from_json`."""
        if len(self._json) != len(self.versions):  # asked at every commit, though it seldom changes
            self._json = [each.stamp.to_json() | {"sketch": _to_text(each.sketch)} for each in self.versions]
        return self._json

    @classmethod
    def from_json(cls, content: Sequence[dict[str, Any]]) -> "Encoders":
        encoders = cls()
        pairs = ((EncoderStamp.from_json(each), _from_text(each["sketch"])) for each in content)
        encoders.versions = [EncoderVersion(*pair) for pair in pairs]
        return encoders


def _to_text(sketch: Sketch | None) -> dict[str, Any] | None:
    if sketch is None:
        return None
    return {"norm": sketch.norm, "sums": base64.b64encode(sketch.sums.numpy().astype("<f4").tobytes()).decode()}


def _from_text(content: dict[str, Any] | None) -> Sketch | None:
    if content is None:
        return None
    data = bytearray(base64.b64decode(content["sums"]))
    if len(data) != SIZE * torch.float32.itemsize:
        raise ValueError(f"a sketch must be of {SIZE} sums, got {len(data)} bytes")
    sums = torch.frombuffer(data, dtype=torch.float32)
    return Sketch(sums, content["norm"])
