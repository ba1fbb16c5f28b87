"""What settings must be together, checked once, before anything is loaded."""

from __future__ import annotations

import dataclasses

from transformers import PreTrainedConfig

from longmem.configuration import LongMemConfig
from longmem.errors import did_you_mean
from longmem.memory.index.kinds import validate_index
from longmem.settings import read_section
from longmem.training.settings.sections import TrainingSettings

# These are the backbone's: `model.backbone` names it.
NOT_FOR_CONFIG = ("backbone_name_or_path", "backbone_config")


def validate_settings(settings: TrainingSettings) -> None:
    """Raise ValueError for the first value of another type or out of its range, and for values that contradict another.

    A setting that would be ignored is an error as well. What depends on the backbone is checked when it is loaded.
    """
    if not isinstance(settings, TrainingSettings):
        raise ValueError(
            f"`settings` must be TrainingSettings, got {type(settings).__name__}; `load_settings` reads them from a file."
        )
    read_section(type(settings), dataclasses.asdict(settings))
    _validate_model_config(settings)
    _validate_data(settings)
    _validate_memory(settings)
    _validate_loss(settings)
    _validate_length(settings)
    _validate_exchange(settings)
    if settings.features.max_gigabytes is not None and settings.features.folder is None:
        raise ValueError(
            f"`features.max_gigabytes` needs `features.folder`, got {settings.features.max_gigabytes} without a folder; "
            "name one, or leave it out."
        )


def config_fields() -> list[str]:
    """Return the names that `model.config` may have: fields of `LongMemConfig` of its own."""
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own = (field.name for field in dataclasses.fields(LongMemConfig))
    return [name for name in own if name not in inherited and name not in NOT_FOR_CONFIG]


def _validate_model_config(settings: TrainingSettings) -> None:
    known = config_fields()
    for name in settings.model.config:
        if name in NOT_FOR_CONFIG:
            raise ValueError(f"`model.config.{name}` must be left out: `model.backbone` names the backbone.")
        if name not in known:
            raise ValueError(
                f"`model.config.{name}` is not a field of LongMemConfig.{did_you_mean(str(name), known)} Fields are "
                "listed in its docstring."
            )


def _validate_data(settings: TrainingSettings) -> None:
    data = settings.data
    if data.lanes % data.lanes_per_document:
        raise ValueError(
            f"`data.lanes` must be a multiple of `data.lanes_per_document`, got {data.lanes} and "
            f"{data.lanes_per_document}; {data.lanes_per_document * -(-data.lanes // data.lanes_per_document)} would do."
        )
    if data.validation is None:
        for name, value in (
            ("data.max_validation_tokens", data.max_validation_tokens),
            ("validation.every_steps", settings.validation.every_steps),
        ):
            if value:
                raise ValueError(
                    f"`{name}` needs `data.validation`, got {value} without a text to validate on; name one, or leave "
                    f"`{name}` out."
                )


def _validate_memory(settings: TrainingSettings) -> None:
    memory = settings.memory
    try:
        validate_index(memory.index)
    except ValueError as error:
        raise ValueError(f"`memory.index`: {error}") from error
    if (memory.start_tokens is None) != (memory.growth_steps == 0):
        raise ValueError(
            "`memory.start_tokens` and `memory.growth_steps` must be given together, got "
            f"{memory.start_tokens} and {memory.growth_steps}; leave out both for {memory.tokens:,} tokens from the start."
        )
    if memory.start_tokens is not None and memory.start_tokens > memory.tokens:
        raise ValueError(
            f"`memory.start_tokens` must be at most `memory.tokens`, got {memory.start_tokens} and {memory.tokens}; a "
            "memory grows."
        )
    if memory.foreign_lanes >= settings.data.lanes:
        raise ValueError(
            f"`memory.foreign_lanes` must be below `data.lanes`, got {memory.foreign_lanes} and {settings.data.lanes}; "
            f"a lane has {settings.data.lanes - 1} others."
        )
    if not memory.enabled and (memory.foreign_lanes or memory.growth_steps):
        raise ValueError(
            "`memory.foreign_lanes` and `memory.growth_steps` must be 0 where `memory.enabled` is false, got "
            f"{memory.foreign_lanes} and {memory.growth_steps}; nothing is read there."
        )


def _validate_loss(settings: TrainingSettings) -> None:
    loss, window = settings.loss, settings.data.window
    if loss.long_context_weight and loss.long_context_tokens <= window:
        raise ValueError(
            f"`loss.long_context_tokens` must be more than `data.window`, got {loss.long_context_tokens} and {window}; "
            f"{2 * window} would do."
        )


def _validate_length(settings: TrainingSettings) -> None:
    optimization = settings.optimization
    if (optimization.steps is None) == (optimization.epochs is None):
        raise ValueError(
            "Exactly one of `optimization.steps` and `optimization.epochs` must be given, got "
            f"{optimization.steps} and {optimization.epochs}; set the other to null."
        )
    if optimization.steps is not None and optimization.warmup_steps >= optimization.steps:
        raise ValueError(
            "`optimization.warmup_steps` must be below `optimization.steps`, so that the learning rate is reached, got "
            f"{optimization.warmup_steps} and {optimization.steps}; {optimization.steps // 10} would do."
        )


def _validate_exchange(settings: TrainingSettings) -> None:
    every = settings.exchange.every_steps
    if not every:
        return
    if settings.optimization.mixed_precision == "fp16":
        raise ValueError(
            f"`exchange.every_steps` must be 0 with `optimization.mixed_precision: fp16`, got {every}: each process would "
            "scale its losses, and skip steps, in its own way; bf16 needs no such scale."
        )
    for name, value in (
        ("checkpoints.every_steps", settings.checkpoints.every_steps),
        ("validation.every_steps", settings.validation.every_steps),
    ):
        if value % every:
            raise ValueError(
                f"`{name}` must be a multiple of `exchange.every_steps`, got {value} and {every}: in between, every process "
                f"has a side network of its own; {value + -value % every} would do."
            )
