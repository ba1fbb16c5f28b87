"""Neighbours in memory: what they predict, against a plain twin; which memories have them; and where none are."""

import pytest
import torch
from model.conftest import SETTINGS, build_backbone
from transformers import StaticCache

from longmem import LongMemConfig, LongMemForCausalLM, MemoryBank
from longmem.backbone.cache_names import as_keyword, cache_of
from longmem.errors import ChangedMemoryError
from longmem.memory import BankShards
from longmem.memory.visibility import reading_as
from longmem.model import neighbours

LAYERS, COUNT = [1, 3], 12
FORMS = [
    dict(search="token"),
    dict(search="token", memory_heads=[[1], [0, 1]], forget_sinks=True),
    dict(search="chunk_mean", chunk_size=1),
    dict(residual="paper", layer_reduction_factor=2, side_layer_offset=1, memory_layers=[1, 2]),
]


def make(backbone="llama", **fields):
    torch.manual_seed(0)
    settings = {**SETTINGS, "memory_layers": LAYERS, "num_neighbours": COUNT, **fields}
    return LongMemForCausalLM.from_backbone(build_backbone(backbone), **settings).eval()


def fill(model, *documents, **options):
    bank = MemoryBank.for_model(model, **options)
    for name, document in zip("abcdef", documents, strict=False):
        model.memorize(bank, document, document_id=name)
    return bank


@pytest.fixture
def all_are_candidates(monkeypatch):
    monkeypatch.setattr(neighbours, "CHUNKS_PER_HEAD", 64)
    monkeypatch.setattr(neighbours, "SAMPLED_CHUNKS", 4096)


@torch.no_grad()
def twin(model, bank, documents, input_ids, count=COUNT):
    """Return the prediction of `count` neighbours among all tokens of documents, and their share, in the plainest way."""
    given = model(input_ids[None], memory=bank, output_memory_keys=True)
    stored = [model.encode(torch.cat([document[None]], dim=1)) for document in documents]
    assert all(document.shape[0] <= SETTINGS["segment_length"] for document in documents)
    there = torch.cat([torch.cat([part[0].transpose(0, 1).flatten(1) for part in (*k, *v)], dim=1) for k, v in stored])
    following = torch.cat([torch.cat([document[1:], torch.tensor([-1])]) for document in documents])
    parts = (*given.memory_keys, *given.memory_values)
    here = torch.cat([part[0].transpose(0, 1).flatten(1) for part in parts], dim=1)
    distances = (here[:, None] - there[None]).square().sum(-1) / (2 * there.var(dim=0, correction=0).sum())
    predicted, shares = torch.zeros(len(input_ids), 97), torch.zeros(len(input_ids))
    for token, row in enumerate(distances):
        order = row.masked_fill(following < 0, torch.inf).argsort()[:count]
        typical = row[order[: neighbours.NEAR]].mean()
        shares[token] = 1 / (1 + (typical / neighbours.HALF) ** 2)
        for place, weight in zip(order, (-row[order] / (neighbours.SHARPNESS * typical)).softmax(0), strict=True):
            predicted[token, following[place]] += weight
    return shares, predicted


