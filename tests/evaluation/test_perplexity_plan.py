"""Settings of both plans: which windows are scored, what cannot be, and which texts are read."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import some_text

from longmem.evaluation.perplexity import PerplexitySettings
from longmem.evaluation.perplexity.scoring import Cut, Window
from longmem.evaluation.perplexity.texts import digest_of, read_texts

CUTS = (Cut(16, 16), Cut(32, 16))


def documents(**changes: Any) -> PerplexitySettings:
    own = {
        "window": 16,
        "stride": 8,
        "memory_tokens": None,
        "windows_per_document": None,
        "systems": ("backbone", "on"),
    }
    return PerplexitySettings(**{"data": "none", "output": "none", **own, **changes})


def books(**changes: Any) -> PerplexitySettings:
    cuts = {"window": 16, "stride": 16, "other_cuts": ("32/16",)}
    own = {"memory_tokens": 64, "windows_per_document": 3, "systems": ("backbone", "on")}
    return PerplexitySettings(**{"data": "none", "output": "none", "plan": "books", **cuts, **own, **changes})


@pytest.mark.parametrize("num_tokens", [2, 5, 16, 17, 24, 25, 61])
def test_all_windows_of_a_document_score_every_token_but_the_first_once(num_tokens):
    windows = documents().windows(Cut(16, 8), num_tokens)
    scored = [place for window in windows for place in range(window.first_scored, window.end)]
    assert scored == list(range(1, num_tokens))
    for window in windows:
        assert window.end - window.start <= 16
        assert window.start == 0 or window.first_scored - window.start == 8
    some = documents(windows_per_document=2).windows(Cut(16, 8), num_tokens)
    assert len(some) == min(2, len(windows))
    assert set(some) <= set(windows)


def test_windows_of_a_document_are_the_middles_of_its_parts():
    windows = documents(windows_per_document=3).windows(Cut(4, 2), 20)
    assert [window.start // 2 for window in windows] == [1, 4, 7]  # of nine


def test_all_cuts_score_the_same_stretch_of_a_book():
    settings = books()
    assert settings.cuts == CUTS
    places = [
        {place for window in settings.windows(cut, 0) for place in range(window.first_scored, window.end)}
        for cut in CUTS
    ]
    assert places[1] == set(range(80, 128))
    assert places[1] - places[0] == {80, 96, 112}  # the first tokens of windows that do not overlap
    assert [settings.memorized(cut) for cut in CUTS] == [80, 64]
    assert all(settings.windows(cut, 0)[0].start == settings.memorized(cut) for cut in CUTS)
    assert all(settings.windows(cut, 0)[-1].end == settings.needed_tokens == 128 for cut in CUTS)


def test_longer_contexts_are_scored_on_the_first_windows_of_a_book_and_run_once():
    settings = books(systems=("backbone", "on", "context-40"), context_windows=2, other_cuts=("32/16", "24/8"))
    for cut in settings.cuts:
        every = settings.windows(cut, 0, "on")
        assert len(every) == 3
        assert settings.windows(cut, 0, "context-40") == every[:2]
        assert settings.run_on(cut, "on") == cut
    assert [settings.run_on(cut, "context-40") for cut in settings.cuts] == [Cut(32, 16), Cut(32, 16), Cut(24, 8)]


def test_a_cut_is_written_as_it_is_read():
    assert Cut.parse("1024/512") == Cut(1024, 512)
    assert str(Cut(1024, 512)) == "1024/512"
    assert Cut(1024, 512).row(100, 1) == [Window(100, 612, 1124)]
    for text, message in (("512", "window/stride"), ("a/b", "window/stride"), ("8/9", "`stride` from 1 to that")):
        with pytest.raises(ValueError, match=message):
            Cut.parse(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"other_cuts": ("16/16",)}, "`other_cuts` must be others than 16/16"),
        ({"other_cuts": ("32/16", "32/16")}, "none twice"),
        ({"other_cuts": ("16-8",)}, "written as window/stride"),
        ({"memory_tokens": None}, "must be numbers for books, got null"),
        ({"windows_per_document": None}, "must be numbers for books, got null"),
        ({"systems": ("on", "context-40"), "context_windows": 4}, "at most the 3 windows of a book"),
        ({"context_windows": 2}, "for systems context-N, got 2"),
        (
            {"systems": ("on", "context-100")},
            "the 96 tokens up to .* first window, got context-100; memorize 4",
        ),
        ({"systems": ("on", "bm25")}, "need a `stride` shorter than the window"),
    ],
)
def test_books_that_cannot_be_scored_so_are_explained(changes, message):
    with pytest.raises(ValueError, match=message):
        books(**changes)
    books(systems=("on", "context-96"), context_windows=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride": 16}, "`stride` must be less than the `window`"),
        ({"stride": 6}, "the nearest below is 4"),
        ({"memory_tokens": 8}, "hold the 16 tokens"),
        ({"memory_tokens": 18}, "multiple of the model's `chunk_size`"),
        ({"systems": ("context-8",)}, "must be longer than the window"),
        ({"index": "hsnw"}, "`index`"),
        ({"other_cuts": ("32/16",)}, "`other_cuts` is for books"),
        ({"context_windows": 1}, "`context_windows` is for books"),
        ({"grow": True}, "`grow` is for books"),
    ],
)
def test_documents_that_cannot_be_scored_so_are_explained(model, changes, message):
    with pytest.raises(ValueError, match=message):
        documents(**changes).validate_for(model)
    documents(memory_tokens=16).validate_for(model)


def test_contexts_must_be_longer_than_all_windows_of_books(model):
    books(systems=("on", "context-33")).validate_for(model)
    with pytest.raises(ValueError, match="longer than the window of 32 tokens, got 32"):
        books(systems=("on", "context-32")).validate_for(model)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("longmem.data.sources.python_manual", lambda: "the manual " * 20)  # the real one is long
    return tmp_path / "cache"


def test_wrong_memory_is_the_next_document_or_a_manual(model, tmp_path, cache):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.txt").write_text(name * 20)
    (folder / "short.txt").write_text("x")  # of one token: nothing to score
    texts = read_texts(model.tokenizer, documents(data=str(folder)))
    assert [(each.name, each.wrong_name) for each in texts] == [("a", "b"), ("b", "c"), ("c", "a")]
    for number, each in enumerate(texts):
        assert each.wrong_ids.tolist() == texts[(number + 1) % 3].token_ids.tolist()
    (one,) = read_texts(model.tokenizer, documents(data=str(folder), limit=1))
    assert one.wrong_name == "Python's manual"
    assert model.tokenizer.decode(one.wrong_ids).startswith("the manual the")
    (folder / "list.json").write_text(
        '[{"file": "c.txt", "split": "test"}, {"file": "b.txt", "split": "train"}, {"file": "a.txt", "split": "test"}]'
    )
    listed = {"data": str(folder / "list.json")}
    assert [each.name for each in read_texts(model.tokenizer, documents(**listed))] == ["c", "a"]
    assert [each.name for each in read_texts(model.tokenizer, documents(**listed, split="train"))] == ["b"]
    cut = read_texts(model.tokenizer, documents(**listed, max_tokens=25))
    assert [len(each.token_ids) for each in cut] == [20, 5]


def test_the_manual_is_not_its_own_wrong_memory(model, cache):
    (manual,) = read_texts(model.tokenizer, documents(data="python-manual"))
    assert manual.wrong_name == "docstrings of Python's library"
    assert model.tokenizer.decode(manual.token_ids).startswith("the manual the")
    assert "the manual the" not in model.tokenizer.decode(manual.wrong_ids)


def test_books_are_the_first_tokens_of_their_files(model, tmp_path, cache):
    files = [tmp_path / "texts" / f"{name}.txt" for name in "abc"]
    files[0].parent.mkdir()
    for seed, file in enumerate(files):
        file.write_text(some_text(60, seed))
    settings = books(data=str(files[0].parent))
    texts = read_texts(model.tokenizer, settings)
    assert [(each.name, each.wrong_name) for each in texts] == [("a", "b"), ("b", "c"), ("c", "a")]
    for each, file in zip(texts, files, strict=True):
        assert model.tokenizer.decode(each.token_ids) == file.read_text()[:128]
    (one,) = read_texts(model.tokenizer, books(data=str(files[0])))
    assert (one.wrong_name, len(one.wrong_ids)) == ("Python's manual", settings.first_scored)
    assert len({digest_of([each]) for each in texts}) == 3
    assert digest_of(texts) != digest_of(texts[::-1])
    files[1].write_text("too short")
    with pytest.raises(ValueError, match="b must have 128 tokens, the scored ones and those before them, got 9"):
        read_texts(model.tokenizer, settings)
