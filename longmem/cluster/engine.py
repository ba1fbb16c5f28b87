"""Ray: joining a cluster, the actors of a bank, and calls that wait so long and no longer."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from longmem.cluster.wire import Traffic, num_bytes, pack, raised, unpack
from longmem.errors import MissingShardError

NAMESPACE = "longmem"
SCHEME = "ray://"
PAUSE = 0.2  # seconds from a call that found nobody to the next
PATIENCE = 120.0  # seconds for a shard to start, or to close


class Shards(Protocol):
    """Who answers for the shards of a bank."""

    traffic: Traffic

    def __len__(self) -> int: ...

    def ask(
        self, asked: Mapping[int, tuple[Any, ...]], *, timeout: float = 60.0, repeats: bool = True
    ) -> dict[int, Any]:
        """Return the answers of shards, by number, to (method, arguments ...); those that did not answer are left out.

        `timeout`: seconds in all. `repeats`: ask again who died meanwhile (reading), or raise InterruptedError.
        """
        ...


def join() -> Any:
    """Return the module `ray`, once this process belongs to a cluster: the one of RAY_ADDRESS or of this machine."""
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            "banks on several machines need Ray, which is not installed; `pip install 'longmem-lm[cluster]'`."
        ) from error
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS") or "auto"
        if address.startswith(SCHEME):
            raise ValueError(
                f"`RAY_ADDRESS` must be HOST:PORT of the cluster itself, as `ray start --head` prints it, got {address!r} of a "
                "Ray client."
            )
        try:
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ValueError(
                f"there is no Ray cluster that this process can join at {address!r} ({reason(error)}); start one with "
                "`ray start --head`, or give its address in RAY_ADDRESS."
            ) from error
    return ray


def lost(ray: Any) -> tuple[type[Exception], ...]:
    """Return the errors of a call whose process died, or whose answer went with a node."""
    return ray.exceptions.RayActorError, ray.exceptions.ObjectLostError


def reason(error: Exception) -> str:
    """Return what an error of Ray says last, behind the calls that led to it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def name_of(given: str) -> str:
    """Return the name of a bank on a cluster, given with or without `ray://`. Raises ValueError for none.

    >>> name_of("ray://notes")
    'notes'
    """
    name = given.removeprefix(SCHEME)
    if not name or not all(each.isalnum() or each in "-_." for each in name):
        raise ValueError(
            f"a bank on a cluster must be named by letters, digits, '-', '_' and '.', as in 'ray://notes', got {given!r}."
        )
    return name


def start(name: str, folders: Sequence[str], options: Mapping[str, Any]) -> None:
    """Start the actors of a bank, one for each folder, spread over the nodes; they stay when this process ends."""
    ray = join()
    from longmem.cluster.shard import Shard

    class ShardActor(Shard):
        def members(self) -> int:
            return len(folders)

    chosen = {"num_cpus": 1, "scheduling_strategy": "SPREAD", "max_concurrency": 8} | dict(options)
    if name in (known := running()):
        raise ValueError(
            f"`name` must be that of a bank that does not run yet, got {name!r}, known: {', '.join(known)}."
        )
    chosen |= {"namespace": NAMESPACE, "lifetime": "detached", "max_restarts": -1, "max_task_retries": 0}
    made, actors = ray.remote(ShardActor), []
    try:
        for number, folder in enumerate(folders):
            actors.append(made.options(name=f"{name}/{number}", **chosen).remote(folder))
        ray.get([each.ask.remote("describe") for each in actors], timeout=PATIENCE)
    except (ray.exceptions.RayError, TimeoutError, ValueError) as error:
        for each in actors:
            ray.kill(each)
        said = reason(error)
        if isinstance(error, TimeoutError):
            said = f"they did not start within {PATIENCE:g} s; is there a node with {chosen.get('num_cpus')} processors free?"
        raise ValueError(f"the shards of {name!r} could not open their folders, {list(folders)}: {said}") from error


def running() -> dict[str, list[int]]:
    """Return the banks that run on this cluster, and the shards of each that live or are being started again."""
    banks: dict[str, list[int]] = {}
    for each in join().util.list_named_actors(all_namespaces=True):
        if each["namespace"] == NAMESPACE:
            name, _, number = each["name"].rpartition("/")
            banks.setdefault(name, []).append(int(number))
    return {name: sorted(numbers) for name, numbers in sorted(banks.items())}


