"""What a run is made of, from its settings: model, lanes of text, validation, optimizer."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase

from longmem.backbone.loading import digest
from longmem.console import without_warnings_of
from longmem.data import Lanes, load_corpus
from longmem.encoder.path import BackboneStamp, hash_tensors
from longmem.model.modeling import LongMemForCausalLM
from longmem.model.names import look_up
from longmem.model.opening import refuse_config_of_saved
from longmem.model.side_network import GATES, OF_MEMORY, SideLayer
from longmem.training.features import FrozenFeatures
from longmem.training.settings import DataSettings, OptimizationSettings, TrainingSettings
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


def backbone_fingerprint(model: LongMemForCausalLM) -> str:
    """Return a hash of what the backbone computes with, as it was opened."""
    content = BackboneStamp.of(model.backbone).to_json()
    exact = None if model.encoder.is_moving else model.encoder_fingerprint()  # one that is trained moves on from here
    return digest([content, exact])


def frozen_fingerprint(model: LongMemForCausalLM) -> str:
    """Return a hash of the side network's weights that are not trained, which no checkpoint holds."""
    frozen = ((name, each) for name, each in model.side_network.named_parameters() if not each.requires_grad)
    return hash_tensors((name, each.detach().cpu().contiguous()) for name, each in frozen)[:16]


def open_corpus(
    source: str, data: DataSettings, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator, **options: Any
) -> Dataset:
    """Return tokenised documents; the first process of a machine tokenises, the others read what it kept."""
    options |= {"text_column": data.text_column, "num_documents": data.num_documents, "cache_dir": data.cache}
    with accelerator.local_main_process_first():
        return load_corpus(source, tokenizer, **options)


def make_lanes(settings: TrainingSettings, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator) -> Lanes:
    """Return the lanes of text of all processes."""
    data = settings.data
    options = {"max_tokens": data.max_train_tokens, "recall_share": data.recall_share}
    return Lanes(
        open_corpus(data.train, data, tokenizer, accelerator, **options),
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
    corpus = open_corpus(data.validation, data, model.tokenizer, accelerator, max_tokens=data.max_validation_tokens)
    return Validation(model, validation_texts(corpus, wanted, data.window), data.window)


def make_optimizer(
    trained: dict[str, nn.Parameter], wanted: OptimizationSettings, further_groups: Sequence[dict[str, Any]] = ()
) -> torch.optim.AdamW:
    """Return AdamW over what is trained of the side network, and over further groups of parameters.

    Matrices have weight decay, vectors none, gates none and a rate of their own.
    """
    gates = [parameter for name, parameter in trained.items() if name.endswith(GATES)]
    others = [parameter for name, parameter in trained.items() if not name.endswith(GATES)]
    groups: list[dict[str, Any]] = [
        {"params": [each for each in others if each.ndim > 1], "weight_decay": wanted.weight_decay},
        {"params": [each for each in others if each.ndim <= 1], "weight_decay": 0.0},
        {"params": gates, "lr": wanted.gate_learning_rate or wanted.learning_rate, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"betas": (wanted.beta1, wanted.beta2), "eps": wanted.epsilon}
    return torch.optim.AdamW([*groups, *further_groups], lr=wanted.learning_rate, **options)


def introduction(
    settings: TrainingSettings, lanes: Lanes, steps: int, num_trained: int, features: FrozenFeatures
) -> list[str]:
    """Return lines on what a run is about to do, and on the room that its feature cache will take."""
    data, memory = settings.data, settings.memory
    batch = f"{settings.optimization.gradient_accumulation * data.lanes} x {data.window:,} tokens"
    reads = f"lanes read memories of up to {memory.tokens:,} tokens" if memory.enabled else "no memory is read"
    lines = [
        f"{num_trained:,} weights are trained beside {settings.model.backbone}: {steps:,} steps of {batch}, "
        f"an epoch being {lanes.num_tokens:,} tokens; {reads}."
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


def select_trained(model: LongMemForCausalLM, trained: str, *, reads_memory: bool) -> dict[str, nn.Parameter]:
    """Switch gradients on for what is trained, off for all else, and return it by its name in the side network.

    Args:
        model: changed in its `requires_grad` flags alone.
        trained: "all" that the side network lets be trained (with LoRA, its adapters and biases); "reading_attention": the
            attention modules of the layers that read memory, and their gates; "gates": memory biases, null slots, memory
            distances of heads and output scales.
        reads_memory: without it the gates of memory are left as they are: nothing passes through them.
    """
    model.requires_grad_(True)  # freezes the backbone, and what LoRA leaves frozen
    reading = reading_layers(model)
    parts = ((*(getattr(layer, name) for name in OF_MEMORY), *layer.attention.parameters()) for layer in reading)
    wanted = {id(each) for part in parts for each in part}
    if trained == "gates":
        wanted = {id(each) for name, each in model.side_network.named_parameters() if name.endswith(GATES)}
    chosen = {}
    for name, parameter in model.side_network.named_parameters():
        is_of_memory = name.endswith(OF_MEMORY)
        keep = parameter.requires_grad and (trained == "all" or id(parameter) in wanted)
        parameter.requires_grad_(keep and (reads_memory or not is_of_memory))
        if parameter.requires_grad:
            chosen[name] = parameter
    return chosen


def side_layers(model: LongMemForCausalLM) -> list[SideLayer]:
    """Return the side network's layers."""
    return cast(list[SideLayer], list(model.side_network.layers))


def reading_layers(model: LongMemForCausalLM) -> list[SideLayer]:
    """Return the side layers that read memory."""
    return [layer for layer in side_layers(model) if layer.memory_bias is not None]


def mean_bias(model: LongMemForCausalLM) -> float:
    """Return the mean memory bias, or gate before its sigmoid, over layers and heads."""
    biases = [layer.memory_bias for layer in reading_layers(model)]
    return torch.cat([bias.detach().float().flatten() for bias in biases if bias is not None]).mean().item()