def without(model, *given, **options):
    model.config.num_neighbours = 0
    output = model(*given, **options)
    model.config.num_neighbours = COUNT
    return output


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_the_mixture_is_that_of_a_plain_twin(form, input_ids, document, all_are_candidates, monkeypatch):
    monkeypatch.setattr(neighbours, "HALF", 0.5)  # else the share of neighbours by chance would be near 0
    model, documents = make(**form), (document[:30], document[40:63])
    bank = fill(model, *documents)
    share, predicted = twin(model, bank, documents, input_ids[0])
    output = model(input_ids[:1], memory=bank, output_memory_reads=True)
    found = output.memory_neighbours
    # The first token of a window is apart: where its key is forgotten in memory, it is like no other.
    torch.testing.assert_close(found.share[0, 1:], share[1:], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.weights.sum(-1), torch.ones_like(found.share))
    mine = torch.zeros_like(predicted).scatter_add_(1, found.token_ids[0], found.weights[0])
    torch.testing.assert_close(mine[1:], predicted[1:], rtol=1e-3, atol=1e-4)
    own = without(model, input_ids[:1], memory=bank).logits[0].softmax(-1)
    mixed = (1 - share[:, None]) * own + share[:, None] * predicted
    torch.testing.assert_close(output.logits[0, 1:].exp(), mixed[1:], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(output.logits.exp().sum(-1), torch.ones(1, 24))
    labels = input_ids[:1].clone()
    labels[:, :2] = -100
    loss = model(input_ids[:1], memory=bank, labels=labels).loss
    expected = -mixed.log()[1:-1].gather(1, input_ids[0, 2:, None]).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_a_text_that_is_in_memory_is_continued_from_there(document):
    model = make(search="token")
    bank = fill(model, document)
    found = model(document[None, :32], memory=bank, output_memory_reads=True).memory_neighbours
    assert torch.equal(found.token_ids[0, :, 0], document[1:33])  # each token is its own nearest
    assert found.weights[0, :, 0].min() > 0.5


@torch.no_grad()
def test_without_memory_or_ids_the_logits_are_the_same_numbers(input_ids, document):
    model = make()
    plain = without(model, input_ids).logits
    empty = MemoryBank.for_model(model)
    assert torch.equal(model(input_ids).logits, plain)
    assert torch.equal(model(input_ids, memory=empty).logits, plain)
    bank, blind = fill(model, document), MemoryBank.for_model(model)
    keys, values = model.encode(document[None, :32])
    blind.add("a", [part[0] for part in keys], [part[0] for part in values])  # nobody said which tokens these are
    assert torch.equal(model(input_ids, memory=blind).logits, without(model, input_ids, memory=blind).logits)
    assert not torch.equal(model(input_ids, memory=bank).logits, without(model, input_ids, memory=bank).logits)
    assert model(input_ids, memory=bank).memory_neighbours is None  # nobody has asked
    both = model(input_ids, memory=[bank, empty], output_memory_reads=True)
    torch.testing.assert_close(both.logits[1], plain[1], rtol=1e-5, atol=1e-5)
    assert both.memory_neighbours.share[0].min() > 0
    assert both.memory_neighbours.share[1].max() == 0


@torch.no_grad()
def test_shards_and_views_have_the_neighbours_of_one_bank_with_the_same_documents(input_ids, document):
    model, parts = make(search="token"), document[:120].view(3, 40)
    whole, first, second = fill(model, *parts), fill(model, *parts[:2]), MemoryBank.for_model(model)
    model.memorize(second, parts[2], document_id="c")
    whole_again = BankShards([first, second, MemoryBank.for_model(model)])
    assert whole.sample(4096).rows.numel() == whole_again.sample(4096).rows.numel() == 30
    # A sample of everything: then it is that of one bank, too.
    expected = model(input_ids, memory=whole, output_memory_reads=True)
    output = model(input_ids, memory=whole_again, output_memory_reads=True)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert (output.memory_neighbours.token_ids == expected.memory_neighbours.token_ids).float().mean() > 0.99
    assert torch.equal(BankShards([MemoryBank.for_model(model), whole]).sample(7).rows // 2, whole.sample(7).rows)
    alone = model(input_ids, memory=fill(model, parts[0])).logits
    torch.testing.assert_close(model(input_ids, memory=whole.select("a")).logits, alone, rtol=1e-4, atol=1e-4)
    whole.supersede("b")
    whole.supersede("c")
    torch.testing.assert_close(model(input_ids, memory=whole).logits, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backbone", ["llama", "gpt2", "gemma2"])
@torch.no_grad()
def test_reading_by_pieces_and_a_cache_of_fixed_size_change_nothing(backbone, input_ids, document):
    model = make(backbone)
    bank = fill(model, document)
    expected = model(input_ids, memory=bank).logits
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    for cache in (None, static):
        first = model(input_ids[:, :17], memory=bank, use_cache=True, **as_keyword(cache))
        logits = [first.logits]
        for token in range(17, 24):
            first = model(input_ids[:, token : token + 1], memory=bank, **as_keyword(cache_of(first)))
            logits.append(first.logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-3, atol=1e-3)
    for kept in (3, torch.tensor([5, 20])):
        places = slice(-3, None) if isinstance(kept, int) else kept
        some = model(input_ids, memory=bank, logits_to_keep=kept).logits
        torch.testing.assert_close(some, expected[:, places], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_how_many_are_computed_at_once_changes_nothing(input_ids, document, monkeypatch):
    model = make(search="token")
    bank = fill(model, document)
    expected = model(input_ids, memory=bank, output_memory_reads=True)
    for numbers, block, mixed in ((1, 2, 3), (2**14, 5, 1), (2**25, 7, 100)):
        monkeypatch.setattr(neighbours, "NUMBERS_AT_ONCE", numbers)
        monkeypatch.setattr(neighbours, "BLOCK", block)
        monkeypatch.setattr(neighbours, "MIXED_AT_ONCE", mixed)
        output = model(input_ids, memory=bank, output_memory_reads=True)
        torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-4)
        assert (output.memory_neighbours.token_ids == expected.memory_neighbours.token_ids).float().mean() > 0.99


@torch.no_grad()
def test_generation_takes_what_neighbours_predict(document, monkeypatch):
    monkeypatch.setattr(neighbours, "HALF", 1e6)  # they alone predict,
    monkeypatch.setattr(neighbours, "SHARPNESS", 0.01)  # and of them the nearest
    model = make(search="token")
    bank = fill(model, document)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    prompt = document[None, 32:52]
    greedy = model.generate(prompt, memory=bank, **options)
    assert torch.equal(greedy[0, 20:], document[52:58])
    beams = model.generate(prompt, memory=bank, num_beams=2, **options)
    assert torch.equal(beams[0, 20:], document[52:58])


def test_training_aims_at_the_networks_own_prediction(input_ids, document):
    model = make()
    bank = fill(model, document)
    model.train()
    mine = model(input_ids, memory=bank, labels=input_ids).loss
    plain = without(model, input_ids, memory=bank, labels=input_ids).loss
    assert torch.equal(mine, plain)
    mine.backward()
    model.eval()
    assert not torch.equal(model(input_ids, memory=bank, labels=input_ids).loss, plain)


@torch.no_grad()
def test_ids_that_follow_are_those_of_documents(document):
    model = make()
    bank = fill(model, document[:30], document[40:48])
    sample = bank.sample(4096)
    found = bank.next_ids(sample.rows, sample.generation)
    pairs = zip(bank.locate(sample.rows), found.flatten(0, 2).tolist(), strict=True)
    texts = {"a": [*document[:30].tolist(), -1, -1, -1], "b": [*document[40:48].tolist(), -1]}
    assert all(texts[place.document_id][place.start + 1 : place.start + 5] == ids for place, ids in pairs)
    assert bank.next_ids(torch.tensor([[-1]]), bank.generation).tolist() == [[[-1] * 4]]
    assert bank.sample(2).rows.tolist() == [[[0, 9]]]
    bank.delete("a")
    with pytest.raises(ChangedMemoryError):
        bank.next_ids(sample.rows, sample.generation)
    evicting = fill(model, document, capacity_tokens=40)
    rows = evicting.sample(10)
    kept = [place.start for place in evicting.locate(rows.rows)]
    ids = evicting.next_ids(rows.rows, rows.generation)[0, 0]
    follow = torch.cat([document, torch.tensor([-1] * 4)])
    assert all(torch.equal(each, follow[start + 1 : start + 5]) for start, each in zip(kept, ids, strict=True))


@torch.no_grad()
def test_under_autocast_neighbours_are_those_of_full_precision(input_ids, document):
    model = make(search="token")
    bank = fill(model, document)
    expected = model(input_ids, memory=bank, output_memory_reads=True).memory_neighbours
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(input_ids, memory=bank, output_memory_reads=True)
    torch.testing.assert_close(output.memory_neighbours.share, expected.share, rtol=1e-3, atol=1e-5)
    assert output.logits.isfinite().all()


def test_gradients_are_those_of_the_mixture():
    """Tokens that several neighbours predict, and places without one, gain once and lose once."""
    logits = torch.randn(2, 6, requires_grad=True)
    ids, weights = (
        torch.tensor([[2, 2, 3, -1], [0, 5, 0, 9]]),
        torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.2, 0.5, 0.1, 0.2]]),
    )
    share = torch.tensor([0.3, 0.6])
    plain = torch.zeros(2, 6)
    for row, token, weight in ((0, 2, 0.8), (0, 3, 0.2), (1, 0, 0.3), (1, 5, 0.5)):  # token 9 is none of the model's
        plain[row, token] = weight
    expected = ((1 - share[:, None]) * logits.softmax(1) + share[:, None] * plain).log()
    found = neighbours.mixed(logits, share, ids, weights)
    torch.testing.assert_close(found, expected)
    for part in range(12):
        one, other = (
            torch.autograd.grad(each.flatten()[part], logits, retain_graph=True)[0] for each in (found, expected)
        )
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("form", FORMS[:2])
@torch.no_grad()
def test_padding_in_front_changes_nothing(form, input_ids, document, monkeypatch):
    monkeypatch.setattr(neighbours, "HALF", 0.5)
    model = make(**form)
    bank = fill(model, document)
    expected = model(input_ids, memory=bank).logits
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.int64), input_ids], dim=1)
    mask = torch.cat([torch.zeros(2, 5, dtype=torch.int64), torch.ones_like(input_ids)], dim=1)
    found = model(padded, attention_mask=mask, memory=bank, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(found[:, 5:], expected, rtol=1e-3, atol=1e-3)
    keys = model(input_ids, memory=bank, output_memory_keys=True).memory_keys
    plain = without(model, input_ids, output_memory_keys=True).memory_keys
    assert all(torch.equal(one, other) for one, other in zip(keys, plain, strict=True))


@torch.no_grad()
def test_candidates_are_not_read(input_ids, document):
    model = make(search="token")
    read = []
    for count in (0, COUNT):
        model.config.num_neighbours = count
        bank = fill(model, document)
        model(input_ids, memory=bank)
        read.append(bank.info("a").num_reads)
    assert read[0] == read[1] > 0


@torch.no_grad()
def test_what_follows_is_of_the_pass(document):
    model = make()
    bank = fill(model, document[:80], capacity_tokens=120)
    with reading_as(model, {}):
        sample = bank.sample(100)
        before = bank.next_ids(sample.rows, sample.generation)
        model.memorize(bank, document[80:100], document_id="a", append=True)
        model.memorize(bank, document[:60], document_id="b")  # evicts the first chunks of "a", whose rows are used anew
        after = bank.next_ids(sample.rows, sample.generation)
    assert ((after == before) | (after == -1)).all()
    assert (after == before).float().mean() > 0.3


def test_what_can_not_have_neighbours_is_refused(input_ids, document):
    with pytest.raises(ValueError, match="num_neighbours.*must be from 0"):
        LongMemConfig(num_neighbours=-1)

    class Plain:  # a memory of somebody's own, as the protocol of attention has it
        def __init__(self, bank):
            self._bank = bank

        def __getattr__(self, name):
            if name in ("nearest", "sample", "next_ids", "attend"):
                raise AttributeError(name)
            return getattr(self._bank, name)

    model = make()
    plain = Plain(fill(model, document))
    with pytest.raises(ValueError, match="num_neighbours.*must be 0 for a memory without"):
        model(input_ids, memory=plain)
    without(model, input_ids, memory=plain)


def test_the_number_of_neighbours_is_saved(tmp_path):
    backbone = build_backbone("llama")
    backbone.save_pretrained(tmp_path / "backbone")
    model = LongMemForCausalLM.from_backbone(str(tmp_path / "backbone"), **SETTINGS, num_neighbours=5)
    model.save_pretrained(tmp_path / "saved")
    assert LongMemForCausalLM.from_pretrained(tmp_path / "saved").config.num_neighbours == 5
    assert LongMemForCausalLM.from_pretrained(tmp_path / "saved", num_neighbours=3).config.num_neighbours == 3
