"""Training of the side network; the backbone never changes.

From a script, what `longmem train` does on a command line:

    settings = load_settings("longmem/training/configs/python-manual.yaml", ["output=runs/mine", "optimization.steps=200"])
    records = Trainer(settings, rich.console.Console()).run()  # goes on if `output` holds a checkpoint
    losses = [record.loss for record in read_log("runs/mine").steps]  # also of what ran before
    model = LongMemForCausalLM.from_pretrained("runs/mine/side-network")
"""

from longmem.training.extension import Extension
from longmem.training.loop import Trainer
from longmem.training.records import StepRecord, ValidationRecord, read_log
from longmem.training.settings import TrainingSettings, load_settings

__all__ = ["Extension", "StepRecord", "Trainer", "TrainingSettings", "ValidationRecord", "load_settings", "read_log"]
