"""Documents in windows: which tokens each system sees, and that what is lost and saved is counted rightly."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from longmem import MemoryBank
from longmem.evaluation.documents import PerplexitySettings, summarize_documents
from longmem.evaluation.documents import texts as texts_module
from longmem.evaluation.documents.growing import GrowingMemory
from longmem.evaluation.documents.running import score_document, windows_of
from longmem.evaluation.documents.scores import load_scores, save_scores
from longmem.evaluation.documents.tables import document_rows, tables
from longmem.evaluation.documents.texts import ScoredText, Text, read_texts
from longmem.evaluation.documents.views import Views
from longmem.evaluation.documents.windows import Window, plan_windows

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SYSTEMS = ("backbone", "context-24", "bm25", "hidden", "off", "on", "wrong")


def settings_of(**changes: Any) -> PerplexitySettings:
    own = {
        "data": "none",
        "output": "none",
        "window": 16,
        "stride": 8,
        "windows_per_document": None,
        "systems": SYSTEMS,
    }
    return PerplexitySettings(**{**own, "memory_tokens": None, **changes})


def text_of(num_tokens: int, seed: int) -> Text:
    generator = torch.Generator().manual_seed(seed)  # letters, in the tiny model's tokens
    return Text(f"text {seed}", torch.randint(64, 90, (num_tokens,), generator=generator))


def changed(model: Any) -> Any:
    """Return the model with a side network that is no copy of the backbone, so that memory off is something else."""
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in model.side_network.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model


TEXT = ScoredText(text_of(61, 1), text_of(40, 2))
WINDOW = Window(start=40, first_scored=48, end=56)


def bank_of(model: Any, ids: torch.Tensor) -> MemoryBank:
    bank = MemoryBank.for_model(model)
    model.memorize(bank, ids, "text")
    return bank


@pytest.mark.parametrize("num_tokens", [2, 5, 16, 17, 24, 25, 61])
def test_all_windows_score_every_token_but_the_first_once(num_tokens):
    windows = plan_windows(num_tokens, window=16, stride=8)
    scored = [place for window in windows for place in range(window.first_scored, window.end)]
    assert scored == list(range(1, num_tokens))
    for window in windows:
        assert window.end - window.start <= 16
        assert window.start == 0 or window.first_scored - window.start == 8
    some = plan_windows(num_tokens, window=16, stride=8, limit=2)
    assert len(some) == min(2, len(windows))
    assert set(some) <= set(windows)


@torch.no_grad()
def test_a_new_side_network_without_memory_has_the_loss_of_the_backbone(model):
    """Transformers' own loss with `labels` is the reference, the tokens before the scored ones being no targets."""
    settings = settings_of(systems=("backbone", "off"))
    scores = score_document(model, TEXT, settings, windows_of(TEXT, settings))
    windows = windows_of(TEXT, settings)
    for number, window in enumerate(windows):
        ids = TEXT.text.token_ids[None, window.start : window.end]
        labels = ids.clone()
        labels[:, : window.first_scored - window.start] = -100
        expected = model.backbone(ids, labels=labels).loss
        for system in settings.systems:
            found = scores.losses[system][scores.windows == number].mean()
            torch.testing.assert_close(found, expected, **CLOSE, msg=f"{system}, window {number}")


@torch.no_grad()
def test_each_system_reads_what_its_name_says(model):
    changed(model)
    ids, other = TEXT.text.token_ids, TEXT.wrong.token_ids
    right, wrong = bank_of(model, ids[:40]), bank_of(model, other[:40])

    def losses(forward: Any, start: int) -> torch.Tensor:
        logits = forward(ids[None, start:56]).logits[0, -9:-1].float()
        return -logits.log_softmax(-1)[torch.arange(8), ids[48:56]]

    expected = {
        "backbone": losses(model.backbone, 40),
        "context-24": losses(model.backbone, 32),
        "off": losses(model, 40),
        "on": losses(lambda tokens: model(tokens, memory=right), 40),
        "wrong": losses(lambda tokens: model(tokens, memory=wrong), 40),
    }
    scores = score_document(model, TEXT, settings_of(), [WINDOW])
    assert scores.positions.tolist() == list(range(48, 56))
    assert torch.equal(scores.token_ids, ids[48:56])
    for system, own in expected.items():
        torch.testing.assert_close(scores.losses[system], own, **CLOSE, msg=system)
    assert len({tuple(own.tolist()) for own in expected.values()}) == len(expected)


