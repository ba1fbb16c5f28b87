"""A writer that is trained along: how a run couples it, and which parameter groups its optimizer gets."""

from __future__ import annotations

from typing import Any

from torch import nn

from longmem.encoder.stamp import EncoderStamp
from longmem.errors import StaleMemoryError
from longmem.model.modeling import LongMemForCausalLM
from longmem.training.settings import OptimizationSettings, WriterSettings
from longmem.training.trainable import parameter_groups


def couple_writer(model: LongMemForCausalLM, wanted: WriterSettings, num_processes: int) -> dict[str, nn.Parameter]:
    """Return, by name, the parameters of the backbone that are trained: none unless the settings ask for it.

    Raises:
        ValueError: there are several processes, whose backbones would drift apart: the side network's gradients alone are
            averaged.
    """
    if not wanted.trained:
        return {}
    if num_processes > 1:
        raise ValueError(
            f"`writer.trained` needs a single process, got {num_processes}: each would train a backbone of its own; start one, "
            "or leave the backbone frozen."
        )
    return model.couple_writer(average=wanted.average)


def writer_groups(
    parameters: dict[str, nn.Parameter], wanted: WriterSettings, optimization: OptimizationSettings
) -> list[dict[str, Any]]:
    """Return optimizer groups of the writer's parameters: matrices with weight decay, vectors without."""
    return parameter_groups(
        parameters,
        learning_rate=wanted.backbone_learning_rate or optimization.learning_rate,
        gate_learning_rate=None,
        weight_decay=optimization.weight_decay,
    )


def refuse_moved_writer(model: LongMemForCausalLM, before: EncoderStamp) -> None:
    """Raise StaleMemoryError if a backbone that must not move is another encoder than before, by a hash of all its weights."""
    if model.writer is None and (now := model.encoder_stamp(exact=True)).digest != before.digest:
        raise StaleMemoryError(
            f"the backbone must not move in training, but its encoder was {before.digest} when the run began and is "
            f"{now.digest} now; they differ in {', '.join(before.diff(now))}. What this run has learned was read from memories "
            "that the backbone would not write again: leave its weights alone, or train it on purpose (`writer.trained`)."
        )
