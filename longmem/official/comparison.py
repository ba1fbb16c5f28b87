"""Replaying a recording of the released code, measuring how far this package is from it, and showing that."""

import dataclasses
import math
from typing import Any

import torch
from rich.console import Console

from longmem.console import PlainTable
from longmem.model.modeling import LongMemForCausalLM
from longmem.official.memory import ReleasedCodeError
from longmem.official.recording import Recording
from longmem.official.replay import COUNTED, FAMILIES, STORED, UNKNOWN, distance, replay
from longmem.official.weights import side_weights

# Independent recomputations are within 3e-6 of the released code's float32; a wrong epsilon is off by 1e-5.
TOLERANCE = 5e-6
# Rows stored in float16: one rounding that falls the other way, for a difference of 1e-7, moves logits by up to 2e-4.
ROUNDED_TOLERANCE = 5e-4
NUMBERS = (*COUNTED, UNKNOWN)  # families that are counts
# How the runs of a column were replayed.
FLOAT32, ROUNDED, FED = "float32 rows", "float16 rows", "recorded k, v"


@dataclasses.dataclass
class Comparison:
    """The largest absolute difference for each family and column, a count for some; `skipped` maps runs to reasons."""

    largest: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    replayed: list[str] = dataclasses.field(default_factory=list)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, family: str, column: str, value: float) -> None:
        """Take in one difference."""
        value, before = math.inf if math.isnan(value) else value, self.largest.get((family, column), 0.0)
        self.largest[family, column] = before + value if family in NUMBERS else max(before, value)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, for a program."""
        families: dict[str, dict[str, float]] = {}
        for (family, column), value in self.largest.items():
            families.setdefault(family, {})[column] = value
        outcome = {"worst": self.worst, "agrees": self.agrees}
        return {"families": families, "replayed": self.replayed, "skipped": self.skipped, **outcome}

    @property
    def worst(self) -> float:
        """The largest difference where none is owed to rounding of stored rows: float32 runs, and recorded rows."""
        exact = {key: value for key, value in self.largest.items() if key[1] != ROUNDED}
        return max((value for (family, _), value in exact.items() if family not in NUMBERS), default=0.0)

    @property
    def agrees(self) -> bool:
        """Whether no difference is larger than `TOLERANCE`, or than rounding of float16 rows explains, and every count is 0."""
        for (family, column), value in self.largest.items():
            if family == UNKNOWN or (family in STORED and column == ROUNDED):
                continue  # a row may be off by one rounding; that rows are right is told by those of `FED`
            limit = 0.0 if family in COUNTED else ROUNDED_TOLERANCE if column == ROUNDED else TOLERANCE
            if value > limit:
                return False
        return bool(self.replayed)


def compare(recording: Recording) -> Comparison:
    """Return how far this package is from a recording, over every run that the released code got right.

    Runs with float16 rows are replayed twice: from scratch, and with the recorded float32 keys and values written to the
    memory, where its rows must be bit-equal.
    """
    result = Comparison()
    model = recording.build_model()
    own, copied = recording.weights("sd/"), recording.weights("reload_sd/")
    for run in recording.runs:
        used = model
        if run.startswith("reload"):
            if not copied:
                result.skipped[run] = "its weights (`reload_sd/`) are not in the recording"
                continue
            # Those of a new side network here must be the recorded ones, which the replay then has.
            used, recorded = LongMemForCausalLM(model.config, model.backbone), side_weights({**own, **copied})
            for name, tensor in used.side_network.state_dict().items():
                result.add("weights copied at start", FLOAT32, distance(tensor, recorded[name]))
            used.eval().side_network.load_state_dict(recorded)
        if reason := unusable(recording, run):
            result.skipped[run] = reason
            continue
        is_rounded = recording.row_dtype(run) == torch.float16
        first = recording.step(run, recording.runs[run][0])
        columns = [ROUNDED, FED] if is_rounded and "backbone_qkv/k" in first else [ROUNDED] if is_rounded else [FLOAT32]
        try:
            differences = [
                (family, column, value)
                for column in columns
                for family, value in replay(recording, used, run, is_fed=column == FED)
            ]
        except ReleasedCodeError as error:
            result.skipped[run] = str(error)
            continue
        for difference in differences:
            result.add(*difference)
        result.replayed.append(run)
    return result


def unusable(recording: Recording, run: str) -> str | None:
    """Return why a run can't be replayed, None if it can."""
    for position, number in enumerate(recording.runs[run]):
        step = recording.step(run, number)
        if number != position:
            return f"step {position} is not in the recording"
        mask = step["input_ids"].ne(recording.pad_id)
        stored = int(step.get("memory/dstore_before", 0 if position == 0 else 1))
        if position == 0 and stored:
            return f"it starts with {stored} chunks in memory, which are not in the recording"
        if stored < 0 or int(step.get("memory/dstore_after", 0)) < 0:
            return "its memory was corrupted by a long batch after a short one (E3)"
        if bool((~mask[:, :-1] & mask[:, 1:]).any()):
            return "padding stands before tokens, where the released code gives NaN (E4b)"
        if not mask.all() and not stored:
            return "it has padding while the memory is empty, where the released code crashes (E4)"
    return None


def print_comparison(result: Comparison, console: Console) -> None:
    """Print the table, the notes and, last, `worst <figure> over <n> runs`."""
    columns = (FLOAT32, ROUNDED, FED)
    rows = [["largest difference", *columns]]
    for family in (*FAMILIES, UNKNOWN):
        found = [result.largest.get((family, column)) for column in columns]
        if any(value is not None for value in found):
            form = ".0f" if family in NUMBERS else ".1e"
            rows.append([family, *("" if value is None else f"{value:{form}}" for value in found)])
    console.print(PlainTable(rows))
    console.print(f"\nReplayed: {', '.join(result.replayed) or 'nothing'}.")
    for run, reason in result.skipped.items():
        console.print(f"Skipped {run}: {reason}.", markup=False)
    console.print(
        "Differences are absolute; of scores relative to the largest one, of the loss per token. The last lines of the table "
        "are counts. Where there is padding, outputs are compared at tokens: the released memory layer lets padding see "
        "padding, this package does not. For the last column the runs with float16 rows are replayed again while the "
        "recorded float32 keys and values are written, so that no rounding of a row can fall another way. That column and "
        f"the first must be within {TOLERANCE:g}, and make the figure below."
    )
    console.print(f"worst {result.worst:.3g} over {len(result.replayed)} runs")
