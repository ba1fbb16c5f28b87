"""Stopping a run between two steps, and its checkpoints: written whole or not at all, the newest found again."""

import json
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Self

from accelerate import Accelerator
from torch import Tensor, nn

from longmem.training.extension import Extension


def leave_frozen_out(models: Sequence[nn.Module], weights: Sequence[dict[str, Tensor]], folder: str) -> None:
    """Take out of the weights that accelerate is about to save those that training leaves as they are."""
    for model, state in zip(models, weights, strict=False):  # FSDP writes its own files, and lists no weights
        for name, weight in model.named_parameters():
            if not weight.requires_grad:
                state.pop(name, None)


class Checkpoints:
    """The checkpoints of a run: what is trained of the side network, optimizer, schedule, random states, steps, extensions.

    Neither backbone nor memory is in them: the backbone is named in the configuration, and memory is written anew from the
    text before the step, which gives the same numbers because the backbone is frozen. The newest `keep` of them stay in the
    run's folder; each extension has a folder of its own in every one, numbered in their order.
    """

    def __init__(self, folder: Path, keep: int, extensions: Sequence[Extension] = ()) -> None:
        self.folder, self.keep, self.extensions = folder / "checkpoints", keep, tuple(extensions)

    def steps(self) -> list[int]:
        """Return the step numbers of whole checkpoints, in order."""
        found = (path.name.removeprefix("step-") for path in self.folder.glob("step-*"))
        return sorted(int(number) for number in found if number.isdigit())

    def save(self, accelerator: Accelerator, step: int) -> Path:
        """Write a checkpoint after `step` optimizer steps; all processes call this."""
        temporary, final = self.folder / f"writing-{step}", self.folder / f"step-{step}"
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for number, extension in enumerate(self.extensions):
                own = temporary / f"extension-{number}"
                own.mkdir()
                extension.save(own)
            (temporary / "progress.json").write_text(json.dumps({"step": step}), encoding="utf-8")
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.folder / f"step-{old}")
        accelerator.wait_for_everyone()
        return final

    def restore(self, accelerator: Accelerator) -> int:
        """Load the newest checkpoint; return its number of steps, 0 if there is none."""
        steps = self.steps()
        if not steps:
            return 0
        folder = self.folder / f"step-{steps[-1]}"
        accelerator.load_state(str(folder), strict=False)  # frozen weights are not there
        for number, extension in enumerate(self.extensions):
            extension.load(folder / f"extension-{number}")
        return int(json.loads((folder / "progress.json").read_text(encoding="utf-8"))["step"])


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
