"""Training of the side network; the backbone never changes."""

from longmem.training.loop import Trainer
from longmem.training.records import StepRecord, ValidationRecord, read_log
from longmem.training.settings import TrainingSettings, load_settings

__all__ = ["StepRecord", "Trainer", "TrainingSettings", "ValidationRecord", "load_settings", "read_log"]
