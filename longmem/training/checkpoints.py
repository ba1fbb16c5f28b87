"""Stopping a run between two steps, and its checkpoints: written whole or not at all, the newest whole one found again."""

import base64
import dataclasses
import json
import os
import random
import re
import signal
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from longmem import files
from longmem.model.saving import load_strictly
from longmem.settings import save_settings
from longmem.training.extension import Extension
from longmem.training.local_updates import SHARDED
from longmem.training.settings import TrainingSettings, refuse_changed_settings

PROGRESS, SETTINGS, WEIGHTS, OPTIMIZER = "progress.json", "config.yaml", "model.safetensors", "optimizer.safetensors"
TRUST = "LONGMEM_TRUST_CHECKPOINTS"


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a checkpoint is of.

    Args:
        side_network: as accelerate prepared it.
        optimizer: likewise.
        schedule: of the learning rate.
        settings: of the run.
        origin: fingerprints of what the run was made from and no checkpoint holds, by the settings that name it.
    """

    side_network: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    settings: TrainingSettings
    origin: Mapping[str, str]


class Checkpoints:
    """The checkpoints of a run: what is trained of the side network, optimizer, schedule, random states, steps, extensions.

    Neither backbone nor memory is in them: the backbone is named in the configuration, and memory is written anew from the
    text before the step, which gives the same numbers because the backbone is frozen. The newest `keep` of them stay in the
    run's folder; each extension has a folder of its own in every one, numbered in their order. They are safetensors and JSON
    with a digest of every file; one that is not whole is passed over for the one before it. Where processes hold parts of the
    network accelerate writes its own files, and reading those may run code in them: `LONGMEM_TRUST_CHECKPOINTS=1` allows it.
    """

    def __init__(self, folder: Path, keep: int, extensions: Sequence[Extension] = ()) -> None:
        self.folder, self.keep, self.extensions = folder / "checkpoints", keep, tuple(extensions)
        self.trained: Trained  # to be set before the first is saved or restored
        files.refuse_link(self.folder)
        self._found: int | None = None  # what `find` found: it reads all files
        self.last = 0  # step of the one that was restored or saved last

    def steps(self) -> list[int]:
        """Return the step numbers of the checkpoints that are there, whole or not, in order."""
        found = (re.fullmatch("step-(0|[1-9][0-9]{0,17})", path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)

    def find(self, accelerator: Accelerator) -> int:
        """Return the step of the newest whole checkpoint, 0 if there is none at all; warn of newer ones that are damaged.

        All processes call this. Raises ValueError if there are some and none is whole.
        """
        found: list[Any] = [0, ""]
        if accelerator.is_main_process:
            problems = []
            for step in reversed(self.steps()):
                try:
                    self._check(step)
                    found[0] = step
                    break
                except ValueError as error:
                    problems.append(str(error))
            if found[0]:
                for problem in problems:
                    warnings.warn(f"the run goes on from step {found[0]}, since of a newer one {problem}", stacklevel=2)
            elif problems:
                found[1] = problems[0]
        step, problem = broadcast_object_list(found)
        if problem:
            raise ValueError(
                f"no checkpoint in {self.folder} is whole, so the run can't go on: {problem} Restore one from a copy, or "
                "remove that folder to begin anew."
            )
        self._found = int(step)
        return self._found

    def refuse_changed_settings(self, settings: TrainingSettings, step: int) -> None:
        """Raise ValueError if the run of the checkpoint after `step` steps had other settings."""
        refuse_changed_settings(settings, self.folder / f"step-{step}" / SETTINGS)

    def save(self, accelerator: Accelerator, step: int) -> Path:
        """Write a checkpoint after `step` optimizer steps; all processes call this."""
        final, shards = self.folder / f"step-{step}", self.folder / f".shards-{step}"
        if self.last == step:
            return final
        is_main, is_sharded = accelerator.is_main_process, accelerator.distributed_type in SHARDED
        if is_sharded:
            if is_main:
                files.remove(shards)
                files.make_folder(shards)
            accelerator.wait_for_everyone()
            accelerator.save_state(str(shards))
        drawn = gather_object([random_states()])
        if is_main:
            if final.exists():  # and is damaged: the run went on from an older one
                files.remove(final)
            with files.new_folder(final) as draft:
                if is_sharded:
                    shards.rename(draft / "shards")
                else:
                    self._write_tensors(draft, accelerator)
                scaler = accelerator.scaler
                progress = {"step": step, "origin": dict(self.trained.origin), "random": drawn}
                progress["schedule"] = self.trained.schedule.state_dict()
                progress["scaler"] = None if scaler is None else scaler.state_dict()
                (draft / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
                save_settings(self.trained.settings, draft / SETTINGS)
                for number, extension in enumerate(self.extensions):
                    own = draft / f"extension-{number}"
                    own.mkdir()
                    extension.save(own)
                files.seal_folder(draft)
            # Newer ones are damaged, else the run had gone on from them: they don't count among those that are kept.
            for old in [each for each in self.steps() if each <= step][: -self.keep]:
                files.remove(self.folder / f"step-{old}")
        self.last = step
        accelerator.wait_for_everyone()
        return final

    def restore(self, accelerator: Accelerator) -> int:
        """Load the newest whole checkpoint; return its number of steps, 0 if there is none.

        Raises ValueError if none is whole, one does not fit the run, or the run was begun with other texts or weights.
        """
        step = self.find(accelerator) if self._found is None else self._found
        if not step:
            return 0
        folder = self.folder / f"step-{step}"
        try:
            progress = files.read_json(folder / PROGRESS)
            for name, now in self.trained.origin.items():
                if (before := progress["origin"].get(name)) != now:
                    raise ValueError(
                        f"a run goes on with what it began with, but what `{name}` names has changed: its fingerprint was "
                        f"{before} and is {now}; put it back, or give another `output`."
                    )
            if accelerator.distributed_type in SHARDED:
                if os.environ.get(TRUST) != "1":
                    raise ValueError(
                        f"going on with {accelerator.distributed_type.value} reads files of accelerate, which may run code in "
                        f"them; set {TRUST}=1 if {folder} is your own."
                    )
                accelerator.load_state(str(folder / "shards"), strict=False)  # frozen weights are not there
            else:
                self._read_tensors(folder, accelerator)
            self.trained.schedule.load_state_dict(progress["schedule"])
            if accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(progress["scaler"])
            set_random_states(progress["random"], accelerator.process_index)
            for number, extension in enumerate(self.extensions):
                extension.load(folder / f"extension-{number}")
        except (LookupError, TypeError, ArithmeticError, AttributeError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"the checkpoint {folder} is not one of this run: {type(error).__name__}, {error}."
            ) from error
        self.last = step
        return step

    def _check(self, step: int) -> None:
        """Raise ValueError unless every file of a checkpoint is as it was written."""
        folder = self.folder / f"step-{step}"
        files.check_folder(folder)
        if files.read_json(folder / PROGRESS).get("step") != step:
            raise ValueError(f"{folder} is not the checkpoint of step {step}.")

    def _write_tensors(self, folder: Path, accelerator: Accelerator) -> None:
        side_network, state = accelerator.unwrap_model(self.trained.side_network), self.trained.optimizer.state_dict()
        frozen = frozen_weights(side_network)
        weights = {name: each for name, each in side_network.state_dict().items() if name not in frozen}
        values = [(f"{number}.{name}", each) for number, own in state["state"].items() for name, each in own.items()]
        moments = {name: each for name, each in values if isinstance(each, Tensor)}
        plain = {name: each for name, each in values if not isinstance(each, Tensor)}
        about = {"about": json.dumps({"groups": state["param_groups"], "values": plain})}
        for name, tensors, metadata in ((WEIGHTS, weights, None), (OPTIMIZER, moments, about)):
            own = {key: each.detach().to("cpu", copy=True).contiguous() for key, each in tensors.items()}
            save_file(own, folder / name, metadata)

    def _read_tensors(self, folder: Path, accelerator: Accelerator) -> None:
        side_network = accelerator.unwrap_model(self.trained.side_network)
        weights = load_file(folder / WEIGHTS)
        load_strictly(side_network, weights, str(folder / WEIGHTS), optional=frozen_weights(side_network))
        with safe_open(folder / OPTIMIZER, "pt") as file:
            about = json.loads(file.metadata()["about"])
        state: dict[int, dict[str, Any]] = {}
        for name, value in {**load_file(folder / OPTIMIZER), **about["values"]}.items():
            number, _, kind = name.partition(".")
            state.setdefault(int(number), {})[kind] = value
        groups = [{**group, "betas": tuple(group["betas"])} for group in about["groups"]]
        self.trained.optimizer.load_state_dict({"state": state, "param_groups": groups})


def frozen_weights(module: nn.Module) -> set[str]:
    """Return the names of the weights that training leaves as they are."""
    return {name for name, weight in module.named_parameters() if not weight.requires_grad}


def random_states() -> dict[str, Any]:
    """Return the states of this process's random number generators, as JSON has them."""
    kind, numbers, *rest = np.random.get_state(legacy=True)  # noqa: NPY002  libraries draw from it
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(numbers).tolist(), *rest],
        "torch": [base64.b64encode(state.numpy().tobytes()).decode() for state in states],
    }


def set_random_states(states: Sequence[Mapping[str, Any]], process: int) -> None:
    """Put the generators into the states of one process; where there were fewer, they stay as they are."""
    if process >= len(states):
        return
    version, numbers, gauss = states[process]["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, words, *rest = states[process]["numpy"]
    np.random.set_state((kind, np.array(words, dtype=np.uint32), *rest))  # noqa: NPY002
    cpu, *others = (
        torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for text in states[process]["torch"]
    )
    torch.set_rng_state(cpu)
    if torch.cuda.is_available() and len(others) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(others)


class Interruption:
    """Notice SIGINT and SIGTERM inside a `with` block, without raising; the second SIGINT raises as usual.

    `max_minutes`: the time after which to stop, None for no limit.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.reason: str | None = None

    def __enter__(self) -> Self:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():  # signals are the main thread's business
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._noticed)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _noticed(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    @property
    def wanted(self) -> bool:
        """Return whether to stop before the next step."""
        if self.reason is None and self._deadline is not None and time.monotonic() > self._deadline:
            self.reason = "max_minutes"
        return self.reason is not None
