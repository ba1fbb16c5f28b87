"""Training of the side network; the backbone never changes."""

from longmem.training.adaptation import AdaptationStep, adapt, adaptable_parameters

__all__ = ["AdaptationStep", "adapt", "adaptable_parameters"]