@torch.no_grad()
def test_memory_that_grew_from_window_to_window_is_that_of_all_tokens_before(model):
    changed(model)
    windows = windows_of(TEXT, settings_of())
    scores = score_document(model, TEXT, settings_of(systems=("on", "wrong")), windows)
    for number, window in enumerate(windows):
        (alone,) = score_document(model, TEXT, settings_of(systems=("on", "wrong")), [window]).by_window()
        for system in ("on", "wrong"):
            found = scores.losses[system][scores.windows == number]
            torch.testing.assert_close(found, alone.losses[system], **CLOSE, msg=f"{system}, window {number}")


def test_no_token_is_in_window_and_memory_and_none_is_lost(model):
    """A spy sees what is written; tokens are told apart by their ids, which are all different."""
    ids, other = torch.arange(60), torch.arange(100, 160)
    text = ScoredText(Text("a", ids), Text("b", other))
    written: dict[int, list[int]] = {}
    memorize = model.memorize

    def spy(bank: MemoryBank, tokens: torch.Tensor, document_id: str, **options: Any) -> int:
        written.setdefault(id(bank), []).extend(tokens.tolist())
        return memorize(bank, tokens, document_id, **options)

    model.memorize = spy
    views = Views(model, text, settings_of())
    for window in windows_of(text, settings_of()):
        local, tokens = views.of("on", window)
        in_memory = written[id(local.memory)] if local.memory is not None else []
        assert [*in_memory, *tokens[0].tolist()] == list(range(window.end))
        local, tokens = views.of("wrong", window)
        in_memory = written[id(local.memory)] if local.memory is not None else []
        assert in_memory == list(range(100, 100 + window.start))  # as many tokens, of the other document
        assert tokens[0].tolist() == list(range(window.start, window.end))


@pytest.mark.parametrize("name", ["bm25", "hidden"])
@torch.no_grad()
def test_passages_replace_the_oldest_half_of_what_stands_before_the_scored_tokens(model, name):
    views = Views(model, ScoredText(Text("a", torch.arange(60)), TEXT.wrong), settings_of(window=24, stride=8))
    for window in windows_of(views_text(), settings_of(window=24, stride=8)):
        local, tokens = views.of(name, window)
        assert local.model is model.backbone
        ids = tokens[0].tolist()
        assert len(set(ids)) == len(ids)
        assert max(ids) == window.end - 1
        assert len(ids) <= 24
        if not window.start:
            assert ids == list(range(window.end))
            continue
        middle = window.first_scored - 8
        pasted, rest = ids[: -(window.end - middle)], ids[-(window.end - middle) :]
        assert rest == list(range(middle, window.end))
        assert len(pasted) == 8  # a passage, of the document before
        assert pasted == sorted(pasted)
        assert max(pasted) < middle


def views_text() -> ScoredText:
    return ScoredText(Text("a", torch.arange(60)), TEXT.wrong)


@torch.no_grad()
def test_a_full_memory_holds_the_latest_tokens_whether_it_grew_or_not(model):
    """What would be evicted unread is not encoded; the rest is as if all had been."""
    ids = text_of(200, 3).token_ids
    grown, jumped = (GrowingMemory(model, ids, capacity_tokens=32) for _ in range(2))
    for place in range(8, 161, 8):
        bank = grown.before(place)
    encoded = []
    memorize = model.memorize
    model.memorize = lambda bank, tokens, *rest, **options: (
        encoded.append(len(tokens)) or memorize(bank, tokens, *rest, **options)
    )
    jumped.before(16)
    other = jumped.before(160)
    assert sum(encoded) == 16 + 32
    queries = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(4))
    for layer in bank.memory_layers:
        (scores, rows), (others, other_rows) = (each.search(layer, queries, 8) for each in (bank, other))
        torch.testing.assert_close(scores, others, **CLOSE)
        found, expected = (
            bank.gather(layer, rows[:, 0], bank.generation),
            other.gather(layer, other_rows[:, 0], other.generation),
        )
        torch.testing.assert_close(found, expected, **CLOSE)
    assert bank.num_tokens == 32
    assert torch.equal(bank.token_ids("document"), ids[128:160])
    with pytest.raises(ValueError, match="must not move back"):
        grown.before(8)


