"""Lanes: every token once an epoch, whatever the step asked for and the number of processes."""

from __future__ import annotations

import pickle
from collections import defaultdict
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem.data import LaneBatch, Lanes, load_corpus, process_lanes

WINDOW = 4


def make_corpus(lengths: list[int]) -> Dataset:
    """Return documents of the given lengths in which every token is different, and none is 0, which is the padding."""
    starts = [1 + sum(lengths[:i]) for i in range(len(lengths))]
    ids = [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)]
    return Dataset.from_dict({"document_id": [f"document {i}" for i in range(len(lengths))], "input_ids": ids})


def make_lanes(lengths: tuple[int, ...] = (9, 4, 23, 2, 17, 8, 5, 30), **settings: Any) -> Lanes:
    return Lanes(make_corpus(list(lengths)), **{"num_lanes": 4, "window": WINDOW, **settings})


def windows_of(tokens: list[int], window: int) -> list[tuple[int, list[int]]]:
    """Return (offset, tokens) of each window of a document, without a last one of a single token."""
    pieces = [(start, tokens[start : start + window]) for start in range(0, len(tokens), window)]
    return [piece for piece in pieces if len(piece[1]) > 1]


def read_streams(lanes: Lanes, num_steps: int) -> list[list[tuple[str, int, list[int], int]]]:
    """Return (document, offset, tokens, epoch) of each lane and step, read one after the other."""
    streams: list[list[tuple[str, int, list[int], int]]] = [[] for _ in range(lanes.num_lanes)]
    for step in range(num_steps):
        batch = lanes.batch(step)
        rows = [row[:length].tolist() for row, length in zip(batch.input_ids, batch.lengths, strict=True)]
        for lane, read in enumerate(zip(batch.document_ids, batch.offsets, rows, batch.epochs, strict=True)):
            streams[lane].append(read)
    return streams


