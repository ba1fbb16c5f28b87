"""Encoding workers: processes with a model each, which write documents to the shards of a bank."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from longmem.cluster import engine
from longmem.cluster.bank import ClusterBank
from longmem.cluster.shard import DistantWriter
from longmem.cluster.wire import Failure, failure_of, pack, raised, unpack
from longmem.encoder.stamp import EncoderStamp
from longmem.errors import StaleMemoryError
from longmem.memory.checks import validate_count
from longmem.memory.memorize import memorize
from longmem.memory.protocols import EncodingModel

IN_FLIGHT = 2  # tasks of a worker: one in hand and one waiting
ATTEMPTS = 4  # at one task, each by another life of a worker


class EncodingWorker:
    """A process that encodes. `make` returns its model, on the device that is to be used."""

    def __init__(self, make: Callable[[], EncodingModel]) -> None:
        self.model = make()
        self._stamp: EncoderStamp | None = None

    def ready(self) -> None:
        """Return when this worker lives."""

    def encode(self, stamp: dict[str, Any], ids: Any) -> Any:
        """Return keys and values of a segment; raise StaleMemoryError if this worker's encoder is another one."""
        known = self.model.encoder.stamp() if self._stamp is None else self._stamp
        if known.digest != EncoderStamp.from_json(stamp).digest:
            raise StaleMemoryError(f"an encoding worker has encoder {known.digest}, not the one that was asked for.")
        return pack(self.model.encoder.encode(unpack(ids)))

    def work(self, function: Callable[..., Any], bank: ClusterBank, task: Any) -> Any:
        """Return what a function makes of (bank, model, task), or its error."""
        try:
            return function(bank, self.model, task)
        except Exception as error:
            return failure_of(error)

    def write(self, bank: ClusterBank, task: Waiting, weights: Mapping[str, Any], stamp: dict[str, Any]) -> Any:
        """Encode a document with these weights, and write it as the encoder of this stamp: new, or in place of the old one."""
        try:
            known = EncoderStamp.from_json(stamp)
            if self._stamp is None or self._stamp.digest != known.digest:
                load_weights(self.model, unpack(dict(weights)))
                self._stamp = known
            model = self.model
            encoder = DistantWriter(known, model.encoder.encode)
            writer = Standing(encoder, model.config, model.tokenizer, model.input_device)
            bank.write_as(known)
            if task.document_id in bank:
                bank.update(task.document_id, task.text_or_ids, model=writer)
            else:
                memorize(writer, bank, task.text_or_ids, task.document_id)
            return None
        except Exception as error:
            return failure_of(error)


class Standing(NamedTuple):
    """A model that encodes under the stamp of the weights that it was sent."""

    encoder: DistantWriter
    config: Any
    tokenizer: Any
    input_device: torch.device


