"""Mapped: old vectors are moved to where the new encoder would have put them, by a map fitted on a sample.

It costs the sample and no more. After a wholesale change of the encoder it wins most of what was lost; after a moderate one it
can do harm, so it is used only where held-out segments say that it wins, and else the fallback policy goes to work.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from experiments.mapped_refresh.drift_map import DriftMap, fit_map, neighbours_kept, relative_error
from longmem.memory.index import Ranked
from longmem.memory.refresh.policy import RefreshPolicy, Search, make_policy
from longmem.memory.refresh.refresher import Lags, Refresher, Targets, draw_segments, stored_chunks, vectors
from longmem.memory.rows.documents import Document
from longmem.memory.rows.segments import Segment
from longmem.memory.rows.storage import Chunks, decode, encode
from longmem.plugins import Setting, register

# Old and new vectors of segments, for each (layer, 0 for keys or 1 for values).
Pairs = dict[tuple[int, int], list[tuple[Tensor, Tensor]]]


@register("refresh", "mapped")
class Mapped(RefreshPolicy):
    """The policy that encodes a sample of each old version again, fits maps of keys and values on it, and moves the rest.

    Maps are used if held-out segments of the sample say two things: of the distance between old and new vectors the maps take
    `min_gain` or more away, for keys and for values; and among moved keys a search finds `min_recall` or more of what it finds
    among new ones. Both were needed where it was measured: after moderate fine-tuning maps that took a third of the distance
    away did harm, and after a swap, maps that took two thirds away kept a tenth of the neighbours. A layer's map is fitted
    for each head. Only vectors as they were encoded are moved: a moved segment keeps its version,
    and at the next change of the encoder it falls to the fallback policy, as does all where no map wins.
    """

    settings: ClassVar[Mapping[str, Setting]] = {
        "kind": Setting("affine", "the kind of map", words=("affine", "procrustes")),
        "sample_share": Setting(0.05, "the share of the tokens that is encoded again to fit it", 0.0001, 1.0),
        "holdout": Setting(0.25, "the share of the sample that judges it", 0.05, 0.9),
        "min_gain": Setting(0.5, "the share of the distance that maps must take away", 0.0, 1.0),
        "min_recall": Setting(0.5, "the share of its neighbours that a moved key must keep", 0.0, 1.0),
        "ridge": Setting(0.01, "the penalty of an affine map", 0.0, 1e6),
        "fallback": Setting("lazy", "what is done where no map wins", words=("lazy", "eager", "mask")),
    }

    def __init__(self, **chosen: Any) -> None:
        super().__init__(**chosen)
        name = self.chosen["fallback"]
        self._fallback = RefreshPolicy() if name == "mask" else make_policy(name)
        # For each old version, what held-out segments say of its maps: the share of the distance that is taken away, the lesser
        # of keys and values, and the share of neighbours that keys keep.
        self.gains: dict[int, float] = {}
        self.recalls: dict[int, float] = {}

    def on_encoder_change(self, refresher: Refresher) -> None:
        """Fit maps and move what they win for; leave the rest to the fallback."""
        by_version: dict[int, Targets] = defaultdict(list)
        for document, segments in refresher.stale():
            for version in {each.version for each in segments}:
                mine = [each for each in segments if each.version == version and each.mapped_to < 0]
                if mine:
                    by_version[version].append((document, mine))
        for version, targets in by_version.items():
            self._move(refresher, version, targets)
        self._fallback.on_encoder_change(refresher)

    @property
    def encodes_on_read(self) -> bool:  # type: ignore[override]
        """Return whether the fallback does."""
        return self._fallback.encodes_on_read

    @property
    def map_gain(self) -> float | None:
        """Return what the worst map gained."""
        return min(self.gains.values(), default=None)

    def readable(self, lags: Lags) -> Bool[Tensor, " versions"]:
        """Return what the fallback finds readable."""
        return self._fallback.readable(lags)

    def reads_mapped(self) -> bool:
        """Return True: moved segments are read."""
        return True

    def on_open(self, refresher: Refresher) -> None:
        """Do what the fallback does."""
        self._fallback.on_open(refresher)

    def on_read(self, refresher: Refresher | None, search: Search, rows: Tensor | None, readable: Tensor) -> Ranked:
        """Do what the fallback does."""
        return self._fallback.on_read(refresher, search, rows, readable)

    def _move(self, refresher: Refresher, version: int, targets: Targets) -> None:
        """Move the segments of one version, if maps win on a sample of them; the sample itself stays encoded again."""
        total = sum(each.stop - each.start for _, segments in targets for each in segments)
        sample = draw_segments(targets, self.chosen["sample_share"] * total)
        pairs = encode_pairs(refresher, sample)
        maps, gain, recall = self.fit(pairs)
        self.gains[version], self.recalls[version] = gain, recall
        if not (gain >= self.chosen["min_gain"] and recall >= self.chosen["min_recall"]):  # NaN is no gain
            warnings.warn(
                f"no map from encoder version {version} to the current one: on held-out segments it would take {gain:.0%} of "
                f"the distance away (min_gain={self.chosen['min_gain']:g}) and keep {recall:.0%} of a key's neighbours "
                f"(min_recall={self.chosen['min_recall']:g}); {self.chosen['fallback']} refresh is used instead.",
                stacklevel=2,
            )
            return
        for document, segments in targets:
            # Without those that are fresh by now: the sample, and what shares its chunks.
            move_segments(refresher, document, [each for each in segments if each.version == version], maps)

    def fit(self, pairs: Pairs) -> tuple[dict[tuple[int, int], DriftMap], float, float]:
        """Return maps for each layer's keys and values, fitted on all pairs, and what held-out ones say of them."""
        maps: dict[tuple[int, int], DriftMap] = {}
        gains, recalls = [], []
        for place, found in pairs.items():
            old, new = (torch.cat(side, dim=1) for side in zip(*found, strict=True))
            # Whole segments are held out where there are several; of a single one, its end.
            sizes = [side[0].shape[1] for side in found]
            held = min(max(1, round(self.chosen["holdout"] * len(sizes))), len(sizes) - 1)
            split = sum(sizes[:-held]) if held else max(1, round((1 - self.chosen["holdout"]) * sizes[0]))
            trial = fit_map(self.chosen["kind"], old[:, :split], new[:, :split], self.chosen["ridge"])
            before, wanted = old[:, split:], new[:, split:]
            after = trial.apply(before)
            gains.append(1 - relative_error(after, wanted) / max(relative_error(before, wanted), 1e-30))
            if place[1] == 0:
                recalls.append(neighbours_kept(after, wanted))
            maps[place] = fit_map(self.chosen["kind"], old, new, self.chosen["ridge"])
        # Keys of all layers together, and values: a reader needs both.
        keys = [gain for (_, side), gain in zip(pairs, gains, strict=True) if side == 0]
        values = [gain for (_, side), gain in zip(pairs, gains, strict=True) if side == 1]
        if not keys:
            return maps, float("-inf"), 0.0
        lesser = torch.tensor([sum(keys) / len(keys), sum(values) / len(values)]).min().item()  # of NaN, NaN
        return maps, lesser, sum(recalls) / len(recalls)


