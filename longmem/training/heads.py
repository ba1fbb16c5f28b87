"""Memory heads: which key-value heads of a backbone look back far, learned in minutes on any text.

Retrieval is a circuit of several heads, so they are chosen together: memory biases and null slots are trained on texts with
hidden facts and questions (`longmem/data/recall.py`), beside memories that do not fit, while every bias is pulled down at a
constant rate. Heads whose gradient does not hold against the pull help nothing and are left out; what remains is trained
without it. Each head learns the distance, too, at which what it finds seems to stand. (DuoAttention, arXiv 2410.10819, finds
heads by gates with a penalty in a like way.)
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from rich.console import Console

from longmem.backbone.structure import UnsupportedBackboneError
from longmem.memory.checks import checked, got
from longmem.model.modeling import LongMemForCausalLM
from longmem.model.side_network import OF_MEMORY, SideLayer
from longmem.settings import Above, Below, From, read_section
from longmem.training.extension import Extension, Run
from longmem.training.loop import Trainer
from longmem.training.settings import (
    DataSettings,
    MemorySettings,
    ModelSettings,
    OptimizationSettings,
    TrainingSettings,
)
from longmem.training.setup import side_layers

RATE = 0.2  # of biases and null slots; it falls to 0
RATE_AFTER_CHOICE = 0.1
START_BIAS, START_NULL = -1.0, 4.0
START_DISTANCE = 256  # tokens; heads go to 60 and to 600 from there
FIRST_SHARE = 2 / 15  # of the stack: layers below look at their neighbours


@dataclasses.dataclass(frozen=True)
class HeadSettings:
    """How memory heads are looked for.

    Args:
        steps: optimizer steps in which all candidates read; half as many follow in which the chosen ones do.
        pull: constant rate at which biases fall, as a share of the learning rate; more of it leaves fewer heads.
        allowed_fall: a head stays whose bias has fallen by no more, in nats, against the pull.
        memory_tokens: tokens in memory, of the text itself and as many of another one.
        window: tokens that are read beside them, in this search.
        segment_length: tokens of one window of text, in which the model that is returned encodes.
        chunk_size: tokens that are read together; a chunk is found by the best of them.
        num_retrieved_tokens: tokens that each head reads.
        recall_share: of the text that is questions about hidden facts.
        lora_rank: of the adapters of the model that is returned, which start without effect.
        dtype: of the backbone while it is looked at and afterwards.
        seed: of order and facts.
    """

    steps: Annotated[int, From(1)] = 40
    pull: Annotated[float, Above(0)] = 0.3
    allowed_fall: Annotated[float, From(0)] = 0.0
    memory_tokens: Annotated[int, From(1)] = 4096
    window: Annotated[int, From(1)] = 1024
    segment_length: Annotated[int, From(1)] = 1024
    chunk_size: Annotated[int, From(1)] = 4
    num_retrieved_tokens: Annotated[int, From(1)] = 32
    recall_share: Annotated[float, From(0), Below(1)] = 0.3
    lora_rank: Annotated[int, From(1)] = 16
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 0


def validate_call(texts: object, settings: object, console: object) -> None:
    """Raise ValueError for arguments of `calibrate_heads` with which it could not begin."""
    are_texts = isinstance(texts, str | Path) or (
        isinstance(texts, Sequence) and len(texts) > 1 and all(isinstance(each, str) and each.strip() for each in texts)
    )
    if not are_texts or not str(texts).strip():
        raise ValueError(
            f"`texts` must be the name of a source of texts, or a list of at least two, none of them blank, got {got(texts)}; "
            "documents of several thousand tokens are best."
        )
    if not isinstance(settings, HeadSettings):
        raise ValueError(f"`settings` must be a HeadSettings, got {got(settings)}; leave it out for the defaults.")
    try:
        read_section(HeadSettings, dataclasses.asdict(settings))  # types and ranges
    except ValueError as error:
        raise ValueError(f"`settings` must keep the ranges of HeadSettings: {error}") from error
    if not isinstance(console, Console | None):
        raise ValueError(f"`console` must be a Console of rich, got {got(console)}; leave it out to hear nothing.")


class PullDown(Extension):
    """An extension of training that lowers every memory bias a little after every step, at a share of the learning rate."""

    def __init__(self, pull: float) -> None:
        self.pull = pull

    def start(self, run: Run) -> None:
        self.run = run

    @torch.no_grad()
    def after_step(self) -> None:
        steps = self.run.settings.optimization.steps or 1
        for layer in reading_layers(self.run.model):
            assert layer.memory_bias is not None
            layer.memory_bias.sub_(self.pull * RATE * (1 - self.run.step / steps))


@checked
def calibrate_heads(
    backbone: str,
    texts: str | Path | Sequence[str],
    *,
    settings: HeadSettings | None = None,
    console: Console | None = None,
) -> LongMemForCausalLM:
    """Return a model with a new side network whose memory heads, biases, null slots and distances fit its backbone.

    Chunks are found by their best token. All that was trained are three numbers per head, so it computes exactly what
    the backbone does where nothing is in memory.

    Args:
        backbone: name of a model (`longmem.model.names`), of which the backbone alone is opened.
        texts: at least two texts, or where `longmem train` would find some; documents of several thousand tokens are best.
        settings: how to look; the defaults take some minutes on two cores for a model of 135M parameters.
        console: told how training goes; None: silent.

    Raises:
        ValueError: fewer than two texts, texts that are too short, or no head that helps.
    """
    settings = HeadSettings() if settings is None else settings
    validate_call(texts, settings, console)
    with tempfile.TemporaryDirectory(prefix="longmem-heads-") as folder:
        source = Path(folder, "texts.jsonl")
        if isinstance(texts, str | Path):
            source = Path(texts)
        else:
            lines = (json.dumps({"id": str(number), "text": text}) for number, text in enumerate(texts))
            source.write_text("\n".join(lines) + "\n", encoding="utf-8")
        fields = candidate_fields(backbone, settings)
        given = (backbone, source, fields, settings)
        first = train_gates(Path(folder, "all"), *given, RATE, settings.steps, [PullDown(settings.pull)], console)
        fields |= chosen_heads(first, settings.allowed_fall)
        steps = max(settings.steps // 2, 1)
        second = train_gates(Path(folder, "chosen"), *given, RATE_AFTER_CHOICE, steps, [], console, start=first)
    return second.eval()


def candidate_fields(backbone: str, settings: HeadSettings) -> dict[str, Any]:
    """Return the configuration in which all heads of the upper layers may read."""
    probe = LongMemForCausalLM.from_backbone(backbone, lora={"rank": 1})
    storable = probe.backbone_view.structure.storable_layers
    first = int(FIRST_SHARE * probe.config.num_backbone_layers)
    layers = [layer for layer in storable if layer >= first] or storable[-1:]
    return {
        "memory_layers": layers,
        "segment_length": settings.segment_length,
        "forget_sinks": True,
        "start_reads": False,
        "memory_distance": START_DISTANCE,
        "distance_per": "head",
        "search": "token",
        "choice_per": "group",
        "chunk_size": settings.chunk_size,
        "num_retrieved_tokens": settings.num_retrieved_tokens,
        "memory_bias_init": START_BIAS,
        "memory_null_init": START_NULL,
        "lora": {"rank": settings.lora_rank},
    }


def train_gates(
    folder: Path,
    backbone: str,
    source: Path,
    fields: dict[str, Any],
    settings: HeadSettings,
    rate: float,
    steps: int,
    extensions: Sequence[Extension],
    console: Console | None,
    start: LongMemForCausalLM | None = None,
) -> LongMemForCausalLM:
    """Return a model whose memory biases, null slots and distances were trained, from those of `start` on."""
    run = TrainingSettings(
        output=str(folder),
        seed=settings.seed,
        model=ModelSettings(backbone=backbone, backbone_dtype=settings.dtype, config=fields),
        data=DataSettings(
            train=str(source),
            recall_share=settings.recall_share,
            window=settings.window,
            lanes=2,
            document_tokens=3 * settings.memory_tokens,
            cache=str(folder / "texts"),
        ),
        memory=MemorySettings(tokens=settings.memory_tokens, foreign_lanes=1),
        optimization=OptimizationSettings(
            steps=steps,
            learning_rate=rate,
            warmup_steps=min(2, steps - 1),
            trained="gates",
            weight_decay=0.0,
            beta2=0.95,
        ),
    )
    trainer = Trainer(run, console, extensions)
    if start is not None:
        take_gates(trainer.model, start)
    trainer.run()
    if trainer.step < trainer.steps:  # a signal was heard; half a search would choose badly
        raise KeyboardInterrupt
    return trainer.model


def reading_layers(model: LongMemForCausalLM) -> list[SideLayer]:
    """Return the side layers that read memory."""
    return [layer for layer in side_layers(model) if layer.memory_bias is not None]


def chosen_heads(model: LongMemForCausalLM, allowed_fall: float) -> dict[str, list[Any]]:
    """Return `memory_layers` and `memory_heads` of the key-value heads of which a query head held its bias.

    Raises ValueError if there is none.
    """
    layers, heads = [], []
    for layer in reading_layers(model):
        assert layer.memory_bias is not None
        assert layer.memory_layer is not None
        groups = model.backbone_view.structure.layers[layer.memory_layer].num_kv_heads
        held = layer.memory_bias.detach().unflatten(0, (groups, -1)).amax(dim=1) >= START_BIAS - allowed_fall
        if held.any():
            layers.append(layer.memory_layer)
            heads.append(held.nonzero().flatten().tolist())
    if not layers:
        raise UnsupportedBackboneError(
            "no head of the backbone held its memory bias, so none would read; train for more `steps`, with less `pull`, or on "
            "texts that are longer."
        )
    return {"memory_layers": layers, "memory_heads": heads}


@torch.no_grad()
def take_gates(model: LongMemForCausalLM, start: LongMemForCausalLM) -> None:
    """Put the gates of memory of another model into the layers that read the same memory layer."""
    known = {layer.memory_layer: layer for layer in reading_layers(start)}
    for layer in reading_layers(model):
        for name in OF_MEMORY:
            mine, theirs = getattr(layer, name), getattr(known[layer.memory_layer], name)
            if mine is not None and theirs is not None:
                mine.copy_(theirs)
