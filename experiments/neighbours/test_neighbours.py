"""Neighbours in memory: what is compared, what is mixed, and that text which comes back is predicted as it went on."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from evaluation.in_context_data import save_sets
from model.conftest import build_backbone
from tiny_models import save_tiny_backbone

from experiments.neighbours.books import SYSTEMS, losses, table
from experiments.neighbours.neighbours import Mixing, NeighbourModel, NeighbourSystem, Store, side_by_side
from longmem import LongMemForCausalLM, MemoryBank
from longmem.backbone.cache_names import as_keyword, cache_of
from longmem.evaluation.systems.system import LocalModel

OPTIONS = {"segment_length": 32, "num_retrieved_tokens": 8, "memory_distance": 8}
HERE = Path(__file__).parent


def make_model(**options) -> LongMemForCausalLM:
    return LongMemForCausalLM.from_backbone(build_backbone("llama"), **OPTIONS | options).eval()


def drawn(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 97, (count,), generator=torch.Generator().manual_seed(seed))


def stored(model: LongMemForCausalLM, ids: torch.Tensor) -> tuple[MemoryBank, Store]:
    bank = MemoryBank.for_model(model, storage_dtype="float32")
    model.memorize(bank, ids, "text")
    return bank, Store.of(model, bank, ids.tolist())


@pytest.mark.parametrize("options", [{}, {"memory_layers": [1, 3], "memory_heads": [[1], [0, 1]], "search": "token"}])
def test_tokens_are_compared_by_what_a_bank_holds_of_them(options, monkeypatch):
    monkeypatch.setattr("experiments.neighbours.neighbours.ROWS_AT_ONCE", 3)
    model, ids = make_model(**options), drawn(61)
    _, store = stored(model, ids)
    expected = [model.encode(ids[None, start : start + 32]) for start in (0, 32)]
    features = torch.cat([side_by_side(list(zip(*each, strict=True)))[0] for each in expected])
    torch.testing.assert_close(store.features.float(), features[:60], rtol=2e-3, atol=2e-3)
    assert store.next_ids.tolist() == ids[1:].tolist()
    pairs = torch.cdist(features[:60], features[:60]).square()
    assert store.scale == pytest.approx(float(pairs.mean()), rel=1e-2)


def test_shares_and_predictions_are_those_of_the_formula():
    features, mixing = torch.randn(9, 4), Mixing(neighbours=5, near=3, half=0.5)
    store = Store(features.half(), torch.tensor([2, 0, 2, 1, 3, 3, 0, 2, 1]), 3.0)
    queries = torch.randn(2, 4)
    share, predicted = store.shares(queries, 6, mixing)
    for query, own, row in zip(queries, share.tolist(), predicted, strict=True):
        near = sorted(
            (float((query - each.float()).square().sum()) / 3, int(n))
            for each, n in zip(features.half(), store.next_ids, strict=True)
        )
        typical = sum(distance for distance, _ in near[:3]) / 3
        assert own == pytest.approx(1 / (1 + (typical / 0.5) ** 2), rel=1e-3)
        weights = [math.exp(-distance / (0.3 * typical)) for distance, _ in near[:5]]
        expected = torch.zeros(6)
        for weight, (_, token) in zip(weights, near[:5], strict=True):
            expected[token] += weight / sum(weights)
        torch.testing.assert_close(row, expected, rtol=1e-3, atol=1e-4)


def test_less_than_two_tokens_have_no_next_one():
    model = make_model()
    with pytest.raises(ValueError, match="`token_ids` must be at least two, got 1"):
        Store.of(model, MemoryBank.for_model(model), [3])


@torch.no_grad()
def test_logits_are_those_of_the_mixture_with_a_cache_and_without():
    model, ids = make_model(), drawn(64)
    bank, store = stored(model, ids)
    local = LocalModel(model, bank)
    window = torch.stack([ids[20:36], drawn(16, seed=1)])
    mixed = NeighbourModel(local, store)
    whole = mixed(window).logits
    plain = model(window, memory=bank, output_memory_keys=True)
    features = side_by_side(list(zip(plain.memory_keys, plain.memory_values, strict=True)))
    share, predicted = store.shares(features.flatten(0, 1), 97, Mixing())
    expected = (1 - share[:, None]) * plain.logits.softmax(-1).flatten(0, 1) + share[:, None] * predicted
    torch.testing.assert_close(whole.exp().flatten(0, 1), expected)
    torch.testing.assert_close(whole.exp().sum(-1), torch.ones(2, 16))
    first = mixed(window[:, :10], use_cache=True, logits_to_keep=1)
    rest = mixed(window[:, 10:], use_cache=True, logits_to_keep=3, **as_keyword(cache_of(first)))
    torch.testing.assert_close(rest.logits, whole[:, -3:], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_text_that_comes_back_is_predicted_as_it_went_on():
    model, ids = make_model(), drawn(64)
    found = losses(model, [torch.cat([ids, ids[32:]]), torch.cat([drawn(64, seed=1), drawn(32, seed=2)])], 64, 32, 31)
    assert found.shape == (len(SYSTEMS), 2)
    off, on, neighbours, *_ = found[:, 0].tolist()
    assert neighbours < min(off, on) - 0.5
    lines = table(found).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(SYSTEMS)


def test_the_system_answers_as_it_scores(tmp_path):
    model = LongMemForCausalLM.from_backbone(str(save_tiny_backbone(tmp_path)), **OPTIONS).eval()
    system = NeighbourSystem("neighbours", model, window=40)
    text = "the whale is white, the sea is wide; "
    system.feed(4 * text)
    query = model.tokenizer("the whale", add_special_tokens=False)["input_ids"]
    (ids,) = system.generate([query], max_new_tokens=6, stop=())
    assert len(ids) == 6
    local, context = system.context([], 20, [])
    assert isinstance(local, NeighbourModel)
    with torch.no_grad():
        logits = local(torch.tensor([[*context, *query, *ids[:-1]]]), logits_to_keep=6).logits
    assert logits[0].argmax(-1).tolist() == ids
    (stopped,) = system.generate([query], max_new_tokens=6, stop=(model.tokenizer.decode(ids[:1]),))
    assert stopped == ids[:1]
    system.read([])
    assert isinstance(system.context([], 20, [])[0], LocalModel)


def test_one_command_compares_it_with_others(tmp_path, monkeypatch, new_names):
    backbone, data = save_tiny_backbone(tmp_path / "backbone"), save_sets(tmp_path / "sets")
    values = {
        "model": backbone,
        "dtype": "float32",
        "config": "{segment_length: 64, num_retrieved_tokens: 8}",
        "data": data,
        "sets": "[sst-2]",
        "systems": "[off, neighbours]",
        "seeds": "[1]",
        "limit": 2,
        "window": 200,
        "demonstrations": 2,
        "memory_demonstrations": 5,
        "output": tmp_path / "run",
    }
    script = str(HERE / "evaluate.py")
    monkeypatch.setattr("sys.argv", [script, "in-context", *(f"{key}={value}" for key, value in values.items())])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    assert end.value.code == 0
    lines = (tmp_path / "run" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["system"] for line in lines} >= {"off", "neighbours"}