def encode_pairs(refresher: Refresher, sample: Targets) -> Pairs:
    """Return old and new vectors of the sample's segments, which are encoded again and stay so."""
    before = [
        (document, each, stored_chunks(refresher.table, document, each)) for document, segs in sample for each in segs
    ]
    refresher.reencode(sample)
    pairs: Pairs = defaultdict(list)
    for document, segment, old in before:
        if segment.version != refresher.table.encoders.current:
            continue  # what came out was not finite, and was not written
        new = stored_chunks(refresher.table, document, segment)
        for layer, (old_chunks, new_chunks) in enumerate(zip(old.chunks, new.chunks, strict=True)):
            for side, both in enumerate(zip(vectors(old_chunks), vectors(new_chunks), strict=True)):
                if both[0].shape[1]:
                    pairs[layer, side].append(both)
    return pairs


@torch.inference_mode(False)
def move_segments(
    refresher: Refresher, document: Document, segments: list[Segment], maps: Mapping[tuple[int, int], DriftMap]
) -> None:
    """Write the segments' vectors moved by the maps, in one transaction."""
    table, state = refresher.table, refresher.state
    with table.transaction(), table.lock:
        for segment in segments:
            stored = stored_chunks(refresher.table, document, segment)
            if not stored.chunks or not stored.chunks[0].keys.shape[1]:
                continue
            chunks = [moved(each, maps, layer) for layer, each in enumerate(stored.chunks)]
            if not all(torch.isfinite(decode(part)).all() for each in chunks for part in (each.keys, each.values)):
                continue
            table.overwrite_chunks(document, stored.first, chunks)
            segment.mapped_to = table.encoders.current
            state.refreshed.mapped += 1
        table.ledger.note_encoding(document)


def moved(chunks: Chunks, maps: Mapping[tuple[int, int], DriftMap], layer: int) -> Chunks:
    """Return the chunks of a layer with keys, values and search keys moved."""
    count, dtype = chunks.keys.shape[1], chunks.keys.dtype
    keys, values = (
        encode(maps[layer, side].apply(each).unflatten(1, (count, -1)), dtype)
        for side, each in enumerate(vectors(chunks))
    )
    return Chunks(keys, values, maps[layer, 0].apply(chunks.search_keys))
