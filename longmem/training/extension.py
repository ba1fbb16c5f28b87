"""Extensions of a training run: code of one's own that is called at a few moments of the loop."""

from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from rich.console import Console

from longmem.model.modeling import LongMemForCausalLM
from longmem.training.lane_memory import LaneMemories
from longmem.training.settings import TrainingSettings


class Run(Protocol):
    """What an extension may use of a run; a `Trainer` is one."""

    settings: TrainingSettings
    model: LongMemForCausalLM
    accelerator: Accelerator
    console: Console
    memories: LaneMemories
    step: int  # optimizer steps done


class Extension:
    """Something that a run does beside training the side network, such as logging elsewhere or training something more.

    Subclass it, override the moments that you need, and give an object of your class to `Trainer(extensions=[...])`. Here
    each moment does nothing.
    """

    def start(self, run: Run) -> None:
        """Be told of the run when its settings, model, accelerator and console are there; the rest is made next."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return further groups for AdamW, which are clipped and follow the schedule like those of the side network."""
        return []

    def bank_options(self) -> dict[str, Any]:
        """Return settings of the lanes' memories, as `MemoryBank.for_model` takes them, such as `refresh`."""
        return {}

    def after_step(self) -> None:
        """Be told that an optimizer step is done; `run.step` counts it."""

    def save(self, folder: Path) -> None:
        """Write to a checkpoint, into an empty folder of this extension's own; the first process alone does."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, when a run goes on; side network and optimizer have been restored."""
