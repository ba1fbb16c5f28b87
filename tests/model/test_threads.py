"""Two threads with one model: what one runs changes nothing of what the other computes."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from model.architectures import build
from model.conftest import SETTINGS, build_backbone

from longmem import LongMemForCausalLM, MemoryBank

# Frequencies of both kinds depend on the longest position: 24 tokens are below the border, the memory distance is above.
LONGROPE = dict(
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 28,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 3.0, 4.0, 5.0],
    },
    max_position_embeddings=64,
)
DYNAMIC = dict(
    rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, max_position_embeddings=28
)
DISTANT = {**SETTINGS, "segment_length": 24, "memory_distance": 32}
BACKBONES = {
    "llama": lambda: build_backbone("llama"),
    "gpt2": lambda: build("gpt2"),  # has dropout
    "falcon": lambda: build("falcon"),  # calls torch's attention itself
    "longrope": lambda: build_backbone("llama", **LONGROPE),
    "dynamic": lambda: build_backbone("llama", **DYNAMIC),
}


def gradients(model, input_ids, states, bank):
    """Return what the side network makes of states, and the gradients of its trained weights."""
    hidden_states, reads, _ = model.side_network(states, [bank, bank])
    trained = [weight for weight in model.side_network.parameters() if weight.requires_grad]
    found = torch.autograd.grad(hidden_states.square().sum(), trained, allow_unused=True)
    return [hidden_states.detach(), *(read.rows for read in reads), *(each for each in found if each is not None)]


def backbone_tensors(model, input_ids):
    states = model.run_backbone(input_ids, use_cache=False)
    return [*states.hidden_states.values(), *states.keys.values(), *states.values.values()]


@pytest.mark.parametrize("name", BACKBONES)
def test_the_backbone_in_one_thread_and_the_side_network_in_another(name, document):
    model = LongMemForCausalLM.from_backbone(BACKBONES[name](), **DISTANT).train()
    windows = torch.randint(0, 97, (6, 2, 24), generator=torch.Generator().manual_seed(7))
    bank = MemoryBank.for_model(model)
    model.memorize(bank, document[:24], document_id="a")
    states = [model.run_backbone(window, use_cache=False) for window in windows]
    expected = [backbone_tensors(model, window) for window in windows]
    torch.manual_seed(1)
    expected_here = [gradients(model, window, state, bank) for window, state in zip(windows, states, strict=True)]
    found, errors, go = [], [], threading.Event()

    def produce():
        try:
            go.wait()
            for _ in range(5):
                found.append([backbone_tensors(model, window) for window in windows])
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=produce)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns after every few instructions
    try:
        thread.start()
        go.set()
        for _ in range(2):
            torch.manual_seed(1)
            for window, state, like in zip(windows, states, expected_here, strict=True):
                model.train()  # as every training step begins
                assert all(map(torch.equal, gradients(model, window, state, bank), like))
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert len(found) == 5
    for run in found:
        for tensors, like in zip(run, expected, strict=True):
            assert all(map(torch.equal, tensors, like))


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
@torch.no_grad()
def test_asking_for_the_memory_distance_leaves_the_backbone_as_it_is(name, input_ids, document):
    backbone = BACKBONES[name]()
    model = LongMemForCausalLM.from_backbone(backbone, **DISTANT).eval()
    bank = MemoryBank.for_model(model)
    model.memorize(bank, document[:24], document_id="a")
    backbone(input_ids)
    before = backbone.model.rotary_emb.inv_freq.clone()
    expected = backbone(input_ids).logits
    model.side_network(model.run_backbone(input_ids, use_cache=False), [bank, bank])
    assert torch.equal(backbone.model.rotary_emb.inv_freq, before)
    assert torch.equal(backbone(input_ids).logits, expected)
    rotary = model._backbone.structure.layers[2].rotary
    far, near = (rotary.at([position], expected)[0] for position in (32, 1))
    assert rotary.module is backbone.model.rotary_emb
    assert not torch.equal(far, near)
    assert torch.equal(backbone.model.rotary_emb.inv_freq, before)
    rotary.module(expected, torch.tensor([[32]]))
    assert not torch.equal(backbone.model.rotary_emb.inv_freq, before)  # what a call of the module itself does
