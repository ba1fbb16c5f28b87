"""A program whose system calls fail while it saves streams, models, checkpoints and evaluations; `failing_calls` is preloaded.

It reads lines of JSON, [name of a writer, faults]. A fault is the first call that fails, counted from 1, the number of its
error, and how many calls fail from there on. The answer to a line is a list: for each fault the call that failed, whether
anything was raised, and all that was not as it must be.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Protocol

import torch
from failing_calls import FailingCalls
from model.conftest import SETTINGS, build_backbone
from tiny_runs import make_files, make_trainer

from longmem import LongMemForCausalLM, MemoryBank
from longmem.evaluation import folder as evaluation_folder
from longmem.evaluation.folder import RunFolder
from longmem.files import current
from longmem.model.saving import load_side_network
from longmem.streaming import MemoryStream
from longmem.training.checkpoints import Checkpoints


class Writer(Protocol):
    """Something that is saved over what was saved before."""

    allowed: set[Hashable]  # what a folder may hold after a save that failed; `done`: after one that did not
    done: Hashable

    def start(self, folder: Path) -> None: ...
    def write(self, folder: Path) -> None: ...
    def found(self, folder: Path) -> Hashable: ...
    def held(self) -> Hashable:
        """Return what the object in memory holds, which no save changes."""
        ...


class StreamWriter:
    def __init__(self) -> None:
        self.model = LongMemForCausalLM.from_backbone(build_backbone("llama"), **SETTINGS).eval()
        self.stream = self.model.stream(MemoryBank.for_model(self.model))
        self.tokens = torch.arange(80) % 97
        self.stream.read(self.tokens[:60])
        self.allowed, self.done = {60, 80}, 80

    def start(self, folder: Path) -> None:
        self.stream.save(folder)
        self.stream.read(self.tokens[60:])

    def write(self, folder: Path) -> None:
        self.stream.save(folder)

    def found(self, folder: Path) -> Hashable:
        stream = MemoryStream.load(folder, self.model)
        held = torch.cat([stream.memory.token_ids("stream"), stream.local_ids])
        assert torch.equal(held, self.tokens[: len(held)])
        return len(held)

    def held(self) -> Hashable:
        return self.stream.num_tokens, tuple(self.stream.local_ids.tolist()), self.stream.memory.version


class ModelWriter:
    def __init__(self) -> None:
        self.model = LongMemForCausalLM.from_backbone(build_backbone("llama"), **SETTINGS).eval()
        self.twin = copy.deepcopy(self.model.side_network)
        self.allowed, self.done = {0.0, 1.0}, 1.0
        self._set(0.0)

    def _set(self, value: float) -> None:
        with torch.no_grad():
            for weight in self.model.side_network.parameters():
                weight.fill_(value)

    def start(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self._set(1.0)

    def write(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def found(self, folder: Path) -> Hashable:
        load_side_network(self.twin, current(folder))  # as `from_pretrained` finds it
        (value,) = {each for weight in self.twin.trained_parameters().values() for each in weight.unique().tolist()}
        return value

    def held(self) -> Hashable:
        return sum(float(weight.sum()) for weight in self.model.side_network.parameters())


class CheckpointWriter:
    def __init__(self, place: Path) -> None:
        options = {"data__validation": "null", "optimization__steps": 1, "optimization__warmup_steps": 0}
        self.trainer = make_trainer(make_files(place), **options)
        self.trainer.run()
        self.allowed, self.done = {1, 2}, 2
        self.checkpoints = Checkpoints(place, 1)

    def start(self, folder: Path) -> None:
        shutil.copytree(self.trainer.folder / "checkpoints", folder / "checkpoints")

    def write(self, folder: Path) -> None:
        self.checkpoints = Checkpoints(folder, 1)
        self.checkpoints.trained = self.trainer.checkpoints.trained
        self.checkpoints.save(self.trainer.accelerator, 2)

    def found(self, folder: Path) -> Hashable:
        step = Checkpoints(folder, 1).find(self.trainer.accelerator)
        return json.loads((folder / "checkpoints" / f"step-{step}" / "progress.json").read_text())["step"]

    def held(self) -> Hashable:
        return self.trainer.step


class EvaluationWriter:
    def __init__(self) -> None:
        evaluation_folder.environment = dict  # type: ignore[assignment]
        # Answers, and whether metrics stand beside them.
        self.allowed, self.done = {(2, False), (3, False), (3, True)}, (3, True)

    def start(self, folder: Path) -> None:
        RunFolder(folder, {"a": 1}).write([{"id": "0"}, {"id": "1"}])

    def write(self, folder: Path) -> None:
        with RunFolder(folder, {"a": 1}) as run:
            if "2" not in run:
                run.write([{"id": "2", "text": "x" * 10_000}])
            run.finish(title="title", metrics={"answers": 3}, table="| |", seed=0)

    def found(self, folder: Path) -> Hashable:
        records = RunFolder(folder, {"a": 1}).records
        assert [each["id"] for each in records] == [str(number) for number in range(len(records))]
        place = current(folder)
        names = {name for name in ("metrics.json", "table.md", "environment.json") if (place / name).exists()}
        assert len(names) in (0, 3), names
        return len(records), bool(names) and json.loads((place / "metrics.json").read_text()) == {"answers": 3}

    def held(self) -> Hashable:
        return None


def fail(writer: Writer, start: Path, place: Path, calls: FailingCalls, fault: tuple[int, int, int]) -> dict[str, Any]:
    """Save with calls that fail; return what came of it."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(start, place / "saved")
    held, wrong, error = writer.held(), [], None
    try:
        with calls.failing(*fault):
            writer.write(place / "saved")
    except Exception as raised:
        error = raised
        if not isinstance(raised, OSError | ValueError):
            wrong.append(f"{type(raised).__name__}: {raised}")
    try:
        found = writer.found(place / "saved")
        if found not in (writer.allowed if error else {writer.done}):
            wrong.append(f"it holds {found}, after {error!r}")
        if writer.held() != held:
            wrong.append("the object has changed")
        writer.write(place / "saved")
        if writer.found(place / "saved") != writer.done:
            wrong.append("the next save did not save")
    except Exception as lost:
        wrong.append(f"lost: {type(lost).__name__}: {lost}")
    return {"call": calls.name, "raised": error is not None, "wrong": wrong}


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(True)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name).resolve()
        makers = {
            "stream": StreamWriter,
            "model": ModelWriter,
            "checkpoint": lambda: CheckpointWriter(root),
            "evaluation": EvaluationWriter,
        }
        writers: dict[str, Writer] = {}
        calls = FailingCalls(root / "watched")
        for line in sys.stdin:
            kind, faults = json.loads(line)
            start = root / f"start-{kind}"
            if kind not in writers:
                writers[kind] = makers[kind]()
                writers[kind].start(start)
            print(
                json.dumps([fail(writers[kind], start, root / "watched", calls, fault) for fault in faults]), flush=True
            )


if __name__ == "__main__":
    main()
