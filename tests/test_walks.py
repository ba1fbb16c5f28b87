"""How far a call walks through the code: files of the package that it runs through, and how often it goes to another one.

A long walk is a cost that no other test sees: who reads what happens in one forward pass opens every one of these files.
Each walk is one real call of a tiny model, after a first call that makes what is made once. A limit may only be lowered, or
raised with a reason in the change that does it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch
from tiny_models import save_tiny_backbone
from tiny_runs import make_files, make_trainer

import longmem
from longmem import LongMemForCausalLM, MemoryBank

PACKAGE = str(Path(longmem.__file__).parent)
# Files, and changes of file; None: not limited.
LIMITS = {
    "forward without memory": (5, 32),
    "forward with memory": (18, 70),
    "memorize to disk": (26, None),
    "open a bank": (30, None),
    "training step": (32, None),
}


class Walk(NamedTuple):
    """The files of the package whose functions ran, in the order in which they did."""

    steps: list[str]

    @property
    def files(self) -> list[str]:
        """Return the files, each once."""
        return sorted({step.removeprefix(PACKAGE) for step in self.steps})

    @property
    def changes(self) -> int:
        """Return how often a function of one file was followed by one of another."""
        return sum(one != other for one, other in zip(self.steps, self.steps[1:], strict=False))


def walk_of(call: Callable[[], Any]) -> Walk:
    """Return the walk of one call."""
    steps: list[str] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            steps.append(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return Walk(steps)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LongMemForCausalLM:
    backbone = save_tiny_backbone(tmp_path_factory.mktemp("backbone"))
    sizes = {"segment_length": 32, "num_retrieved_tokens": 8, "memory_distance": 8}
    return LongMemForCausalLM.from_backbone(str(backbone), **sizes).eval()


def forward(model: LongMemForCausalLM, with_memory: bool) -> Walk:
    ids = torch.arange(64)
    bank = MemoryBank.for_model(model)
    model.memorize(bank, ids, "document")
    options = {"memory": bank} if with_memory else {}
    with torch.no_grad():
        model(ids[None, :16], **options)
        return walk_of(lambda: model(ids[None, :16], **options))


def memorize_to_disk(model: LongMemForCausalLM, folder: Path) -> Walk:
    ids = torch.arange(64)
    with MemoryBank.for_model(model, folder=folder) as bank:
        model.memorize(bank, ids, "first")
        return walk_of(lambda: model.memorize(bank, ids, "second"))


def open_a_bank(model: LongMemForCausalLM, folder: Path) -> Walk:
    with MemoryBank.for_model(model, folder=folder) as bank:
        model.memorize(bank, torch.arange(64), "document")
    return walk_of(lambda: MemoryBank.open(folder, model, read_only=True).close())


def training_step(folder: Path) -> Walk:
    folder.mkdir()
    trainer = make_trainer(make_files(folder), optimization__steps=3)
    steps: list[Walk] = []
    step = trainer.train_step

    def watched(*arguments: Any, **options: Any) -> Any:
        found: list[Any] = []
        steps.append(walk_of(lambda: found.append(step(*arguments, **options))))
        return found[0]

    trainer.train_step = watched  # type: ignore[method-assign]
    trainer.run()
    return steps[-1]


def test_walks_stay_within_their_limits(model: LongMemForCausalLM, tmp_path: Path) -> None:
    walks = {
        "forward without memory": forward(model, with_memory=False),
        "forward with memory": forward(model, with_memory=True),
        "memorize to disk": memorize_to_disk(model, tmp_path / "bank"),
        "open a bank": open_a_bank(model, tmp_path / "opened"),
        "training step": training_step(tmp_path / "run"),
    }
    found = {name: (len(walk.files), walk.changes) for name, walk in walks.items()}
    too_long = {
        name: f"{found[name]}, at most {limit}: {', '.join(walks[name].files)}"
        for name, limit in LIMITS.items()
        if any(most is not None and count > most for count, most in zip(found[name], limit, strict=True))
    }
    assert not too_long, f"{too_long}\nall: {found}"


def test_a_walk_is_counted() -> None:
    from longmem.errors import did_you_mean
    from longmem.plugins import Setting

    setting = Setting(1, "a number", 0, 9)
    walk = walk_of(lambda: (setting.read("3"), did_you_mean("a", ["b"]), setting.read("4")))
    assert (walk.files, walk.changes) == (["/errors.py", "/plugins.py"], 2)
