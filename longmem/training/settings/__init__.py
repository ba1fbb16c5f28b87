"""What a training run is told: sections of settings, their YAML files, and the checks at the door."""

from longmem.settings import save_settings
from longmem.training.settings.checks import validate_settings
from longmem.training.settings.files import load_settings, refuse_changed_settings
from longmem.training.settings.sections import (
    DataSettings,
    OptimizationSettings,
    TrainingSettings,
    ValidationSettings,
)

__all__ = [
    "DataSettings",
    "OptimizationSettings",
    "TrainingSettings",
    "ValidationSettings",
    "load_settings",
    "refuse_changed_settings",
    "save_settings",
    "validate_settings",
]
