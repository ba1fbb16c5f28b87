"""Training runs with a writer that is trained along: their settings, and the extension that couples it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

from safetensors.torch import load_file, save_file

from experiments.coupled_writer.writer import CoupledWriter, couple
from longmem.memory import MemoryBank
from longmem.memory.refresh import UNBOUNDED, make_policy
from longmem.settings import Above, Below
from longmem.training.extension import Extension, Run
from longmem.training.settings import TrainingSettings


@dataclasses.dataclass(frozen=True)
class WriterSettings:
    """How the backbone is trained: every parameter that hidden states and logits depend on, by the reader's loss.

    Lanes' memories hold what the backbone of the step computed that wrote them, and grow old; `backbone_loss` in the log is
    that of the moving backbone. The trained backbone is saved beside the side network.
    """

    backbone_learning_rate: Annotated[float, Above(0)] | None = None
    """Highest learning rate of the backbone, on the same schedule; None: `optimization.learning_rate`."""

    average: Annotated[float, Above(0), Below(1)] | None = None
    """Decay of an exponential moving average of the backbone that writes memory in its stead, which slows staleness down and
    costs a second forward pass (MoCo, arXiv 1911.05722: 0.999); None: the trained backbone writes. Checkpoints hold the
    average, the saved model does not: what it memorizes is written by its trained backbone."""

    refresh: str | None = None
    """Refresh policy of the lanes' memories, such as `bounded:max_lag=4` or `eager`, which encode again what is older than so
    many optimizer steps, or than the last; None: all is read as it is, however old, as in Memorizing Transformers."""

    def __post_init__(self) -> None:
        """Check the name of the policy."""
        if self.refresh is not None:
            try:
                make_policy(self.refresh)
            except ValueError as error:
                raise ValueError(f"`writer.refresh`: {error}") from error


@dataclasses.dataclass(frozen=True)
class CoupledSettings(TrainingSettings):
    """The settings of a training run, and a section on its writer."""

    writer: WriterSettings = WriterSettings()

    def __post_init__(self) -> None:
        """Refuse what a backbone that moves makes wrong."""
        if self.features.folder is not None:
            raise ValueError(
                "`features.folder` must be left out where the writer is trained, because features change with the backbone, "
                f"got {self.features.folder!r}."
            )
        if self.features.ahead:
            raise ValueError(
                "`features.ahead` must be 0 where the writer is trained, because what an earlier backbone computed gives the "
                f"present one no gradient, got {self.features.ahead}."
            )
        if self.model.backbone_dtype != "float32":
            raise ValueError(
                "`model.backbone_dtype` must be float32 where the writer is trained, because small updates are lost in half "
                f"precision, got {self.model.backbone_dtype!r}; `optimization.mixed_precision` may still be bf16."
            )


class Coupling(Extension):
    """The extension of a run with `CoupledSettings` that trains the backbone along and keeps all that it makes stale.

    Checkpoints hold the backbone, its average and the lanes' memories: what an earlier backbone wrote, no later one would
    write again.
    """

    run: Run
    writer: CoupledWriter

    @property
    def settings(self) -> CoupledSettings:
        """Return the settings of the run.

        Raises:
            ValueError: they have no section on the writer.
        """
        settings = self.run.settings
        if not isinstance(settings, CoupledSettings):
            raise ValueError(
                f"`settings` must be CoupledSettings to couple the writer, got {type(settings).__name__}; read them with "
                "`load_settings(path, kind=CoupledSettings)`."
            )
        return settings

    def start(self, run: Run) -> None:
        """Couple the writer.

        Raises:
            ValueError: the settings are of another kind, or there are several processes, whose backbones would drift apart:
                the gradients of the side network alone are averaged.
        """
        self.run = run
        average = self.settings.writer.average
        if run.accelerator.num_processes > 1:
            raise ValueError(
                f"a coupled writer needs a single process, got {run.accelerator.num_processes}: each would train a backbone of "
                "its own; start one, or leave the backbone frozen."
            )
        self.writer = couple(run.model, average=average)
        writes = "its moving average writes memory" if average else "it writes memory"
        run.console.print(f"The backbone is trained too, and {writes}: what is in memory goes stale.", highlight=False)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return groups of the writer's parameters: matrices with weight decay, vectors without."""
        rate = self.settings.writer.backbone_learning_rate or self.settings.optimization.learning_rate
        parameters, decay = self.writer.parameters.values(), self.settings.optimization.weight_decay
        groups = [
            {"params": [each for each in parameters if each.ndim > 1], "lr": rate, "weight_decay": decay},
            {"params": [each for each in parameters if each.ndim <= 1], "lr": rate, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def bank_options(self) -> dict[str, Any]:
        """Return the refresh policy of the lanes' memories."""
        return {"refresh": self.settings.writer.refresh or UNBOUNDED}

    def after_step(self) -> None:
        """Count the move."""
        self.writer.moved()

    def save(self, folder: Path) -> None:
        """Write the writer and the lanes' memories."""
        save_file(
            {name: each.contiguous() for name, each in self.writer.tensors().items()}, folder / "writer.safetensors"
        )
        (folder / "writer.json").write_text(json.dumps(self.writer.numbers()), encoding="utf-8")
        for lane, bank in enumerate(self.run.memories.banks):
            bank.save(folder / f"lane-{lane}")

    def load(self, folder: Path) -> None:
        """Restore the writer, then the memories that it wrote."""
        numbers = json.loads((folder / "writer.json").read_text(encoding="utf-8"))
        self.writer.restore(load_file(folder / "writer.safetensors"), numbers)
        memories, device = self.run.memories, self.run.model.input_device
        lanes = range(len(memories.banks))
        memories.banks = [MemoryBank.load(folder / f"lane-{lane}", device=device) for lane in lanes]
        memories.capacity = memories.banks[0].capacity_tokens or 0
