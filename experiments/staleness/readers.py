"""The models of the policy table: a writer, and two readers with other encoders, a swapped one and a fine-tuned one.

Each is the tiny backbone of `experiments/learned_recall` with a side network trained to read memory that its own encoder wrote,
so what a reader loses on the writer's bank is the price of staleness alone.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from experiments.learned_recall.check import (
    LESSONS,
    TOKENS_PER_STEP,
    add_side_network,
    make_schedule,
    new_backbone,
    train_backbone,
    train_side_network,
    update,
)
from experiments.learned_recall.task import RecallTask, practice_windows
from experiments.staleness.settings import ReaderSettings
from longmem.model.modeling import LongMemForCausalLM

OTHER_SEED = 500_000  # of the swapped encoder, beside that of the writer


def kept_model(
    name: str, task: RecallTask, settings: ReaderSettings, seed: int, folder: Path | None = None
) -> LongMemForCausalLM:
    """Return one of the models of a seed: "writer", or the reader of a regime, "swap" or "fine-tune".

    With a folder, a model that is in it is read, and one that is not is trained and put there; it must be a folder of this
    seed, and of a run with this task and these settings.
    """
    path = None if folder is None else folder / f"{name}.safetensors"
    if path is not None and path.exists():
        model = add_side_network(new_backbone(task, 0))
        load_into(model, load_file(path))
        return model
    if name == "fine-tune":
        model = tune_reader(kept_model("writer", task, settings, seed, folder), task, settings, 3 * seed)
    else:
        model = train_reader(task, settings, 3 * seed + (OTHER_SEED if name == "swap" else 0))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        save_file(weights_of(model), unfinished)
        unfinished.replace(path)
    return model


def train_reader(task: RecallTask, settings: ReaderSettings, seed: int) -> LongMemForCausalLM:
    """Return a backbone and a side network, both trained from this seed as `check_recall` does."""
    model = add_side_network(train_backbone(task, settings.backbone_steps, seed))
    train_side_network(model, task, settings.side_steps, settings.practice_distance, seed + 1)
    return model


def tune_reader(model: LongMemForCausalLM, task: RecallTask, settings: ReaderSettings, seed: int) -> LongMemForCausalLM:
    """Return a copy whose backbone was trained further on its last lesson, and then its side network on what that writes."""
    tuned = add_side_network(tune_backbone(model.backbone, task, settings.tune_steps, settings.tune_rate, seed + 2))  # type: ignore[arg-type]
    tuned.side_network.load_state_dict(model.side_network.state_dict())
    train_side_network(tuned, task, settings.side_tune_steps, settings.practice_distance, seed + 2)
    return tuned


def tune_backbone(
    backbone: LlamaForCausalLM, task: RecallTask, steps: int, learning_rate: float, seed: int
) -> LlamaForCausalLM:
    """Return a copy of a backbone, trained further on the last of its lessons."""
    tuned = copy.deepcopy(backbone).requires_grad_(True).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = make_schedule(optimizer, steps, warmup=10)
    half, num_pairs = LESSONS[-1]
    for _ in range(steps):
        windows, places = practice_windows(task, TOKENS_PER_STEP // (2 * half), half, num_pairs, generator)
        output = tuned(windows, labels=windows)
        loss = nn.functional.cross_entropy(output.logits[:, places].flatten(0, 1), windows[:, places + 1].flatten())
        update(optimizer, schedule, loss + 0.1 * output.loss)
    return tuned.eval()


def weights_of(model: LongMemForCausalLM) -> dict[str, torch.Tensor]:
    """Return the weights of backbone and side network by name, as copies."""
    parts = {"backbone": model.backbone, "side_network": model.side_network}
    return {
        f"{part}.{name}": weight.clone()
        for part, module in parts.items()
        for name, weight in module.state_dict().items()
    }


def load_into(model: LongMemForCausalLM, weights: dict[str, torch.Tensor]) -> None:
    """Put weights of `weights_of` into a model of the same shape."""
    for part, module in (("backbone.", model.backbone), ("side_network.", model.side_network)):
        module.load_state_dict(
            {name.removeprefix(part): weight for name, weight in weights.items() if name.startswith(part)}
        )
