"""Features computed ahead are those of the synchronous loop, and nothing of them is read before its time."""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import wait

import pytest
import torch
from kept_fast import fast
from tiny_runs import make_files, make_trainer, trained_weights, without_times

from longmem.backbone.capture import BackboneStates
from longmem.data.lanes import LaneBatch
from longmem.training.encode_ahead import EncodeAhead
from longmem.training.features import Features
from longmem.training.records import read_log

SHORT = (4, 6, 9, 13, 5, 22, 30, 7, 11, 18)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"), SHORT)


@pytest.fixture(scope="module")
def long_files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("long"))


def producers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("encode-ahead")]


# The thread ----------------------------------------------------------------------------------------------------------


def batch_of(number):
    ids = torch.full((1, 4), number)
    return LaneBatch(ids, ids, (4,), ("a",), (4 * number,), (number == 0,), (0,))


class Writer:
    """A source whose features tell their batch, and that may fail or take its time."""

    def __init__(self, fails_at=None, seconds=0.0):
        self.fails_at, self.seconds = fails_at, seconds
        self.begun: list[tuple[int, str]] = []

    def of(self, input_ids, lengths):
        number = int(input_ids[0, 0])
        self.begun.append((number, threading.current_thread().name))
        time.sleep(self.seconds)
        if number == self.fails_at:
            raise RuntimeError(f"batch {number}")
        return Features(BackboneStates(), torch.tensor([[number]], dtype=torch.float32))

    def losses_after(self, context, tokens):
        return tokens.float() + len(context)


def told(features):
    """Return the number of the batch that a writer's features tell."""
    return int(features.losses)


def encoded(ahead):
    """Wait until the thread has come as far as it may."""
    wait([features for _, features in ahead._queue])


def test_the_queue_is_bounded_and_other_batches_are_computed_at_once():
    writer = Writer()
    with EncodeAhead(writer, batch_of, first=10, last=50, ahead=3) as ahead:
        for number in range(10, 20):
            while len(writer.begun) < number - 10 + 3:  # waits for the thread to come as far as it may
                time.sleep(0.001)
            assert told(ahead.of(batch_of(number).input_ids, (4,))) == number
            time.sleep(0.005)
            assert max(each for each, _ in writer.begun) <= number + 3
        assert told(ahead.of(batch_of(2).input_ids, (4,))) == 2
        assert ahead.losses_after(torch.tensor([7, 8]), torch.tensor([1, 2, 3])).tolist() == [3, 4, 5]
        assert told(ahead.of(batch_of(20).input_ids, (4,))) == 20
    here = [number for number, name in writer.begun if not name.startswith("encode-ahead")]
    assert here == [2]
    assert told(ahead.of(batch_of(21).input_ids, (4,))) == 21  # after the block: as without
    assert writer.begun[-1] == (21, threading.current_thread().name)


def test_an_error_in_the_thread_surfaces_at_its_batch_and_the_thread_ends():
    writer, done = Writer(fails_at=5), []

    def use_all():
        with EncodeAhead(writer, batch_of, first=0, last=50, ahead=3) as ahead:
            for number in range(50):
                done.append(told(ahead.of(batch_of(number).input_ids, (4,))))

    with pytest.raises(RuntimeError, match="batch 5"):
        use_all()
    assert done == [0, 1, 2, 3, 4]
    assert not producers()


def test_leaving_does_not_wait_for_the_queue():
    writer = Writer(seconds=0.2)
    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt), EncodeAhead(writer, batch_of, first=0, last=50, ahead=20):
        raise KeyboardInterrupt
    assert time.perf_counter() - began < 2  # 21 were handed over
    assert len(writer.begun) <= 2
    assert not producers()


# In a run ------------------------------------------------------------------------------------------------------------


def contents(bank):
    """What a bank holds: documents, token ids, keys and values of every layer."""
    ids = {each.document_id: bank.token_ids(each.document_id).tolist() for each in bank.documents()}
    rows = torch.arange(bank.num_chunks).expand(2, -1)
    stored = (
        []
        if bank.is_empty
        else [each for layer in bank.memory_layers for each in bank.gather(layer, rows, bank.generation)]
    )
    return ids, [each.clone() for each in stored]


def watched(trainer):
    """Note at every window what each lane can read, and how many later batches are in the queue at that moment."""
    seen, waiting, readable = [], [], trainer.memories.readable

    def noting(batch):
        seen.append([contents(bank) for bank in trainer.memories.banks])
        waiting.append(sum(features.done() for _, features in getattr(trainer.features, "_queue", ())))
        return readable(batch)

    trainer.memories.readable = noting
    return seen, waiting


def computing_threads(trainer):
    """Note which thread computes, and let none be in step with the other."""
    names, computed = [], trainer.frozen.of

    def noting(*arguments):
        names.append(threading.current_thread().name)
        return computed(*arguments)

    trainer.frozen.of = noting
    return names


