"""Two models on one bank: each reads and writes as itself, whichever has come last."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from fake_encoder import DIM, HEADS, LAYERS, FakeModel, make_bank, write
from model.conftest import SETTINGS, build_backbone
from threads import in_a_thread

from longmem import LongMemForCausalLM, MemoryBank
from longmem.encoder.history import UNKNOWN
from longmem.errors import StaleMemoryError

IDS = list(range(16))


def read_keys(bank: MemoryBank) -> list[torch.Tensor]:
    """Return the keys, of one head, of all chunks that this thread finds."""
    found = bank.search(LAYERS[0], torch.ones(HEADS, 1, DIM), 8)
    rows = found.rows[:, 0]
    keys, _ = bank.gather(LAYERS[0], rows, bank.generation)
    return [key for key, row in zip(keys[0], rows[0].tolist(), strict=True) if row >= 0]


def wrote(model: FakeModel, chunk: torch.Tensor, ids: list[int] = IDS) -> bool:
    """Return whether a model's encoder made these keys of one of the chunks of these tokens."""
    made = model.numbers(tuple(ids))[0, 0, 0].unflatten(0, (-1, 4))
    return any(torch.equal(chunk, each) for each in made)


# What the first model reads when the second one was made ready, in another thread, after it: its own keys, or nothing.
POLICIES = {
    "lazy": True,  # only what is read is encoded again, and nobody has read
    "lazy:sweep_tokens=99": False,
    "eager": False,
    "bounded:max_lag=0": False,
    "bounded:max_lag=0,on_violation=mask": True,
}


@pytest.mark.parametrize("refresh", POLICIES)
@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_model_reads_its_own_keys_or_nothing_after_another_was_made_ready(refresh, with_gradients):
    first, second = FakeModel("a"), FakeModel("b")
    bank = make_bank(first, refresh=refresh)
    write(bank, first, "d", IDS)
    with torch.set_grad_enabled(with_gradients):
        bank.ready_for(first)
        assert len(read_keys(bank)) == 4
        in_a_thread(lambda: bank.ready_for(second))
        keys = read_keys(bank)
        assert all(wrote(first, key) for key in keys)
        assert bool(keys) == POLICIES[refresh]
        bank.ready_for(second)  # in this thread: now it is the second that reads here
        assert all(wrote(second, key) for key in read_keys(bank))
        bank.ready_for(first)
        assert all(wrote(first, key) for key in read_keys(bank))


def test_a_refusal_is_to_one_model():
    first, second = FakeModel("a"), FakeModel("b")
    bank = make_bank(first)
    write(bank, first, "d", IDS)
    bank.ready_for(first)
    with pytest.raises(StaleMemoryError, match="written by encoder a, this model's encoder is b"):
        in_a_thread(lambda: bank.ready_for(second))
    assert len(read_keys(bank)) == 4


def test_what_is_written_is_of_the_model_that_this_thread_made_the_bank_ready_for():
    first, second = FakeModel("a"), FakeModel("b")
    bank = make_bank(first, refresh="lazy")
    bank.ready_for(first)
    in_a_thread(lambda: bank.ready_for(second))
    write(bank, first, "d", IDS)  # the bank's current encoder is the other one's
    write(bank, first, "d", list(range(16, 20)))
    assert [bank.encoders.versions[each.version].stamp.weights for each in bank.segments("d")] == ["a", "a"]
    in_a_thread(lambda: (bank.ready_for(second), write(bank, second, "e", IDS)))
    assert [bank.encoders.versions[each.version].stamp.weights for each in bank.segments("e")] == ["b"]
    assert all(each.version != UNKNOWN for name in "de" for each in bank.segments(name))
    found: list[torch.Tensor] = []

    @torch.no_grad()
    def read() -> None:
        bank.ready_for(second)
        found.extend(read_keys(bank))

    in_a_thread(read)
    assert len(found) == 8  # what the first one wrote is found stale and encoded again
    assert not any(wrote(first, key) for key in found)


def test_what_one_model_has_found_stale_is_encoded_again_for_that_model_alone():
    first, second = FakeModel("a"), FakeModel("b")
    bank = make_bank(first, refresh="lazy")
    write(bank, first, "d", IDS)
    bank.ready_for(second)
    with torch.enable_grad():
        assert not read_keys(bank)  # noted, and masked
    encoded = second.num_encoded
    write(bank, second, "e", IDS)
    bank.ready_for(first)
    assert first.num_encoded == len(IDS)  # its own entry is as it was
    with torch.no_grad():
        bank.ready_for(second)
    assert second.num_encoded == encoded + 2 * len(IDS)  # "d", and what it has written itself
    assert len(read_keys(bank)) == 8


