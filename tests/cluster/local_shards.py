"""Shards in this process, behind a wire: what is asked and answered goes through bytes, and nothing else is shared."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longmem.cluster.shard import Shard
from longmem.cluster.wire import Traffic, num_bytes, pack, raised, unpack


class LocalShards:
    """Answers for shards that run here; those in `silent` do not, those in `dies_after` die when they have."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = [str(each) for each in folders]
        self.shards = [Shard(each, 0) for each in self.folders]
        self.traffic, self.silent = Traffic(), set[int]()
        self.dies_before, self.dies_after = dict[int, str](), dict[int, str]()
        self.methods: list[str] = []

    def __len__(self) -> int:
        return len(self.shards)

    def restart(self, number: int) -> None:
        """Let a shard die and start again."""
        folder = self.shards[number].bank._on_disk
        assert folder is not None
        folder._folder.close()  # as the system closes the files of a dead process: nothing is saved
        self.shards[number] = Shard(self.folders[number], 0)

    def close(self) -> None:
        for each in self.shards:
            each.close()

    def ask(self, asked: Mapping[int, tuple[Any, ...]], *, timeout: float = 1, repeats: bool = True) -> dict[int, Any]:
        answers = {}
        for number, request in asked.items():
            if number in self.silent:
                continue
            for attempt in range(2):
                sent = pack(list(request))
                self.methods.append(request[0])
                self.traffic.calls += 1
                self.traffic.sent += num_bytes(sent)
                dies = [each.get(number) == request[0] and not attempt for each in (self.dies_before, self.dies_after)]
                if dies[0]:
                    self.restart(number)
                else:
                    answer = pickle.loads(pickle.dumps(self.shards[number].ask(*pickle.loads(pickle.dumps(sent)))))
                    if not dies[1]:
                        break
                    self.restart(number)
                if not repeats:
                    for each in (self.dies_before, self.dies_after):
                        each.pop(number, None)
                    raise InterruptedError("it died")
            self.traffic.received += num_bytes(answer)
            answers[number] = raised(unpack(answer))
        return answers


def bytes_of_read(trips: int, num_shards: int, num_queries: int, num_chunks: int, dim: int) -> float:
    """Return what docs/scaling.md, section 3, says of C (one trip) and of E (two), with numbers of two bytes."""
    vector = 2 * dim
    if trips == 1:
        return num_queries * num_shards * (vector + num_chunks * (vector + 16))
    holders = num_shards * (1 - (1 - 1 / num_shards) ** num_chunks)
    return num_queries * (num_shards * (vector + 4 * num_chunks + 2) + holders * vector + num_chunks * 12)
