"""What a run is made of, from its settings: model, lanes of text, validation, optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase

from longmem.data import Lanes, load_corpus
from longmem.model.modeling import LongMemForCausalLM
from longmem.model.names import look_up
from longmem.model.opening import refuse_config_of_saved
from longmem.quiet import without_warnings_of
from longmem.training.features import FrozenFeatures
from longmem.training.settings import DataSettings, OptimizationSettings, TrainingSettings
from longmem.training.trainable import parameter_groups
from longmem.training.validation import Validation, validation_texts


def make_model(settings: TrainingSettings, device: torch.device) -> LongMemForCausalLM:
    """Return the model to train, on a device, in training mode.

    A new side network is later used with segments as long as the windows it is trained on, and on a half-precision backbone
    it is float32, because small updates would be lost in its weights; with LoRA frozen weights are the backbone's own, and
    adapters are always float32. Both unless `model.config` says otherwise.
    """
    wanted = settings.model
    fields = dict(wanted.config)
    options = {"dtype": getattr(torch, wanted.backbone_dtype)}
    named = look_up(wanted.backbone)
    if named.origin == "saved":
        refuse_config_of_saved(named, fields)
        model = LongMemForCausalLM.from_pretrained(wanted.backbone, backbone_options=options)
    else:
        fields.setdefault("segment_length", settings.data.window)
        if wanted.backbone_dtype != "float32" and fields.get("lora") is None:
            fields.setdefault("side_network_dtype", "float32")
        model = LongMemForCausalLM.from_backbone(wanted.backbone, backbone_options=options, **fields)
    model.to(device).train()  # type: ignore[arg-type]  # transformers' decorator hides the signature
    if settings.optimization.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model


def open_corpus(
    source: str,
    max_tokens: int | None,
    data: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    recall_share: float = 0.0,
) -> Dataset:
    """Return tokenised documents; the first process of a machine tokenises, the others read what it kept."""
    options: dict[str, Any] = {"text_column": data.text_column, "cache_dir": data.cache}
    with accelerator.local_main_process_first():
        return load_corpus(
            source,
            tokenizer,
            max_tokens=max_tokens,
            num_documents=data.num_documents,
            recall_share=recall_share,
            **options,
        )


def make_lanes(settings: TrainingSettings, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator) -> Lanes:
    """Return the lanes of text of all processes."""
    data = settings.data
    return Lanes(
        open_corpus(data.train, data.max_train_tokens, data, tokenizer, accelerator, data.recall_share),
        num_lanes=data.lanes,
        window=data.window,
        seed=settings.seed,
        shuffle=data.shuffle,
        lanes_per_document=data.lanes_per_document,
        document_tokens=data.document_tokens,
    )


def make_validation(
    settings: TrainingSettings, model: LongMemForCausalLM, accelerator: Accelerator
) -> Validation | None:
    """Return what validates the model, None without validation text."""
    data, wanted = settings.data, settings.validation
    if data.validation is None:
        return None
    corpus = open_corpus(data.validation, data.max_validation_tokens, data, model.tokenizer, accelerator)
    return Validation(model, validation_texts(corpus, wanted, data.window), data.window)


def make_optimizer(
    trained: dict[str, nn.Parameter], wanted: OptimizationSettings, further_groups: Sequence[dict[str, Any]] = ()
) -> torch.optim.AdamW:
    """Return AdamW over what is trained of the side network, and over further groups of parameters."""
    groups = parameter_groups(
        trained,
        learning_rate=wanted.learning_rate,
        gate_learning_rate=wanted.gate_learning_rate,
        weight_decay=wanted.weight_decay,
    )
    return torch.optim.AdamW([*groups, *further_groups], betas=(wanted.beta1, wanted.beta2), eps=wanted.epsilon)


def introduction(
    settings: TrainingSettings, lanes: Lanes, steps: int, num_trained: int, features: FrozenFeatures
) -> list[str]:
    """Return lines on what a run is about to do, and on the room that its feature cache will take."""
    data, memory = settings.data, settings.memory
    batch = f"{settings.optimization.gradient_accumulation * data.lanes} x {data.window:,} tokens"
    reads = (
        f"lanes read memories of up to {memory.tokens:,} tokens" if memory.enabled else "nothing is read from memory"
    )
    lines = [
        f"{num_trained:,} weights are trained beside {settings.model.backbone}: {steps:,} steps of {batch}, "
        f"an epoch being {lanes.num_tokens:,} tokens; {reads}.",
    ]
    if features.folder is not None:
        size = features.bytes_per_token()
        limit = "" if settings.features.max_gigabytes is None else f", at most {settings.features.max_gigabytes:g} GB"
        lines.append(
            f"Frozen features: {size:,} bytes a token, {size * lanes.num_tokens / 1e9:.2f} GB for an epoch{limit}, "
            f"in {features.folder}."
        )
    return lines


def make_schedule(optimizer: torch.optim.Optimizer, wanted: OptimizationSettings, steps: int) -> LRScheduler:
    """Return the schedule of the learning rate: no step has the rate 0.

    transformers' schedules begin and end with it. From the second of `steps + 1` values on, all of them move the weights.
    """
    # Imported here: transformers' module of schedules imports peft, and that bitsandbytes where it is installed, which warns.
    with without_warnings_of("bitsandbytes"):
        from transformers.optimization import (
            get_constant_schedule_with_warmup,
            get_cosine_schedule_with_warmup,
            get_linear_schedule_with_warmup,
        )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # torch asks for it where a schedule does not begin at its first value
    warmup = wanted.warmup_steps + 1
    if wanted.schedule == "constant":
        return get_constant_schedule_with_warmup(optimizer, warmup, last_epoch=0)
    decay = get_linear_schedule_with_warmup if wanted.schedule == "linear" else get_cosine_schedule_with_warmup
    return decay(optimizer, warmup, steps + 1, last_epoch=0)


def total_steps(wanted: OptimizationSettings, lanes: Lanes) -> int:
    """Return the number of optimizer steps of the whole run."""
    if wanted.steps is not None:
        return wanted.steps
    assert wanted.epochs is not None
    return max(1, round(wanted.epochs * lanes.steps_per_epoch / wanted.gradient_accumulation))


def memory_options(settings: TrainingSettings) -> dict[str, Any]:
    """Return what the lanes' memories are made with."""
    return {
        "keep_documents": settings.data.at_document_border == "keep",
        "foreign_lanes": settings.memory.foreign_lanes,
        "index": settings.memory.index,
        "storage_dtype": "bfloat16" if settings.optimization.mixed_precision == "bf16" else "float16",
    }