def test_readers_do_not_go_along_with_a_copy():
    model = FakeModel("a")
    bank = make_bank(model, refresh="lazy")
    write(bank, model, "d", IDS)
    bank.ready_for(model)
    for twin in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank)), bank.copy()):
        assert bank.freshness.reader is not None
        assert twin.freshness.reader is None
        write(twin, model, "e", IDS)
        assert len(read_keys(twin)) == 8
    del model
    assert bank.freshness.reader is not None
    assert bank.freshness.reader.writer() is None  # a bank keeps no model alive


# Two real models.

DOCUMENT = torch.randint(0, 97, (150,), generator=torch.Generator().manual_seed(6))


def model_of(seed: int) -> LongMemForCausalLM:
    backbone = build_backbone("llama")
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.mul_(1 + 0.2 * seed)
    options = {**SETTINGS, "memory_layers": [1, 2, 3], "layer_reduction_factor": 1, "memory_bias_init": 0.0}
    return LongMemForCausalLM.from_backbone(backbone, **options).eval()


@pytest.mark.parametrize("refresh", ["lazy", "eager", "bounded:max_lag=0", "bounded:max_lag=0,on_violation=mask"])
@pytest.mark.parametrize("place", ["backbone", "between the layers"])
@pytest.mark.parametrize("threaded", [False, True])
def test_another_model_reads_in_the_middle_of_a_forward_pass(refresh, place, threaded):
    first, second = model_of(0), model_of(1)
    ids = DOCUMENT[None, 100:120]
    bank = MemoryBank.for_model(first, refresh=refresh, storage_dtype="float32")
    first.memorize(bank, DOCUMENT[:60], "d")
    with torch.no_grad():
        own, none = first(ids, memory=bank).logits, first(ids).logits
        calls = [lambda: second(ids, memory=bank)]
        layers = first.backbone.model.layers if place == "backbone" else first.side_network.layers

        def other(*_: object) -> None:
            if calls:
                call = calls.pop()
                in_a_thread(lambda: torch.no_grad()(call)()) if threaded else call()

        handle = layers[1].register_forward_pre_hook(other)
        beside = first(ids, memory=bank).logits
        handle.remove()
        assert not calls
        distances = [float((beside - each).abs().max()) for each in (own, none)]
        assert min(distances) < 1e-4  # its own keys or, where the policy has given them up, none
        assert place == "backbone" or distances[0] < 1e-4  # the pass had begun
        assert (own - none).abs().max() > 1e-2


@pytest.mark.parametrize("refresh", ["lazy", "eager", "bounded:max_lag=0"])
def test_two_models_read_beside_each_other_and_a_writer(refresh):
    models = [model_of(0), model_of(1)]
    ids = DOCUMENT[None, 100:110]
    bank = MemoryBank.for_model(models[0], refresh=refresh, storage_dtype="float32")
    models[0].memorize(bank, DOCUMENT[:30], "d")  # one segment, so it is read whole or not at all
    errors: list[BaseException] = []
    answers: list[list[torch.Tensor]] = [[], []]

    @torch.no_grad()
    def read(number: int) -> None:
        try:
            for _ in range(4):
                answers[number].append(models[number](ids, memory=bank.select("d")).logits)
            models[number].generate(ids, memory=bank, max_new_tokens=2)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    keys = [torch.randn(2, 30, 8) for _ in range(3)]
    for number in range(5):  # of no encoder that can be asked again
        bank.add(str(number), keys, keys)
        bank.delete(str(number))
    for thread in threads:
        thread.join()
    assert not errors, errors
    with torch.no_grad():
        for model, found in zip(models, answers, strict=True):
            alone = MemoryBank.for_model(model, storage_dtype="float32")
            model.memorize(alone, DOCUMENT[:30], "d")
            own, none = model(ids, memory=alone).logits, model(ids).logits
            assert (own - none).abs().max() > 1e-2
            for each in found:
                assert min(float((each - wanted).abs().max()) for wanted in (own, none)) < 1e-3
