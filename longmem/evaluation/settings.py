"""Settings that all evaluations share; each task adds its own."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from longmem.configuration import LongMemConfig
from longmem.evaluation.systems.making import validate_systems
from longmem.model.modeling import LongMemForCausalLM
from longmem.model.opening import open_model
from longmem.settings import From, read_settings
from longmem.settings.environment import chosen_device

Count = Annotated[int, From(1)]
Number = Annotated[int, From(0)]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is evaluated, and where the results go."""

    output: str
    """Folder for everything that the run writes. A run that was stopped goes on with the same settings."""

    model: str = "smollm2-135m"
    """Folder of a saved LongMem model; or packaged name, hub name or folder of a causal LM, which gets a new side network
    unless a trained one comes with the package."""

    dtype: Dtype | None = None
    """Of backbone and side network; None: as they were saved."""

    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `LongMemConfig` for a new, untrained side network; with any, none that was trained is opened. Only
    `num_neighbours`, by itself, leaves a trained one."""

    systems: tuple[str, ...] = ("backbone", "context-4096", "bm25", "off", "on", "wrong")
    """What is compared, in the order of the tables: backbone, context-N (N tokens in its window), bm25, hidden, off, on,
    wrong."""

    window: Annotated[int, From(2)] = 1024
    """Tokens that all systems but context-N see at once."""

    batch_size: Count = 16
    """Rows that are run at once."""

    limit: Count | None = None
    """Score so many items at most, spread evenly over all of them, for an estimate with its interval; None: all."""

    seed: Number = 0
    """Of whatever is drawn, and of the intervals."""

    def __post_init__(self) -> None:
        """Check the systems, and that no list has a value twice, or none where it has some by default."""
        validate_systems(self.systems)
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            if isinstance(values, list | tuple):
                is_empty = not values and field.default != ()
                if is_empty or any(values.count(each) > 1 for each in values):
                    raise ValueError(f"`{field.name}` must be at least one, and none twice, got {list(values)}.")

    @property
    def model_title(self) -> str:
        """Return what the model is called in titles."""
        return Path(self.model).name + (", new side network" if self.config else "")


Settings = TypeVar("Settings")


def load_evaluation(kind: type[Settings], path: str | Path | None, overrides: Sequence[str] = ()) -> Settings:
    """Return the settings in a YAML file (None: the defaults of `kind`), changed and checked; ValueError says what is wrong."""
    own = [field.name for field in dataclasses.fields(LongMemConfig)]
    is_free = "config" in kind.__dataclass_fields__  # type: ignore[attr-defined]  # what opens no model has none
    return read_settings(kind, path, overrides, free={"config": own} if is_free else None)


def open_evaluated(settings: EvaluationSettings) -> LongMemForCausalLM:
    """Return the model that is evaluated, on the GPU where there is one, in eval mode."""
    model = open_model(settings.model, dtype=settings.dtype, **settings.config)
    return model.to(chosen_device())  # type: ignore[arg-type]