def test_capacity_changes_what_is_read(model):
    changed(model)
    every, few = (
        score_document(model, TEXT, settings_of(systems=("off", "on"), memory_tokens=tokens), [WINDOW])
        for tokens in (None, 16)
    )
    assert torch.equal(every.losses["off"], few.losses["off"])
    assert not torch.allclose(every.losses["on"], few.losses["on"])


def test_scores_are_the_same_after_saving(model, tmp_path):
    settings = settings_of(windows_per_document=2)
    scores = score_document(model, TEXT, settings, windows_of(TEXT, settings))
    save_scores(tmp_path / "documents" / "a.safetensors", scores)
    loaded = load_scores(tmp_path / "documents" / "a.safetensors", "text 1", 61, settings.systems)
    for field in dataclasses.fields(scores):
        found, expected = getattr(loaded, field.name), getattr(scores, field.name)
        if field.name == "losses":
            assert all(torch.equal(found[system], expected[system]) for system in settings.systems)
        elif isinstance(expected, torch.Tensor):
            assert torch.equal(found, expected), field.name
        else:
            assert found == expected, field.name


def test_documents_count_the_same_whatever_their_length(model):
    settings = settings_of(systems=("backbone", "off"))
    short, long = (
        score_document(model, each, settings, windows_of(each, settings))
        for each in (TEXT, ScoredText(*[text_of(20, 7)] * 2))
    )
    metrics = summarize_documents([short, long], settings)
    means = [each.losses["backbone"].double().mean() for each in (short, long)]
    part = metrics["lengths"]["all documents"]
    assert part["systems"]["backbone"]["perplexity"]["value"] == pytest.approx(float((sum(means) / 2).exp()))
    assert part["scored_tokens"] == 60 + 19
    assert part["scored_bytes"] == part["scored_tokens"]  # tokens are bytes
    bits = part["systems"]["backbone"]["bits_per_byte"]["value"]
    assert bits == pytest.approx(float(sum(means) / 2 / torch.tensor(2.0).log()))
    assert list(metrics["lengths"]) == ["under 5k tokens", "all documents"]
    assert "under 5k tokens: 2 documents, 79 tokens scored" in [row[0] for row in document_rows(metrics)]
    assert metrics["distances"] is None  # nothing that looks back
    assert "Nats per token" not in tables(metrics)
    ends = part["systems"]["backbone"]["perplexity"]["interval"]
    assert ends == pytest.approx(sorted(float(mean.exp()) for mean in means))  # of two documents


def test_wrong_memory_is_the_next_document_or_a_manual(model, tmp_path, monkeypatch):
    monkeypatch.setenv("LONGMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(texts_module, "python_manual", lambda: "the manual")  # the real one is long
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.txt").write_text(name * 20)
    (folder / "short.txt").write_text("x")  # of one token: nothing to score
    texts = read_texts(model.tokenizer, settings_of(data=str(folder)))
    assert [(each.text.document_id, each.wrong.document_id) for each in texts] == [("a", "b"), ("b", "c"), ("c", "a")]
    (one,) = read_texts(model.tokenizer, settings_of(data=str(folder), limit=1))
    assert one.wrong.document_id == "Python's manual"
    (tmp_path / "texts" / "list.json").write_text(
        '[{"file": "c.txt", "split": "test"}, {"file": "b.txt", "split": "train"}, {"file": "a.txt", "split": "test"}]'
    )
    listed = {"data": str(folder / "list.json")}
    texts = read_texts(model.tokenizer, settings_of(**listed))
    assert [each.text.document_id for each in texts] == ["c", "a"]
    assert [each.text.document_id for each in read_texts(model.tokenizer, settings_of(**listed, split="train"))] == [
        "b"
    ]
    cut = read_texts(model.tokenizer, settings_of(**listed, max_tokens=25))
    assert [len(each.text.token_ids) for each in cut] == [20, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride": 16}, "`stride` must be less than the `window`"),
        ({"stride": 6}, "the nearest below is 4"),
        ({"memory_tokens": 8}, "hold the 16 tokens"),
        ({"memory_tokens": 18}, "multiple of the model's `chunk_size`"),
        ({"systems": ("context-8",)}, "must be longer than the window"),
        ({"index": "hsnw"}, "`index`"),
    ],
)
def test_what_does_not_fit_is_refused(model, changes, message):
    with pytest.raises(ValueError, match=message):
        settings_of(**changes).validate_for(model)
