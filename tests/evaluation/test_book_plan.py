from __future__ import annotations

import json

import pytest
import torch
from tiny_models import some_text

from longmem.evaluation.book_plan import BookPlan, Cut, files_of_split, read_books, wrong_books

CUTS = (Cut(16, 16), Cut(32, 16))


def test_all_cuts_score_the_same_stretch_of_a_book():
    plan = BookPlan(cuts=CUTS, memory_tokens=64, windows=3)
    places = [
        {
            plan.memorized(cut) + number * cut.stride + cut.window - place
            for number in range(plan.windows)
            for place in range(1, cut.scored + 1)
        }
        for cut in CUTS
    ]
    assert places[1] == set(range(80, 128))
    assert places[1] - places[0] == {80, 96, 112}  # the first tokens of windows that do not overlap
    assert [plan.memorized(cut) for cut in CUTS] == [80, 64]
    assert plan.stop(CUTS[0]) == plan.stop(CUTS[1]) == plan.ends(16)[-1] == plan.num_tokens == 128


def test_a_cut_is_written_as_it_is_read():
    assert Cut.parse("1024/512") == Cut(1024, 512)
    assert str(Cut(1024, 512)) == "1024/512"
    for text, message in (("512", "window/stride"), ("a/b", "window/stride"), ("8/9", "stride from 1 to that")):
        with pytest.raises(ValueError, match=message):
            Cut.parse(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cuts": ()}, "`cuts` must be at least one"),
        ({"cuts": (CUTS[0], CUTS[0])}, "named twice"),
        ({"contexts": (40, 40)}, "named twice"),
        ({"windows": 0}, "`windows` must be at least 1"),
        ({"memory_tokens": 0}, "`memory_tokens` and"),
        ({"context_windows": 4}, "from 1 to the 3 windows of a book, got 4"),
        ({"contexts": (100,)}, "the 96 tokens up to the end of the first window, got 100; memorize 4 tokens more"),
    ],
)
def test_plans_that_cannot_be_are_explained(changes, message):
    with pytest.raises(ValueError, match=message):
        BookPlan(**{"cuts": CUTS, "memory_tokens": 64, "windows": 3, **changes})


def test_files_come_from_a_manifest(tmp_path):
    entries = [
        {"file": f"{name}.txt", "split": split} for name, split in (("a", "train"), ("b", "test"), ("c", "test"))
    ]
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps(entries))
    assert files_of_split(manifest, "test") == [tmp_path / "b.txt", tmp_path / "c.txt"]
    with pytest.raises(ValueError, match=r"must be one of \['test', 'train'\].*got 'dev'"):
        files_of_split(manifest, "dev")
    manifest.write_text(json.dumps([{"name": "a"}]))
    with pytest.raises(ValueError, match="objects that have `file` and `split`"):
        files_of_split(manifest, "test")


def test_books_are_the_first_tokens_of_their_files(tmp_path, model):
    plan = BookPlan(cuts=CUTS, memory_tokens=64, windows=3)
    files = [tmp_path / f"{name}.txt" for name in "abc"]
    for seed, file in enumerate(files):
        file.write_text(some_text(60, seed))
    books = read_books(model.tokenizer, files, plan)
    assert [book.name for book in books] == ["a", "b", "c"]
    for book, file in zip(books, files, strict=True):
        assert model.tokenizer.decode(book.token_ids) == file.read_text()[:128]
    assert [book.name for book in wrong_books(model.tokenizer, books, plan)] == ["b", "c", "a"]
    (manual,) = wrong_books(model.tokenizer, books[:1], plan)
    assert (manual.name, len(manual.token_ids)) == ("Python's manual", plan.first_scored)
    assert len({book.digest for book in books}) == 3
    assert not torch.equal(books[0].token_ids, books[1].token_ids)
    with pytest.raises(ValueError, match="each of another name"):
        read_books(model.tokenizer, [files[0], files[0]], plan)
    files[1].write_text("too short")
    with pytest.raises(ValueError, match="b must have 128 tokens"):
        read_books(model.tokenizer, files, plan)
