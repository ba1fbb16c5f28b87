"""Tiny training runs: a random backbone, a few documents of words in random order, settings that take seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_models import save_tiny_backbone, some_text

from longmem.training.settings import TrainingSettings, load_settings

WINDOW = 16
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


def make_files(folder: Path, num_documents: int = 8) -> Path:
    """Write backbone, texts of different lengths and a configuration; return the configuration's path."""
    save_tiny_backbone(folder / "backbone")
    (folder / "texts").mkdir()
    for number in range(num_documents):
        (folder / "texts" / f"document-{number}.txt").write_text(some_text(30 + 7 * number, seed=number))
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(folder=folder))
    return path


def settings_of(path: Path, **overrides: Any) -> TrainingSettings:
    """Return the settings of a configuration with overrides, written `section__key=value`."""
    return load_settings(path, [f"{name.replace('__', '.')}={value}" for name, value in overrides.items()])
