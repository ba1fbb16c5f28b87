"""The model `longmem` of lm-evaluation-harness: `hf` without memory, and with it a bank for each long request."""

from __future__ import annotations

import gc
import random
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_tasks import write_tasks
from tiny_models import save_tiny_backbone, some_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from longmem import LongMemForCausalLM, MemoryBank

WINDOW = 16
TEXT = some_text(20, seed=5)  # far longer than the window


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As elsewhere, with an eos token that is one of the letters."""
    folder = save_tiny_backbone(tmp_path_factory.mktemp("backbone"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "~"
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def lm(model: Any, memory: str = "on", **options: Any) -> Any:
    from longmem.evaluation.harness import LongMemLM

    return LongMemLM(model, memory=memory, **{"window": WINDOW, "batch_size": 3, **options})


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, arguments=each, idx=number) for number, each in enumerate(arguments)]


def trained(model: Any) -> Any:
    """Return the model with a side network that is no longer the backbone."""
    with torch.no_grad():
        for weight in model.side_network.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model


def ids(model: Any, text: str) -> list[int]:
    return model.tokenizer(text)["input_ids"]


def evaluate(model: Any, tasks: Path) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    names = ["choose", "continue", "roll"]
    return lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0)


def test_without_memory_it_scores_as_hf_does_on_three_tasks(model, backbone_folder, tasks, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks the system for a second
    plain = HFLM(
        AutoModelForCausalLM.from_pretrained(backbone_folder),
        tokenizer=AutoTokenizer.from_pretrained(backbone_folder),
        max_length=WINDOW,
        batch_size=3,
    )
    expected, found = evaluate(plain, tasks), evaluate(lm(model, "off"), tasks)
    assert set(found["results"]) == {"choose", "continue", "roll"}
    for task, metrics in expected["results"].items():
        numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
        assert numbers == pytest.approx({name: found["results"][task][name] for name in numbers}, abs=1e-4, rel=1e-4)
        for sample, own in zip(expected["samples"][task], found["samples"][task], strict=True):
            assert sample["arguments"] == own["arguments"]
            if task == "continue":
                assert sample["resps"] == own["resps"]
            else:
                torch.testing.assert_close(logliks(own), logliks(sample), rtol=0, atol=1e-4)
    with_memory = evaluate(lm(model, "on"), tasks)
    for task in ("choose", "roll"):
        changes = [
            (logliks(own) - logliks(sample)).abs().max().item() > 1e-3
            for sample, own in zip(expected["samples"][task], with_memory["samples"][task], strict=True)
        ]
        assert changes == [False, True] * 3  # every other text is longer than the window


def logliks(sample: dict[str, Any]) -> torch.Tensor:
    values = [value[0][0] if isinstance(value[0], (list, tuple)) else value[0] for value in sample["resps"]]
    return torch.tensor(values, dtype=torch.float64)


def by_hand(model: Any, past: list[int], local: list[int], continuation: list[int]) -> torch.Tensor:
    """Return the log-probabilities of a continuation after a local context, reading a bank of what came before."""
    bank = MemoryBank.for_model(model)
    model.memorize(bank, torch.tensor(past), "past")
    with torch.no_grad():
        logits = model(torch.tensor([[*local, *continuation[:-1]]]), memory=bank).logits[0, len(local) - 1 :]
    return logits.float().log_softmax(-1)[torch.arange(len(continuation)), torch.tensor(continuation)]


@pytest.mark.parametrize("local_tokens", [None, 5])
def test_a_long_request_reads_a_bank_of_what_overflows_its_window(model, local_tokens):
    model = trained(model)
    continuation = " and fell"
    ((found, greedy),) = lm(model, local_tokens=local_tokens).loglikelihood(
        requests("loglikelihood", [(TEXT, continuation)])
    )
    tokens, kept = ids(model, TEXT), local_tokens or WINDOW + 1 - len(continuation)
    expected = by_hand(model, tokens[:-kept], tokens[-kept:], ids(model, continuation))
    assert found == pytest.approx(expected.sum().item(), abs=1e-4)
    assert not greedy
    ((off, _),) = lm(model, "off").loglikelihood(requests("loglikelihood", [(TEXT, continuation)]))
    assert abs(found - off) > 1e-2


def test_a_request_that_just_fits_reads_nothing(model):
    context, continuation = TEXT[: WINDOW - 3], TEXT[WINDOW - 3 : WINDOW + 1]
    longer = TEXT[: WINDOW + 6 - 3], TEXT[WINDOW + 6 - 3 : WINDOW + 6 + 1]
    pairs = requests("loglikelihood", [(context, continuation), longer])
    model = trained(model)
    on, off = (lm(model, memory).loglikelihood(pairs) for memory in ("on", "off"))
    assert on[0][0] == pytest.approx(off[0][0], abs=1e-5)
    assert on[1][0] != pytest.approx(off[1][0], abs=1e-3)


def test_requests_in_any_order_and_company_have_the_same_scores(model):
    """Options of one context, a context that goes on with another one, and short ones between them."""
    model = trained(model)
    pairs = [(TEXT, " cat"), (TEXT, " the old mat"), (TEXT[:9], " dog"), (f"{TEXT} and then", " cat"), ("", TEXT[:8])]
    pairs += [(some_text(20, seed=6), " cat"), (TEXT[3:], " cat"), (TEXT, " dog")]
    for local_tokens in (None, 4):
        own = lm(model, local_tokens=local_tokens)
        alone = [own.loglikelihood(requests("loglikelihood", [pair]))[0] for pair in pairs]
        order = list(range(len(pairs)))
        random.Random(0).shuffle(order)
        together = own.loglikelihood(requests("loglikelihood", [pairs[number] for number in order]))
        for number, (value, greedy) in zip(order, together, strict=True):
            assert value == pytest.approx(alone[number][0], abs=1e-4)
            assert greedy == alone[number][1]


def test_options_share_the_encoding_of_their_context(model, monkeypatch):
    encoded = []
    encode = type(model.encoder).encode
    monkeypatch.setattr(
        type(model.encoder), "encode", lambda self, ids, **o: encoded.append(ids.numel()) or encode(self, ids, **o)
    )
    pairs = requests("loglikelihood", [(TEXT, option) for option in (" cat", " dog", " old mat")])
    lm(model, local_tokens=4).loglikelihood(pairs)
    assert sum(encoded) == len(TEXT) - 4
    encoded.clear()
    lm(model).loglikelihood(pairs)  # the longest option leaves least in the window: the shorter past goes on
    assert sum(encoded) < len(TEXT) + 2 * WINDOW


def test_no_bank_outlives_its_call(model, monkeypatch):
    made = []
    for_model = MemoryBank.for_model

    def remembered(*arguments: Any, **options: Any) -> MemoryBank:
        bank = for_model(*arguments, **options)
        made.append(weakref.ref(bank))
        return bank

    monkeypatch.setattr(MemoryBank, "for_model", remembered)
    own = lm(model)
    before = set(vars(own))
    own.loglikelihood(requests("loglikelihood", [(TEXT, " cat"), (some_text(20, seed=6), " cat")]))
    own.generate_until(requests("generate_until", [(TEXT, {"until": ["\n"], "max_gen_toks": 3})]))
    gc.collect()
    assert len(made) == 3
    assert not any(bank() is not None for bank in made)
    assert set(vars(own)) == before


def test_windows_of_a_text_read_all_that_stands_before_them(model):
    model = trained(model)
    text = TEXT[: 3 * WINDOW + 5]
    (found,) = lm(model).loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    tokens, prefix = ids(model, text), ids(model, "~")
    with torch.no_grad():
        first = model(torch.tensor([[*prefix, *tokens[: WINDOW - 1]]])).logits[0].log_softmax(-1)
    expected = first[torch.arange(WINDOW), torch.tensor(tokens[:WINDOW])].sum()
    for start in (WINDOW, 2 * WINDOW):
        window = tokens[start : start + WINDOW]
        expected = expected + by_hand(model, tokens[: start - 1], tokens[start - 1 : start], window).sum()
    start = 3 * WINDOW  # the last window is short, and filled up with context
    kept = WINDOW + 1 - 5
    expected = expected + by_hand(model, tokens[: start - kept], tokens[start - kept : start], tokens[start:]).sum()
    assert found == pytest.approx(expected.item(), abs=1e-3)
    other = requests("loglikelihood_rolling", [(some_text(20, seed=8),), (text,), ("cat",)])
    assert lm(model).loglikelihood_rolling(other)[1] == pytest.approx(found, abs=1e-4)


def test_generation_continues_what_is_likeliest_with_memory(model):
    model = trained(model)
    options = {"until": ["\n"], "max_gen_toks": 5}
    contexts = [TEXT, TEXT[:6], some_text(20, seed=6), TEXT[:5], TEXT]
    own = lm(model)
    texts = own.generate_until(requests("generate_until", [(context, options) for context in contexts]))
    assert texts[0] == texts[4]
    alone = [own.generate_until(requests("generate_until", [(context, options)]))[0] for context in contexts]
    assert texts == alone
    kept = WINDOW - 5
    bank = MemoryBank.for_model(model)
    model.memorize(bank, torch.tensor(ids(model, TEXT)[:-kept]), "past")
    tokens = torch.tensor([ids(model, TEXT)[-kept:]])
    output = model.generate(tokens, memory=bank, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert texts[0] == model.tokenizer.decode(output[0, kept:]).split("\n")[0].split("~")[0]
    off = lm(model, "off").generate_until(requests("generate_until", [(context, options) for context in contexts]))
    assert [on == other for on, other in zip(texts, off, strict=True)] == [False, True, False, True, False]


def test_generation_stops_and_samples_as_asked(model):
    own = lm(model)
    (whole,) = own.generate_until(requests("generate_until", [(TEXT, {"until": [], "max_gen_toks": 6})]))
    stop = whole[3]
    (cut,) = own.generate_until(requests("generate_until", [(TEXT, {"until": [stop], "max_gen_toks": 6})]))
    assert cut == whole[: whole.index(stop)]
    hot = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 50.0}
    sampled = own.generate_until(requests("generate_until", [(TEXT, hot)] * 3))
    assert len({whole, *sampled}) > 2


# lm-eval's command line says cuda:0 on every machine, and its `hf` calls the window so.
@pytest.mark.parametrize(("device", "window"), [("cpu", "window"), ("cuda:0", "max_length")])
def test_it_is_registered_and_reads_model_args(backbone_folder, device, window):
    from lm_eval.api.registry import get_model

    import longmem.evaluation.harness  # noqa: F401  registers it

    arguments = f"pretrained={backbone_folder},dtype=float32,{window}=24,memory=off,local_tokens=8"
    own = get_model("longmem").create_from_arg_string(
        arguments, {"batch_size": 2, "device": device, "max_batch_size": None}
    )
    assert isinstance(own.model, LongMemForCausalLM)
    assert (own.max_length, own.memory, own.local_tokens, own.batch_size) == (24, False, 8, 2)
    assert own.tokenizer.pad_token is not None
    assert own.device.type == ("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def test_chat_templates_are_those_of_the_tokenizer(model):
    own = lm(model)
    own.tokenizer.chat_template = "{% for message in messages %}<{{message.role}}>{{message.content}}{% endfor %}"
    assert own.apply_chat_template([{"role": "user", "content": "cat"}]) == "<user>cat"
    assert own.tokenizer_name == own.tokenizer.name_or_path.replace("/", "__")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "`window` must be at least 2 tokens, got 1"),
        ({"max_length": 24}, "`max_length` is another name of `window`, got 24 and 16"),
        ({"memory": "onn"}, "`memory` must be on or off, got 'onn'"),
        ({"local_tokens": 0}, "`local_tokens` must be at least 1"),
    ],
)
def test_wrong_settings_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        lm(model, **options)


def test_what_does_not_fit_the_window_is_refused(model):
    with pytest.raises(ValueError, match="`window` must hold what follows a context, got 16 tokens for 17"):
        lm(model).loglikelihood(requests("loglikelihood", [(TEXT, TEXT[: WINDOW + 1])]))
    with pytest.raises(ValueError, match="`max_gen_toks`"):
        lm(model).generate_until(requests("generate_until", [(TEXT, {"until": [], "max_gen_toks": WINDOW})]))


def test_a_tokenizer_without_an_end_is_refused(model):
    model.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="`eos_token`"):
        lm(model)