@pytest.mark.parametrize(
    ("ahead", "overrides"),
    fast(
        1,
        [
            (1, {"optimization__gradient_accumulation": 2, "memory__foreign_lanes": 2}),
            (3, {"features__folder": "features", "memory__start_tokens": 16, "memory__growth_steps": 4}),
            (2, {"loss__long_context_weight": 2, "loss__long_context_tokens": 40, "data__at_document_border": "keep"}),
            (9, {"data__window": 8, "model__config__lora": "{rank: 4, dropout: 0.3}"}),
        ],
    ),
)
def test_a_run_is_the_same_to_the_last_bit_and_reads_the_same(files, tmp_path, overrides, ahead):
    found = []
    for number in (0, ahead):
        folder = {"features__folder": tmp_path / f"features-{number}"} if "features__folder" in overrides else {}
        trainer = make_trainer(
            files,
            output=tmp_path / str(number),
            data__validation="null",
            features__ahead=number,
            **{**overrides, **folder},
        )
        (seen, waiting), threads = watched(trainer), computing_threads(trainer)
        found.append((without_times(trainer.run()), trained_weights(trainer), seen))
        assert len(producers()) == 0
        ran_ahead = [name for name in threads if name.startswith("encode-ahead")]
        per_step = trainer.settings.optimization.gradient_accumulation
        assert len(ran_ahead) == (6 * per_step if number else 0)
        assert number or not any(waiting)
    (records, weights, seen), (others, other_weights, others_seen) = found
    assert records == others
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert len(seen) == len(others_seen) > 0
    for lanes, other_lanes in zip(seen, others_seen, strict=True):
        for (ids, stored), (other_ids, other_stored) in zip(lanes, other_lanes, strict=True):
            assert ids == other_ids
            assert all(map(torch.equal, stored, other_stored))
    assert any(stored for _, stored in seen[-1])


def test_no_lane_can_read_what_it_has_not_read_before(files, tmp_path):
    """Features of later windows exist, but a bank holds the text before the window and nothing after it."""
    trainer = make_trainer(
        files, output=tmp_path, data__validation="null", features__ahead=4, data__window=8, optimization__steps=12
    )
    seen, waiting = watched(trainer)
    readable = trainer.memories.readable

    def late(batch):
        encoded(trainer.features)
        return readable(batch)

    trainer.memories.readable = late
    trainer.run()
    assert len(seen) == 12
    assert waiting[:8] == [4] * 8  # encoded, and not to be seen
    for step, lanes in enumerate(seen):
        for lane, (ids, _) in enumerate(lanes):
            batches = [trainer.lanes.batch(number) for number in range(step + 1)]
            document, before = batches[-1].document_ids[lane], []
            for batch in batches[:-1]:
                if batch.document_ids[lane] != document or batch.is_new[lane]:
                    before = []
                if batch.document_ids[lane] == document:
                    before += batch.input_ids[lane, : batch.lengths[lane]].tolist()
            before = [] if batches[-1].is_new[lane] else before
            read = ids.get(document, [])
            assert len(read) >= min(len(before), 60)  # all that fits, in whole chunks
            assert read == before[len(before) - len(read) :]
            assert set(ids) <= {document}


@pytest.mark.slow
def test_validation_beside_the_thread_changes_nothing(long_files, tmp_path):
    logs = []
    for number in (0, 3):
        trainer = make_trainer(
            long_files, output=tmp_path / str(number), validation__every_steps=2, features__ahead=number
        )
        trainer.run()
        log = read_log(tmp_path / str(number))
        logs.append((without_times(log.steps), log.validations))
    assert len(logs[0][1]) == 3
    assert logs[0] == logs[1]


def test_an_error_of_the_backbone_ends_the_run_and_the_thread(files, tmp_path):
    trainer = make_trainer(files, output=tmp_path, data__validation="null", features__ahead=2)
    computed, count = trainer.frozen.of, []

    def failing(*arguments):
        count.append(1)
        if len(count) == 4:
            raise RuntimeError("out of memory")
        return computed(*arguments)

    trainer.frozen.of = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.run()
    assert trainer.step == 3  # those before it were done
    assert not producers()


def test_a_stopped_run_ends_the_thread_and_goes_on_the_same(files, tmp_path):
    whole = make_trainer(files, output=tmp_path / "whole", data__validation="null")
    whole.run()
    stopped = make_trainer(files, output=tmp_path / "parts", data__validation="null", features__ahead=3)
    train_step = stopped.train_step

    def stopping():
        record = train_step()
        if record.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return record

    stopped.train_step = stopping
    assert len(stopped.run()) == 2
    assert not producers()
    resumed = make_trainer(files, output=tmp_path / "parts", data__validation="null", features__ahead=2)
    threads = computing_threads(resumed)
    assert len(resumed.run()) == 4
    assert sum(name.startswith("encode-ahead") for name in threads) == 4
    logs = [without_times(read_log(tmp_path / name).steps) for name in ("whole", "parts")]
    assert logs[0] == logs[1]
