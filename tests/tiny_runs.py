"""Tiny training runs: a random backbone, a few documents of words in random order, settings that take seconds."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from tiny_models import save_tiny_backbone, some_text

from longmem.training import Extension, Trainer
from longmem.training.records import StepRecord
from longmem.training.settings import TrainingSettings, load_settings

CONFIG = """
output: {folder}/run
model:
  backbone: {folder}/backbone
  config: {{segment_length: 32, num_retrieved_tokens: 8, memory_distance: 8}}
data: {{train: {folder}/texts, validation: {folder}/texts, window: 16, lanes: 4, cache: {folder}/cache}}
memory: {{tokens: 64}}
optimization: {{steps: 6, learning_rate: 1e-3, warmup_steps: 2}}
validation: {{documents: 2, memory_tokens: 32, windows: 2}}
"""


def make_files(folder: Path, words: Sequence[int] = range(30, 86, 7)) -> Path:
    """Write backbone, texts of so many words and a configuration; return the configuration's path."""
    save_tiny_backbone(folder / "backbone")
    (folder / "texts").mkdir()
    for number, count in enumerate(words):
        (folder / "texts" / f"document-{number}.txt").write_text(some_text(count, seed=number))
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(folder=folder))
    return path


def settings_of(path: Path, kind: type[TrainingSettings] = TrainingSettings, **overrides: Any) -> TrainingSettings:
    """Return the settings of a configuration with overrides, written `section__key=value`."""
    return load_settings(path, [f"{name.replace('__', '.')}={value}" for name, value in overrides.items()], kind)


def make_trainer(
    path: Path,
    kind: type[TrainingSettings] = TrainingSettings,
    extensions: Sequence[Extension] = (),
    **overrides: Any,
) -> Trainer:
    """Return a run, as a new process would start it: accelerate keeps what it was told in its class."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Trainer(settings_of(path, kind, **overrides), extensions=extensions)


def run_for(trainer: Trainer, steps: int) -> Trainer:
    """Train as a run does that is told to stop after some steps."""
    train_step, done = trainer.train_step, []

    def stopping() -> StepRecord:
        done.append(train_step())
        if len(done) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return done[-1]

    trainer.train_step = stopping  # type: ignore[method-assign]
    trainer.run()
    return trainer


def trained_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return a copy of all weights of the side network."""
    return {name: weight.detach().clone() for name, weight in trainer.model.side_network.named_parameters()}


def without_times(records: Sequence[StepRecord]) -> list[dict[str, Any]]:
    """Return records without what a clock says, to be compared for equality."""
    return [
        {name: value for name, value in vars(record).items() if name not in ("seconds", "tokens_per_second")}
        for record in records
    ]