def assert_same(one: LaneBatch, other: LaneBatch) -> None:
    for name in ("input_ids", "labels"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    for name in ("lengths", "document_ids", "offsets", "is_new", "epochs"):
        assert getattr(one, name) == getattr(other, name)


def joined(batches: list[LaneBatch]) -> LaneBatch:
    tuples = ("lengths", "document_ids", "offsets", "is_new", "epochs")
    return LaneBatch(
        torch.cat([batch.input_ids for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        **{name: tuple(value for batch in batches for value in getattr(batch, name)) for name in tuples},
    )


@st.composite
def some_lanes(draw: st.DrawFn) -> tuple[Dataset, Lanes]:
    """Draw a corpus with as many documents and windows as its lanes need, and its lanes."""
    window, shared = draw(st.integers(2, 5)), draw(st.integers(1, 3))
    groups = draw(st.integers(1, 4))
    long_enough = st.integers((shared - 1) * window + 2, 6 * window)
    lengths = draw(st.lists(long_enough, min_size=groups, max_size=groups + 5)) + draw(
        st.lists(st.integers(0, 1), max_size=2)
    )
    corpus = make_corpus(draw(st.permutations(lengths)))
    seed, shuffle = draw(st.integers(0, 9)), draw(st.booleans())
    options = {"seed": seed, "shuffle": shuffle, "lanes_per_document": shared}
    return corpus, Lanes(corpus, num_lanes=groups * shared, window=window, **options)


@given(some_lanes())
@settings(max_examples=25, deadline=None)
def test_every_window_once_per_epoch(case):
    corpus, lanes = case
    streams = read_streams(lanes, 2 * lanes.steps_per_epoch)
    read = defaultdict(list)
    for stream in streams:
        assert [epoch for *_, epoch in stream] == sorted(epoch for *_, epoch in stream)
        for name, offset, tokens, epoch in stream:
            read[epoch].append((name, offset, tokens))
    expected = sorted(
        (row["document_id"], offset, tokens)
        for row in corpus
        for offset, tokens in windows_of(row["input_ids"], lanes.window)
    )
    assert sorted(read[0]) == expected
    assert lanes.num_tokens == sum(len(tokens) for _, _, tokens in expected)
    assert lanes.steps_per_epoch == max(sum(epoch == 0 for *_, epoch in stream) for stream in streams)


@given(some_lanes())
@settings(max_examples=25, deadline=None)
def test_windows_follow_one_another(case):
    corpus, lanes = case
    documents = {row["document_id"]: dict(windows_of(row["input_ids"], lanes.window)) for row in corpus}
    before: LaneBatch | None = None
    for step in range(2 * lanes.steps_per_epoch):
        batch = lanes.batch(step)
        for lane in range(lanes.num_lanes):
            name, offset = batch.document_ids[lane], batch.offsets[lane]
            assert batch.input_ids[lane, : batch.lengths[lane]].tolist() == documents[name][offset], "one document only"
            if not batch.is_new[lane]:
                assert before is not None
                assert (before.document_ids[lane], before.offsets[lane] + lanes.window) == (name, offset)
            elif lanes.lanes_per_document == 1:
                assert offset == 0
        before = batch


@given(some_lanes(), st.data())
@settings(max_examples=25, deadline=None)
def test_any_step_at_any_time(case, data):
    corpus, lanes = case
    in_order = [lanes.batch(step) for step in range(3 * lanes.steps_per_epoch)]
    fresh = Lanes(
        corpus,
        num_lanes=lanes.num_lanes,
        window=lanes.window,
        seed=lanes.seed,
        shuffle=lanes.shuffle,
        lanes_per_document=lanes.lanes_per_document,
    )
    for step in data.draw(st.lists(st.integers(0, len(in_order) - 1), max_size=6)):
        assert_same(fresh.batch(step), in_order[step])


@given(some_lanes(), st.sampled_from([1, 2, 4]))
@settings(max_examples=25, deadline=None)
def test_processes_read_the_same_streams(case, num_processes):
    corpus, lanes = case
    wide = Lanes(
        corpus.select([i for i in range(len(corpus)) if len(corpus[i]["input_ids"]) > 1] * 4),
        num_lanes=lanes.num_lanes * 4,
        window=lanes.window,
        seed=lanes.seed,
        shuffle=lanes.shuffle,
        lanes_per_document=lanes.lanes_per_document,
    )
    shares = [process_lanes(wide.num_lanes, index, num_processes) for index in range(num_processes)]
    for step in (0, 3, wide.steps_per_epoch + 1):
        assert_same(joined([wide.batch(step, own) for own in shares]), wide.batch(step))


def test_padding():
    batch = make_lanes((7, 6), num_lanes=2, shuffle=False).batch(1)
    assert batch.input_ids.tolist() == [[5, 6, 7, 0], [12, 13, 0, 0]]
    assert batch.labels.tolist() == [[5, 6, 7, -100], [12, 13, -100, -100]]
    assert batch.lengths == (3, 2)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.long


def test_last_window_of_one_token_is_left_out():
    lanes = make_lanes((5, 6), num_lanes=1, shuffle=False)
    assert [lanes.batch(step).lengths[0] for step in range(4)] == [4, 4, 2, 4]
    assert lanes.num_tokens == 10


def test_order_depends_on_seed_and_epoch():
    def first_epochs(**settings: Any) -> list[list[str]]:
        lanes = make_lanes((4,) * 12, num_lanes=1, **settings)
        names = [lanes.batch(step).document_ids[0] for step in range(24)]
        return [names[:12], names[12:]]

    first, second = first_epochs(seed=1)
    assert first_epochs(seed=1) == [first, second]
    assert first != second
    assert sorted(first) == sorted(second)
    assert first_epochs(seed=2)[0] != first
    in_order = [f"document {i}" for i in range(12)]
    assert first_epochs(shuffle=False) == [in_order, in_order] != [first, second]


def test_lanes_share_documents():
    lanes = make_lanes((23, 18), num_lanes=4, lanes_per_document=2, shuffle=False)  # 6 and 5 windows
    starts = lanes.batch(0)
    assert starts.document_ids == ("document 0", "document 0", "document 1", "document 1")
    assert starts.offsets == (0, 3 * WINDOW, 0, 2 * WINDOW)
    assert starts.is_new == (True,) * 4
    assert lanes.batch(2).is_new == (False, False, True, False)
    assert lanes.batch(2).lengths == (4, 3, 4, 2)


def test_lanes_move_to_another_process():
    lanes = make_lanes()
    assert lanes.batch(5).epochs, "something is kept"
    assert_same(pickle.loads(pickle.dumps(lanes)).batch(7), lanes.batch(7))


def test_lanes_read_a_selection():
    corpus = make_corpus([9, 4, 23, 2, 17]).select([4, 0])
    lanes = Lanes(corpus, num_lanes=1, window=WINDOW, shuffle=False)
    assert lanes.batch(0).input_ids.tolist() == [corpus[0]["input_ids"][:WINDOW]]
    assert lanes.num_tokens == 16 + 8


def test_lanes_read_a_loaded_corpus(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "b.txt").write_text("another")
    lanes = Lanes(load_corpus(tmp_path, tokenizer), num_lanes=2, window=5, shuffle=False)
    batches = [lanes.batch(step) for step in range(2)]
    read = ["".join(tokenizer.decode(b.input_ids[lane, : b.lengths[lane]]) for b in batches) for lane in range(2)]
    assert read == ["some text", "another"]
    assert batches[0].document_ids == ("a", "b")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_lanes=0), r"`num_lanes` must be at least 1, got 0"),
        (dict(window=1), r"`window` must be at least 2, got 1"),
        (dict(seed=-1), r"`seed` must be at least 0, got -1"),
        (dict(lanes_per_document=0), r"`lanes_per_document` must be at least 1, got 0"),
        (dict(lanes_per_document=3), r"multiple of `lanes_per_document`, got 4 and 3; the next above is 6"),
        (dict(lanes_per_document=2), r"got 2, and 3 documents .* 'document 1' with 4 tokens; .* >= 6\)`"),
        (dict(num_lanes=9), r"got 9 lanes for 8 \* 1; .* `lanes_per_document=3`, so that lanes share long documents"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        make_lanes(**settings)


def test_what_the_message_says_helps():
    corpus = make_lanes()._corpus.with_format(None).filter(lambda document: len(document["input_ids"]) >= 6)
    assert Lanes(corpus, num_lanes=4, window=WINDOW, lanes_per_document=2).batch(0).is_new == (True,) * 4


def test_empty_documents_do_not_count_for_lanes():
    with pytest.raises(ValueError, match=r"got 2 lanes for 1 \* 1; .* `lanes_per_document=2`"):
        make_lanes((1, 9, 0), num_lanes=2)


def test_columns_are_needed():
    with pytest.raises(
        ValueError, match=r"`corpus` must have .* got document_id, input_id; .* Did you mean `input_id`"
    ):
        Lanes(make_corpus([9]).rename_column("input_ids", "input_id"), num_lanes=1, window=4)


def test_steps_and_lanes_that_do_not_exist():
    lanes = make_lanes()
    with pytest.raises(ValueError, match=r"`step` must be 0 or more, got -1"):
        lanes.batch(-1)
    with pytest.raises(ValueError, match=r"lanes must be from 0 to 3 .* got 4"):
        lanes.batch(0, range(2, 5))


def test_processes_that_cannot_share():
    with pytest.raises(ValueError, match=r"multiple of the number of processes, got 6 and 4; the next above is 8"):
        process_lanes(6, 0, 4)
    with pytest.raises(ValueError, match=r"`process_index` must be from 0 to 1, got 2"):
        process_lanes(6, 2, 2)
