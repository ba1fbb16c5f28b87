"""Streams: equal to a reference without caches, every token in one place, the same after any stop."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from kept_fast import fast
from model.architectures import FORMS, build
from model.conftest import SETTINGS

from longmem import LongMemForCausalLM, MemoryBank, MemoryStream

# Absolute positions, rotary, sliding windows, recurrent layers, attention called directly, latent attention.
TYPES = ["gpt2", "llama", "gemma2", "qwen3_next", "falcon", "deepseek_v3"]


def make(model_type: str = "llama", **options) -> tuple[LongMemForCausalLM, MemoryBank]:
    model = LongMemForCausalLM.from_backbone(build(model_type), **SETTINGS, **FORMS.get(model_type, {})).eval()
    return model, MemoryBank.for_model(model, **{"storage_dtype": "float32", **options})


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 97, (2000,), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def naive_logits(model, bank, tokens, window, keep):
    """Logits at every token, window by window: one forward without cache, then one encoding of what leaves."""
    start, done, rows = 0, 0, []
    while done < len(tokens):
        stop = min(start + window, len(tokens))
        rows.append(model(tokens[None, start:stop], memory=bank).logits[0, done - start :])
        done = stop
        if done < len(tokens):
            leaving = tokens[start : start + window - keep]
            keys, values = model.encode(leaving[None])
            write = bank.append if "naive" in bank else bank.add
            write("naive", [k[0] for k in keys], [v[0] for v in values])
            start += len(leaving)
    return torch.cat(rows)


def losses_of(logits, tokens):
    return torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")


@pytest.mark.parametrize(
    ("model_type", "keep", "length"),
    [
        *itertools.product(TYPES, [None], [200]),
        *fast(2, itertools.product(TYPES, [0], [200])),
        *fast(2, itertools.product(TYPES, [28], [110])),  # four tokens leave at a time, so these are as many windows
        ("llama", None, 400),
        pytest.param("llama", None, 2000, marks=pytest.mark.slow),
    ],
)
def test_a_stream_equals_a_reference_without_caches(model_type, keep, length, tokens):
    tokens = tokens[:length]
    model, bank = make(model_type)
    stream = model.stream(bank, keep=keep)
    losses = torch.cat([stream.score(part) for part in tokens.split([1, 7, 90, len(tokens) - 98])])
    expected = losses_of(naive_logits(model, bank.empty_like(), tokens, 32, 16 if keep is None else keep), tokens)
    assert losses[0].isnan()
    torch.testing.assert_close(losses[1:], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model_type", fast(3, TYPES))
def test_what_a_stream_generates_is_what_the_reference_would_choose(model_type, tokens):
    model, bank = make(model_type)
    stream = model.stream(bank)
    stream.read(tokens[:45])
    generated = list(stream.generate(40, do_sample=False))
    everything = torch.cat([tokens[:45], torch.tensor(generated)])
    logits = naive_logits(model, bank.empty_like(), everything, 32, 16)[44:-1]
    chosen = logits.gather(1, everything[45:, None])[:, 0]
    assert (chosen >= logits.max(dim=1).values - 1e-3).all()


def test_memory_takes_part(tokens):
    model, bank = make()
    with_memory = model.stream(bank).score(tokens[:300])
    for layer in model.side_network.layers:
        if layer.memory_bias is not None:
            layer.memory_bias.data.fill_(-1e4)
    without = model.stream(bank.empty_like()).score(tokens[:300])
    torch.testing.assert_close(with_memory[1:32], without[1:32])  # the first window has no memory yet
    assert (with_memory[33:] - without[33:]).abs().max() > 1e-2


@pytest.mark.parametrize("sizes", [[1] * 70, [31, 1, 1, 31, 40], [32, 32, 33], [150]])
def test_a_token_is_in_the_window_or_in_memory_and_never_in_both(sizes, tokens):
    model, bank = make()
    stream, read = model.stream(bank, document_id="talk"), 0
    for size in sizes:
        stream.read(tokens[read : read + size])
        read += size
        stored = bank.token_ids("talk") if "talk" in bank else torch.tensor([], dtype=torch.int64)
        assert torch.cat([stored, stream.local_ids]).tolist() == tokens[:read].tolist()
        assert len(stream.local_ids) <= 32
        assert all(document.num_waiting_tokens == 0 for document in bank.documents())
        assert stream._cache is None or stream._cache.get_seq_length() < 32
    assert stream.num_tokens == read


def test_it_goes_on_when_the_bank_is_full(tokens):
    model, bank = make(capacity_tokens=64)
    stream = model.stream(bank)
    assert stream.score(tokens[:500])[1:].isfinite().all()
    assert bank.num_tokens == 64
    (document,) = bank.documents()
    assert document.first_resident_token + 64 + len(stream.local_ids) == 500


@pytest.mark.parametrize("sampling", fast(1, [dict(do_sample=True, temperature=0.8, top_k=20), dict(do_sample=False)]))
def test_stopping_saving_and_opening_again_changes_nothing(sampling, tokens, tmp_path):
    """One stream is saved again and again on its way; from each stop another goes on, over a border of windows."""
    model, bank = make()
    whole = model.stream(bank, seed=3)
    whole.read(tokens[:20])
    expected = list(whole.generate(80, **sampling))

    stream = model.stream(bank.empty_like(), seed=3)
    stream.read(tokens[:20])
    torch.manual_seed(0)  # the random numbers of others play no part
    generated, said = stream.generate(**sampling), []
    for stop in (1, 13, 31, 32, 33, 60):
        said += itertools.islice(generated, stop - len(said))
        stream.save(tmp_path / str(stop))
        stream.save(tmp_path / str(stop))
        again = MemoryStream.load(tmp_path / str(stop), model)
        assert again.num_tokens == 20 + stop
        assert said + list(again.generate(20, **sampling)) == expected[: stop + 20], stop
        left = MemoryStream(model, copy.deepcopy(stream.memory), copy.deepcopy(stream._state))
        scored = MemoryStream.load(tmp_path / str(stop), model).score(tokens[:50])
        torch.testing.assert_close(scored, left.score(tokens[:50]), rtol=1e-3, atol=1e-3)
    assert said + list(itertools.islice(generated, 20)) == expected
    stream.save(tmp_path / "end")
    scored = MemoryStream.load(tmp_path / "end", model).score(tokens[:50])
    torch.testing.assert_close(scored, stream.score(tokens[:50]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("interrupted", [1, 2, 3, 4])
def test_an_interrupted_stream_can_go_on(interrupted, tokens, monkeypatch):
    """Ctrl-C after some layers of the n-th forward pass have filled the cache: what was taken in is computed again."""
    model, bank = make()
    stream = model.stream(bank)
    last_layer = model.side_network.layers[-1]
    forward, calls = type(last_layer).forward, []

    def fail_once(layer, *args):
        calls.append(layer is last_layer)
        if sum(calls) == interrupted and calls[-1]:
            raise KeyboardInterrupt
        return forward(layer, *args)

    monkeypatch.setattr(type(last_layer), "forward", fail_once)
    with pytest.raises(KeyboardInterrupt):
        stream.read(tokens[:100])
    read = stream.num_tokens
    assert 0 < read < 100
    found = stream.score(tokens[read:150])
    expected = model.stream(bank.empty_like()).score(tokens[:150])[read:]
    # The first one is predicted in another window when the interruption came after tokens had left the old one.
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-3, atol=1e-3)
    stored = bank.token_ids("stream")
    assert torch.equal(torch.cat([stored, stream.local_ids]), tokens[:150])


def test_sampling_follows_the_seed_and_leaves_other_random_numbers_alone(tokens):
    model, bank = make()
    outputs = []
    for seed in (0, 0, 1):
        stream = model.stream(bank.empty_like(), seed=seed)
        stream.read(tokens[:20])
        torch.manual_seed(7)
        expected = torch.rand(1)
        torch.manual_seed(7)
        outputs.append(list(stream.generate(20, do_sample=True)))
        assert torch.equal(torch.rand(1), expected)
    assert outputs[0] == outputs[1] != outputs[2]


def test_generation_ends_with_the_end_of_sequence_token(tokens):
    model, bank = make()
    stream = model.stream(bank)
    stream.read(tokens[:20])
    free = model.stream(bank.empty_like())
    free.read(tokens[:20])
    expected = list(free.generate(10, do_sample=False))
    end = expected[4]
    got = list(stream.generate(do_sample=False, eos_token_id=end))
    assert got == expected[: expected.index(end) + 1]


def test_a_stream_beside_other_documents_reads_them(tokens):
    model, bank = make()
    model.memorize(bank, tokens[500:700], document_id="book")
    alone = model.stream(bank.empty_like()).score(tokens[:20])
    beside = model.stream(bank).score(tokens[:20])
    assert (alone[1:] - beside[1:]).abs().max() > 1e-3
    assert [document.document_id for document in bank.documents()] == ["book"]  # nothing has left the window yet


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(window=33), "`window` must be"),
        (dict(window=4), "`window` must be"),
        (dict(keep=3), "`keep` must be"),
        (dict(keep=32), "`keep` must be"),
        (dict(document_id="book"), "`document_id` must be new"),
    ],
)
def test_what_a_stream_refuses(options, message, tokens):
    model, bank = make()
    model.memorize(bank, tokens[:20], document_id="book")
    with pytest.raises(ValueError, match=message):
        model.stream(bank, **options)


def test_what_generation_refuses(tokens):
    model, bank = make()
    stream = model.stream(bank)
    with pytest.raises(ValueError, match="`read` a prompt"):
        stream.generate(3)
    stream.read(tokens[:5])
    for name in (
        "num_beams",
        "use_cache",
        "prompt_lookup_num_tokens",
        "max_length",
        "generation_config",
        "stop_strings",
    ):
        with pytest.raises(ValueError, match=f"`{name}` has no meaning"):
            stream.generate(3, **{name: 2})
    with pytest.raises(ValueError, match="Did you mean `temperature`"):
        stream.generate(3, temprature=2)
    with pytest.raises(ValueError, match="another encoder|written by encoder"):
        make("gpt2")[0].stream(bank)
    for memory in ([bank], bank.select):
        with pytest.raises(ValueError, match="`memory` must be one MemoryBank"):
            model.stream(memory, document_id="b")
    model.train()
    for call in (stream.read, stream.score):
        with pytest.raises(ValueError, match="eval mode"):
            call(tokens[:5])
    with pytest.raises(ValueError, match="eval mode"):
        stream.generate(1)
    assert stream.num_tokens == 5


def test_the_models_generation_configuration_says_how_tokens_are_chosen(tokens, capfd):
    model, bank = make()
    free = model.stream(bank.empty_like())
    free.read(tokens[:20])
    expected = list(free.generate(10, do_sample=False))
    config = model.generation_config
    config.eos_token_id, config.min_new_tokens, config.num_beams, config.max_length = [96, expected[4]], 8, 2, 3
    stream = model.stream(bank)
    stream.read(tokens[:20])
    capfd.readouterr()
    assert list(stream.generate()) == expected[: expected.index(expected[4]) + 1]
    assert capfd.readouterr().err == ""  # transformers has nothing to warn about, token after token


def test_two_streams_of_one_bank_keep_their_documents_apart(tokens):
    model, bank = make()
    one, two, same = (model.stream(bank, document_id=name) for name in ("one", "two", "one"))
    for start in range(0, 120, 30):
        one.read(tokens[start : start + 30])
        two.read(tokens[500 + start : 530 + start])
    assert torch.equal(torch.cat([bank.token_ids("one"), one.local_ids]), tokens[:120])
    assert torch.equal(torch.cat([bank.token_ids("two"), two.local_ids]), tokens[500:620])
    with pytest.raises(ValueError, match="one"):
        same.read(tokens[:60])


def test_a_stream_notices_that_the_bank_has_changed(tokens, tmp_path):
    model, bank = make()
    model.memorize(bank, tokens[500:700], document_id="book")
    stream = model.stream(bank)
    stream.read(tokens[:50])
    bank.delete("book")
    model.memorize(bank, tokens[800:900], document_id="other")
    stream.save(tmp_path)
    found = stream.score(tokens[50:70])
    torch.testing.assert_close(found, MemoryStream.load(tmp_path, model).score(tokens[50:70]), rtol=1e-3, atol=1e-3)


def test_a_failed_write_leaves_a_stream_that_can_go_on(tokens, monkeypatch):
    model, bank = make()
    stream = model.stream(bank)
    stream.read(tokens[:30])
    monkeypatch.setattr(model.encoder, "encode", lambda ids: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        list(stream.generate(5, do_sample=False))
    monkeypatch.undo()
    everything = torch.cat([tokens[:30], stream.local_ids[30:], tokens[100:140]])
    found = stream.score(tokens[100:140])
    assert len(found) == 40
    expected = model.stream(bank.empty_like()).score(everything)[-40:]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_folder_without_a_stream_is_refused(tokens, tmp_path):
    model, bank = make()
    with pytest.raises(ValueError, match="`folder` must hold a saved stream"):
        MemoryStream.load(tmp_path, model)
    stream = model.stream(bank)
    stream.read(tokens[:50])
    stream.save(tmp_path)
    stream.read(tokens[50:100])
    stream.save(tmp_path)
    bank.save(tmp_path / "bank-of-mine")
    stream.save(tmp_path)
    assert len(list(tmp_path.glob("bank-*"))) == 2  # the one of the last save, and what is not the stream's
    assert MemoryBank.load(tmp_path / "bank-of-mine", model=model).num_tokens == bank.num_tokens
    with pytest.raises(ValueError, match="encoder"):
        MemoryStream.load(tmp_path, make("gpt2")[0])
    whole = (tmp_path / "stream.json").read_text()
    for part, name, value in [
        ("stream", "keep", None),
        ("stream", "window", 7),
        ("stream", "local_ids", [9999]),
        ("stream", "random", {}),
        ("stream", "window", "8"),
        ("stream", "local_ids", 7),
        ("stream", "is_written", 1),
        ("stream", "random", {"cpu": "AAAA"}),
        (None, "bank", "../elsewhere"),
    ]:
        saved = json.loads(whole)
        target = saved if part is None else saved[part]
        target.pop(name) if value is None else target.update({name: value})
        del saved["checksum"]
        (tmp_path / "stream.json").write_text(json.dumps(saved))
        with pytest.raises(
            ValueError, match=r"`folder` must hold|`window` must|`keep` must|`local_ids` must|`random` must"
        ):
            MemoryStream.load(tmp_path, model)