def stop(name: str) -> None:
    """End the actors of a bank, after they have closed their folders. Raises ValueError if it does not run."""
    ray = join()
    for actor, closed in [(each, each.ask.remote("close")) for each in _found(name).values()]:  # all at the same time
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):  # it is dead, and has lost nothing but time
            ray.get(closed, timeout=PATIENCE)
        ray.kill(actor)


def actors_of(name: str, may_lack: bool = False) -> list[Any]:
    """Return the actors of a bank, in order, None for one that has ended.

    Raises ValueError if the bank does not run or, unless it `may_lack` some, not all of it.
    """
    ray, found, deadline = join(), _found(name), time.monotonic() + 60
    while True:
        try:
            count = ray.get(next(iter(found.values())).members.remote(), timeout=PATIENCE)
            break
        except ray.exceptions.RayActorError:  # it may be starting again
            if time.monotonic() > deadline:
                raise
            time.sleep(PAUSE)
    if len(found) != count and not may_lack:
        raise ValueError(
            f"{count - len(found)} of the {count} shards of {name!r} have ended, as when a folder can't be opened; see that "
            f"each node finds all of them, then `longmem cluster stop {name}`, and start it again."
        )
    return [found.get(number) for number in range(count)]


def _found(name: str) -> dict[int, Any]:
    ray, banks = join(), running()
    if name not in banks:
        raise ValueError(
            f"no bank {name!r} runs on this cluster, known: {', '.join(banks) or 'none'}; "
            f"`longmem cluster start {name} --folder DIR` starts it."
        )
    return {number: ray.get_actor(f"{name}/{number}", namespace=NAMESPACE) for number in banks[name]}


class RayShards:
    """The shards of a bank that runs on the cluster; one that has ended does not answer, if there `may_lack` some."""

    def __init__(self, name: str, may_lack: bool = False) -> None:
        self.name, self.may_lack, self.traffic = name, may_lack, Traffic()
        self.actors = actors_of(name, may_lack)

    def __len__(self) -> int:
        return len(self.actors)

    def __reduce__(self) -> Any:
        return RayShards, (self.name, self.may_lack)

    def ask(
        self, asked: Mapping[int, tuple[Any, ...]], *, timeout: float = 60.0, repeats: bool = True
    ) -> dict[int, Any]:
        """Return the answers; see `Shards`."""
        ray, deadline = join(), time.monotonic() + timeout
        requests = {number: pack(list(request)) for number, request in asked.items()}

        def call(number: int) -> Any:
            self.traffic.calls += 1
            self.traffic.sent += num_bytes(requests[number])
            return self.actors[number].ask.remote(*requests[number])

        waiting, answers = {call(number): number for number in asked if self.actors[number] is not None}, {}
        while waiting and (left := deadline - time.monotonic()) > 0:
            done, _ = ray.wait(list(waiting), timeout=left)
            for each in done:
                number = waiting.pop(each)
                try:
                    answer = ray.get(each)
                except lost(ray) as error:  # it died, or its node with the answer; it is started again from its folder
                    if not repeats:
                        raise InterruptedError(f"shard {number} died while it was written to") from error
                    if getattr(error, "actor_init_failed", False):  # Ray does not try again
                        said = f"shard {number} of {self.name!r} could not open its folder: {reason(error)}"
                        warnings.warn(said, stacklevel=4)
                        continue
                    time.sleep(PAUSE)
                    waiting[call(number)] = number
                    continue
                self.traffic.received += num_bytes(answer)
                answers[number] = raised(unpack(answer))
        return answers


def refuse_missing(asked: Sequence[int], answers: Mapping[int, Any], timeout: float) -> None:
    """Raise MissingShardError unless all have answered."""
    if missing := [number for number in asked if number not in answers]:
        raise MissingShardError(
            f"shards {missing} did not answer within {timeout:g} s, so what they hold is not known; try again, raise "
            '`timeout`, or read the others alone with `on_missing="skip"`.'
        )
