"""A whole evaluation in one file: which colour a box has, told once, and then much else.

python docs/examples/new_evaluation.py results/boxes
"""

import dataclasses
import random
import sys

from rich.console import Console

from longmem.evaluation.runner import evaluate
from longmem.evaluation.settings import EvaluationSettings
from longmem.evaluation.task import Axis, Case, Item, Measure, Task, best, per_token

COLOURS = ("red", "blue", "green", "white", "black")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoxSettings(EvaluationSettings):
    """What can be set, beside what every evaluation can set."""

    distances: tuple[int, ...] = (100, 400)
    """Sentences between the fact and the question."""


class Boxes(Task):
    """The colour of a box, told far back; every system is asked the same."""

    name, title, kind = "boxes", "colours of boxes", BoxSettings
    axes = (Axis("distance"),)  # a column of the table and the x axis of the figure
    measures = {"accuracy": Measure("accuracy", has_chance=True)}

    def cases(self, model):
        """Return a case for each box and distance: what is in memory, and what is asked."""
        draw, encode = random.Random(self.settings.seed), lambda text: model.tokenizer(text)["input_ids"]
        return [self.case(box, distance, draw, encode) for distance in self.settings.distances for box in range(8)]

    def case(self, box, distance, draw, encode):
        """Return one case; `about` goes into the records, where `score` finds it."""
        right = draw.randrange(len(COLOURS))
        filler = "".join(f" Ship {draw.randrange(1000)} sailed on." for _ in range(distance))
        story = encode(f"Box {box} is {COLOURS[right]}.{filler}")
        candidates = [encode(f" {colour}.") for colour in COLOURS]
        item = Item(token_ids=encode(f" Box {box} is"), candidates=candidates, about={"right": right})
        return Case(name=f"{box}/{distance}", group=str(box), memory=[story], items=[item], axes={"distance": distance})

    def score(self, record):
        """Return whether the right colour is the likeliest one, from the record alone."""
        return {"accuracy": float(best(per_token(record)) == record["right"])}


if __name__ == "__main__":
    evaluate(Boxes(BoxSettings(output=sys.argv[1])), Console())