@torch.no_grad()
def load_weights(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Give a model the weights of another one."""
    for name, module, leaf in model.encoder.path.leaves:
        getattr(module, leaf).copy_(weights[name])


class Encoders:
    """A pool of encoding workers, in a `with` block; they end with it, or with this process.

    A worker that dies is started again, on another node if need be, and what it had in hand is done by whoever is free.

    Args:
        make: returns the model of a worker; it is called there, and a function of a module that all nodes have.
        count: workers; None: one for each GPU of the cluster or, where there is none, one for each node.
        kind: the class of the workers.
        actor_options: of Ray's actors; by default a GPU where the cluster has some, else a CPU.
    """

    def __init__(
        self,
        make: Callable[[], EncodingModel],
        count: int | None = None,
        *,
        kind: type[EncodingWorker] = EncodingWorker,
        actor_options: Mapping[str, Any] | None = None,
    ) -> None:
        if count is not None:
            validate_count("count", count)
        ray = engine.join()
        gpus = int(ray.cluster_resources().get("GPU", 0))
        nodes = sum(each["Alive"] for each in ray.nodes())
        count = count or gpus or nodes
        chosen = {"num_gpus": 1} if gpus else {"num_cpus": 1}
        options = {"max_restarts": -1, "scheduling_strategy": "SPREAD", **chosen, **(actor_options or {})}
        actor = ray.remote(kind)
        self.actors = [actor.options(**options).remote(make) for _ in range(count)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        ray = engine.join()
        for actor in self.actors:
            ray.kill(actor)

    def run(self, tasks: Iterable[Any], ask: Callable[[Any, Any], Any]) -> Iterator[tuple[Any, Any]]:
        """Yield (task, result) as they come; `ask(actor, task)` hands a task over and returns Ray's reference.

        Tasks are taken when a worker has room, and not before. Raises what went wrong with one of them.
        """
        pool = Pool(self, ask)
        source = iter(tasks)
        while True:
            while pool.has_room and (task := next(source, None)) is not None:
                pool.give(task)
            if not pool.is_busy:
                return
            yield from pool.done(timeout=None)


class Pool:
    """Tasks that workers have in hand, and what becomes of them."""

    def __init__(self, workers: Encoders, ask: Callable[[Any, Any], Any]) -> None:
        self._workers, self._ask = workers, ask
        self._running: dict[Any, tuple[Any, int, int]] = {}  # by reference: task, worker, attempt
        self._ill: dict[Any, int] = {}  # workers that have died, by the reference that says when they are back
        self._again: collections.deque[tuple[Any, int]] = collections.deque()  # what they had in hand, and the attempt

    @property
    def is_busy(self) -> bool:
        """Return whether something is still to be done."""
        return bool(self._running or self._again)

    @property
    def has_room(self) -> bool:
        """Return whether some worker would take one more."""
        return not self._again and self._free() is not None

    def _free(self) -> int | None:
        """Return the worker that has least to do, None if all have enough."""
        loads = collections.Counter(number for _, number, _ in self._running.values())
        well = [number for number in range(len(self._workers.actors)) if number not in self._ill.values()]
        number = min(well, key=lambda each: loads[each], default=None)
        return None if number is None or loads[number] >= IN_FLIGHT else number

    def give(self, task: Any, attempt: int = 1) -> None:
        """Hand a task to the worker that has least to do; there must be room."""
        number = self._free()
        assert number is not None
        self._running[self._ask(self._workers.actors[number], task)] = task, number, attempt

    def done(self, timeout: float | None) -> Iterator[tuple[Any, Any]]:
        """Yield what is done, after a wait for one of them; what a worker that died had in hand is given to others."""
        ray = engine.join()
        waited = [*self._running, *self._ill]
        ready = ray.wait(waited, num_returns=1, timeout=timeout)[0] if waited else []
        for each in ray.wait(waited, num_returns=len(waited), timeout=0)[0] if ready else ():
            if self._ill.pop(each, None) is not None:
                continue
            task, number, attempt = self._running.pop(each)
            try:
                answer = ray.get(each)
            except engine.lost(ray) as error:
                if getattr(error, "actor_init_failed", False):  # so would be the next
                    raise ValueError(f"an encoding worker could not make its model: {engine.reason(error)}") from error
                if attempt == ATTEMPTS:
                    raise RuntimeError(f"{ATTEMPTS} encoding workers died of one task, {task!r:.200}.") from error
                if number not in self._ill.values():
                    back = self._workers.actors[number].ready.options(max_task_retries=-1).remote()
                    self._ill[back] = number
                self._again.append((task, attempt + 1))
                continue
            yield task, answer
        while self._again and self._free() is not None:
            self.give(*self._again.popleft())


class Waiting(NamedTuple):
    """A document that is to be encoded."""

    document_id: str
    text_or_ids: Any


class Feed:
    """Documents that workers keep within a bound while the encoder moves on: the stalest first.

    The one who trains calls `publish` after a step, `put` for a new document, and `pump` as often as it likes; none of them
    waits for workers, but `put` when the queue is full. What was encoded with weights that are too old is refused by the shard
    and encoded again with newer ones.

    Args:
        bank: whose refresh policy is a bound, such as "bounded:max_lag=4,on_violation=mask".
        workers: that encode.
        max_waiting: documents that may wait for a worker.
        patience: seconds without any progress after which `put` gives up.
    """

    def __init__(self, bank: ClusterBank, workers: Encoders, *, max_waiting: int = 64, patience: float = 300.0) -> None:
        validate_count("max_waiting", max_waiting)
        self.bank, self.max_waiting, self.patience = bank, max_waiting, patience
        self.waiting: collections.deque[Waiting] = collections.deque()
        self.versions: dict[str, int] = {}  # of the weights that each document was last written with
        self.version, self.num_refused, self.num_written = 0, 0, 0
        self._documents: dict[str, Waiting] = {}
        self._given: dict[str, int] = {}
        self._weights: Any = None
        self._stamp: dict[str, Any] = {}
        self._pool = Pool(workers, self._hand_over)

    def publish(self, model: EncodingModel) -> None:
        """Let what is encoded from now on be encoded with a model's weights of this moment, which the shards hear of first."""
        ray = engine.join()
        encoder: Any = model.encoder  # which has a path to its weights, too
        self.bank.ready_for(model)
        self.version += 1
        self._weights, self._stamp = ray.put(pack(dict(encoder.path.tensors()))), encoder.stamp().to_json()
        self.pump()

    def put(self, document_id: str, text_or_ids: Any) -> None:
        """Add a document, once there is room for it to wait. Raises TimeoutError if no worker makes any."""
        task, began, done = Waiting(document_id, text_or_ids), time.monotonic(), self.num_written
        while len(self.waiting) >= self.max_waiting:
            self.pump(timeout=0.1)
            if self.num_written != done:
                began, done = time.monotonic(), self.num_written
            if time.monotonic() - began > self.patience:
                raise TimeoutError(
                    f"no encoding worker has written anything for {self.patience:g} s, and {len(self.waiting)} documents wait."
                )
        self._documents[document_id] = task
        self.waiting.append(task)
        self.pump()

    def pump(self, timeout: float = 0.0) -> None:
        """Take what is done, and give out what comes next: new documents, then those of the oldest weights."""
        for task, answer in self._pool.done(timeout):
            version = self._given.pop(task.document_id)
            if isinstance(answer, Failure) and answer.kind == "StaleMemoryError":
                self.num_refused += 1
                self.waiting.appendleft(task)
            else:
                raised(answer)
                self.num_written += 1
                self.versions[task.document_id] = version
        while self._weights is not None and self._pool.has_room and (task := self._next()) is not None:
            self._pool.give(task)

    def _next(self) -> Waiting | None:
        for place, task in enumerate(self.waiting):
            if task.document_id not in self._given:  # or the older of two versions could be written last
                del self.waiting[place]
                return task
        known = [name for name, version in self.versions.items() if version < self.version and name not in self._given]
        return self._documents[min(known, key=lambda name: self.versions[name])] if known else None

    def _hand_over(self, actor: Any, task: Waiting) -> Any:
        self._given[task.document_id] = self.version
        return actor.write.remote(self.bank, task, self._weights, self._stamp)
