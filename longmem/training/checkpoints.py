"""Checkpoints of a run: written whole or not at all, the last few kept, the newest found again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from accelerate import Accelerator

from longmem.training.lane_memory import LaneMemories


class Checkpoints:
    """Return the checkpoints of a run: side network, optimizer, schedule, random states and number of steps done.

    Neither backbone nor memory is in them: the backbone is named in the configuration, and memory is written anew from the
    text before the step, which gives the same numbers because the backbone is frozen. Where it is trained, both are in them:
    what an earlier backbone wrote, no later one would write again.

    Args:
        folder: of the run.
        keep: so many checkpoints stay, the newest.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder / "checkpoints", keep
        self.memories: LaneMemories | None = None  # to be saved as well

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
            if self.memories is not None:
                self.memories.save(temporary / "memories")
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
        accelerator.load_state(str(folder))
        if self.memories is not None:
            self.memories.load(folder / "memories")
        return int(json.loads((folder / "progress.json").read_text(encoding="utf-8"))["step"])
