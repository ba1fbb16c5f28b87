"""Encoding by one worker, or by several of unequal speed that take their work from one queue."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor

from longmem.memory.protocols import Writer
from longmem.memory.rows.documents import Document, Tail
from longmem.memory.rows.segments import Segment

Job = tuple[Document, list[tuple[Segment, Tensor]]]
Encoded = tuple[Document, list[tuple[Segment, list[Tail]]]]


def encode_all(jobs: Iterable[Job], writers: Sequence[Writer], note: Callable[[int], None]) -> Iterator[Encoded]:
    """Yield documents with their encoded segments, each once all of its segments are there.

    With one writer all is done here, segment after segment. With several, each has a thread, and whoever is free takes the
    next segment, so that a slow one holds up nothing but its last one. `note` is called with the tokens of each segment done.
    """
    if len(writers) > 1:
        yield from _shared(jobs, writers, note)
        return
    for document, segments in jobs:
        encoded = []
        for segment, ids in segments:
            encoded.append((segment, encode_segment(writers[0], ids)))
            note(len(ids))
        yield document, encoded


def encode_segment(writer: Writer, ids: Tensor) -> list[Tail]:
    """Return keys and values of one segment for each memory layer, encoded by itself, as it was when it was written."""
    keys, values = writer.encode(ids[None])
    return [(key[0], value[0]) for key, value in zip(keys, values, strict=True)]


def _shared(jobs: Iterable[Job], writers: Sequence[Writer], note: Callable[[int], None]) -> Iterator[Encoded]:
    work: queue.Queue[tuple[int, int, Tensor] | None] = queue.Queue()
    done: queue.Queue[tuple[int, int, list[Tail] | BaseException]] = queue.Queue()

    def worker(writer: Writer) -> None:
        while (task := work.get()) is not None:
            number, place, ids = task
            try:
                done.put((number, place, encode_segment(writer, ids)))
            except BaseException as error:
                done.put((number, place, error))

    threads = [threading.Thread(target=worker, args=(writer,), daemon=True) for writer in writers]
    for thread in threads:
        thread.start()
    opened: dict[int, tuple[Document, list[Segment], dict[int, list[Tail]]]] = {}
    running = 0
    try:
        tasks = _tasks(enumerate(jobs), opened)
        task = next(tasks, None)
        while task is not None or running:
            while task is not None and running < 2 * len(writers):  # one in hand and one waiting for each
                work.put(task)
                running, task = running + 1, next(tasks, None)
            number, place, tokens = done.get()
            running -= 1
            if isinstance(tokens, BaseException):
                raise tokens
            document, segments, parts = opened[number]
            parts[place] = tokens
            note(segments[place].stop - segments[place].start)
            if len(parts) == len(segments):
                del opened[number]
                yield document, [(segment, parts[each]) for each, segment in enumerate(segments)]
    finally:
        for _ in threads:
            work.put(None)
        for thread in threads:
            thread.join()


def _tasks(
    jobs: Iterable[tuple[int, Job]], opened: dict[int, tuple[Document, list[Segment], dict[int, list[Tail]]]]
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (number of the document, place of the segment, token ids), and open each document when its first one goes out."""
    for number, (document, segments) in jobs:
        opened[number] = (document, [segment for segment, _ in segments], {})
        for place, (_, ids) in enumerate(segments):
            yield number, place, ids
