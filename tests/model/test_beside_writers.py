"""Reading beside writing: whatever somebody changes while a model reads, every answer is that of one state of the bank."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import itertools
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from model.conftest import SETTINGS, build_backbone
from threads import in_a_thread

from longmem import LongMemForCausalLM, MemoryBank
from longmem.memory import BankShards

LAYERS = [1, 2, 3]
FIRST, MIDDLE, LAST = range(3)  # of the side layers, all of which read
SOAK_SECONDS = float(os.environ.get("LONGMEM_SOAK_SECONDS", "3600"))


def tokens(seed: int, length: int = 26) -> torch.Tensor:
    return torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(seed))


IDS = tokens(99, 20)[None]


@pytest.fixture(scope="module")
def model() -> LongMemForCausalLM:
    torch.manual_seed(0)
    options = {**SETTINGS, "memory_layers": LAYERS, "layer_reduction_factor": 1, "memory_bias_init": 0.0}
    return LongMemForCausalLM.from_backbone(build_backbone("llama"), **options).eval()


def make(model: LongMemForCausalLM, names: str = "abcd", **options: Any) -> MemoryBank:
    """Return a bank of these documents: "a" and "b" are private, the others public."""
    bank = MemoryBank.for_model(model, **{"storage_dtype": "float32", **options})
    for name in names:
        model.memorize(bank, tokens(ord(name)), name, tags=["private" if name in "ab" else "public"])
    return bank


@contextlib.contextmanager
def before_layer(model: LongMemForCausalLM, number: int, call: Callable[[], object]) -> Iterator[None]:
    """Let another thread make one call when a side layer begins, once."""
    calls = [call]
    layer = model.side_network.layers[number]
    handle = layer.register_forward_pre_hook(lambda *_: in_a_thread(calls.pop()) if calls else None)
    try:
        yield
        assert not calls, "the layer has not run"
    finally:
        handle.remove()


def answer(model: LongMemForCausalLM, memory: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, memory=memory).logits


def gradients(model: LongMemForCausalLM, memory: Any, change: Callable[[], object] | None = None) -> list[torch.Tensor]:
    """Return the gradients of a loss, before whose backward pass another thread makes a change."""
    loss = model(IDS, memory=memory, labels=IDS).loss
    if change is not None:
        in_a_thread(change)
    trained = [each for each in model.side_network.parameters() if each.requires_grad]
    return [each for each in torch.autograd.grad(loss, trained, allow_unused=True) if each is not None]


# What a writer does, to a bank whose documents are "a" to "d".
CHANGES: dict[str, Callable[[LongMemForCausalLM, MemoryBank], object]] = {
    "delete": lambda model, bank: bank.delete("c"),
    "delete another": lambda model, bank: bank.delete("a"),
    "delete all": lambda model, bank: [bank.delete(name) for name in "abcd"],
    "clear": lambda model, bank: bank.clear(),
    "add": lambda model, bank: model.memorize(bank, tokens(1), "e", tags=["public"]),
    "append": lambda model, bank: model.memorize(bank, tokens(2), "d", append=True),
    "update": lambda model, bank: bank.update("d", tokens(3), model=model),
    "make private": lambda model, bank: bank.tag("d", ["private"]),
    "make public": lambda model, bank: bank.tag("a", ["public"]),
    "rename": lambda model, bank: bank.rename("d", "z"),
    "swap": lambda model, bank: (bank.delete("d"), model.memorize(bank, tokens(4), "d", tags=["public"])),
    "supersede": lambda model, bank: bank.supersede("d", "c"),
    "expire": lambda model, bank: bank.expire(now=1e11),
    "evict": lambda model, bank: [model.memorize(bank, tokens(n), f"new {n}", tags=["public"]) for n in range(6)],
    "other index": lambda model, bank: (bank.use_index("exact"), bank.delete("d")),
    "other prior": lambda model, bank: (bank.use_age_prior("exp:a=3"), bank.delete("a")),
}
# What is read of such a bank.
MEMORIES: dict[str, Callable[[LongMemForCausalLM, MemoryBank], Any]] = {
    "bank": lambda model, bank: bank,
    "tags": lambda model, bank: bank.select(tags="public"),
    "ids": lambda model, bank: bank.select(["b", "d"]),
    "shards": lambda model, bank: BankShards([make(model, "xy"), bank.select(tags="public")]),
}
BANKS: dict[str, dict[str, Any]] = {
    "memory": {},
    "int8": {"storage_dtype": "int8"},
    "age": {"age_prior": "exp:a=0.5,unit=1e-6"},
    "folder": {"folder": True},
}


@functools.cache
def template(model: LongMemForCausalLM, kind: str) -> MemoryBank:
    options = {name: each for name, each in BANKS[kind].items() if name != "folder"}
    bank = make(model, capacity_tokens=140, **options)
    model.memorize(bank, tokens(5), "ends", tags=["public"], valid_until=1e10)
    return bank


def bank_of(model: LongMemForCausalLM, kind: str, folder: Path) -> MemoryBank:
    """Return a bank of "a" to "d", and of "ends", which ends one day; it is full."""
    bank = template(model, kind).copy()
    if "folder" not in BANKS[kind]:
        return bank
    bank.save(folder)
    return MemoryBank.open(folder, model)


def change_in_the_middle(model: LongMemForCausalLM, name: str, read: str, kind: str, folder: Path) -> bool:
    """Return whether the pass after a change differs from the pass in which it came, which differs in nothing."""
    bank = bank_of(model, kind, folder)
    memory = MEMORIES[read](model, bank)
    before = answer(model, memory)
    with before_layer(model, MIDDLE, lambda: CHANGES[name](model, bank)):
        beside = answer(model, memory)
    torch.testing.assert_close(beside, before, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}, {read}, {kind}: {text}")
    is_seen = bool((answer(model, memory) - before).abs().max() > 1e-3)
    bank.close()
    return is_seen


@pytest.mark.parametrize("read", MEMORIES)
def test_a_change_in_the_middle_of_a_forward_pass_is_not_seen_by_it(model, read, tmp_path):
    first = list(MEMORIES).index(read)
    chosen = list(CHANGES)[first % 2 :: 2]
    kinds = itertools.cycle(list(BANKS)[first:] + list(BANKS)[:first])
    seen = [name for name in chosen if change_in_the_middle(model, name, read, next(kinds), tmp_path / name)]
    assert len(seen) >= len(chosen) // 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", BANKS)
@pytest.mark.parametrize("read", MEMORIES)
def test_no_change_in_the_middle_of_a_forward_pass_is_seen_by_it(model, read, kind, tmp_path):
    seen = [name for name in CHANGES if change_in_the_middle(model, name, read, kind, tmp_path / name)]
    assert len(seen) >= 5


def test_a_change_before_the_backward_pass_is_not_seen_by_it(model, tmp_path):
    reads = itertools.cycle(MEMORIES.values())
    for name, change in list(CHANGES.items())[::2] + [("evict", CHANGES["evict"])]:
        bank = bank_of(model, "memory", tmp_path)
        memory = next(reads)(model, bank)
        before = gradients(model, memory)
        beside = gradients(model, memory, lambda bank=bank, change=change: change(model, bank))
        assert all(map(torch.equal, before, beside)), name


@pytest.mark.parametrize("search", ["chunk_mean", "token"])
def test_search_by_token_and_by_chunk_in_every_generation(search):
    torch.manual_seed(0)
    options = {**SETTINGS, "memory_layers": LAYERS, "layer_reduction_factor": 1, "search": search}
    model = LongMemForCausalLM.from_backbone(build_backbone("llama"), **options).eval()
    bank = make(model)
    before = answer(model, bank)
    with (
        before_layer(model, FIRST, lambda: bank.delete("a")),  # before the first search, so it is seen
        before_layer(model, MIDDLE, lambda: bank.delete("b")),
        before_layer(model, LAST, bank.clear),
    ):
        first = answer(model, bank)
    alone = make(model, "bcd")
    torch.testing.assert_close(first, answer(model, alone), rtol=1e-4, atol=1e-5)
    assert (first - before).abs().max() > 1e-3


def test_a_reader_of_a_folder_reads_on_when_it_is_reloaded_compacted_and_merged(model, tmp_path):
    writer = bank_of(model, "folder", tmp_path / "bank")
    reader = MemoryBank.open(tmp_path / "bank", model, read_only=True)
    before = answer(model, reader)
    trained = gradients(model, reader)

    def move_on() -> None:
        for name in "abc":
            writer.delete(name)
        writer.folder.compact()
        for number in range(10):  # so many small files are merged
            model.memorize(writer, tokens(number), f"new {number}")
        reader.folder.reload()

    with before_layer(model, MIDDLE, move_on):
        torch.testing.assert_close(answer(model, reader), before, rtol=1e-4, atol=1e-5)
    assert (answer(model, reader) - before).abs().max() > 1e-3
    for memory in (writer, reader):
        before = answer(model, memory)
        with before_layer(model, MIDDLE, lambda: (writer.delete("d") if "d" in writer else 0, writer.folder.compact())):
            torch.testing.assert_close(answer(model, memory), before, rtol=1e-4, atol=1e-5)
    assert len(trained) == len(gradients(model, reader, lambda: reader.folder.reload()))


def test_a_change_that_is_undone_is_not_seen(model, tmp_path):
    bank = bank_of(model, "folder", tmp_path / "bank")
    before = answer(model, bank)

    def fail() -> None:
        with contextlib.suppress(KeyError), bank.transaction():
            bank.delete("d")
            raise KeyError

    with before_layer(model, MIDDLE, fail):
        torch.testing.assert_close(answer(model, bank), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answer(model, bank), before, rtol=1e-4, atol=1e-5)


def test_every_step_of_generate_is_of_one_state(model):
    bank, length = make(model), 6
    states = [make(model), make(model, "bcd"), make(model, "cd")]
    calls = [lambda: bank.delete("a"), lambda: bank.delete("b")]
    handle = model.side_network.layers[MIDDLE].register_forward_pre_hook(
        lambda *_: in_a_thread(calls.pop(0)) if calls else None
    )
    try:
        ids = model.generate(IDS, memory=bank, max_new_tokens=length, do_sample=False)
    finally:
        handle.remove()
    ours, cache = IDS, None
    for step in range(length):  # the first step reads the first state, the second step the second one
        with torch.no_grad():
            fed = ours if cache is None else ours[:, -1:]
            out = model(fed, memory=states[min(step, 2)], cache=cache, use_cache=True)
        cache = out.get("cache", out.get("past_key_values"))
        ours = torch.cat([ours, out.logits[:, -1:].argmax(-1)], dim=1)
    assert ids.tolist() == ours.tolist()


def test_a_document_that_moves_to_another_shard_is_read_once(model):
    banks = make(model, "abc"), make(model, "d")
    shards = BankShards(banks)
    states = [BankShards([make(model, "abc"), make(model, "d")]), BankShards([make(model, "ab"), make(model, "dc")])]
    for change in (lambda: banks[0].delete("c"), lambda: model.memorize(banks[1], tokens(ord("c")), "c")):
        before = answer(model, shards)
        with before_layer(model, MIDDLE, change):
            torch.testing.assert_close(answer(model, shards), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answer(model, shards), answer(model, states[1]), rtol=1e-4, atol=1e-5)


def test_what_nobody_reads_is_not_kept(model):
    bank = make(model)
    out = model(IDS, memory=bank, labels=IDS, output_memory_reads=True)
    bank.delete("a")
    assert len(bank._table._editions) == 1  # the backward pass may come
    reads = out.memory_reads
    del out
    assert reads
    assert not bank._table._editions
    answer(model, bank)
    assert not bank._table._editions


# A writer and four readers, as fast as they can.


@dataclasses.dataclass
class Soak:
    """A writer that passes through states, and readers, each of whose answers must be that of a state of its time.

    It ends after `seconds` or, sooner, after so many states and answers.
    """

    model: LongMemForCausalLM
    bank: MemoryBank
    seconds: float
    enough: float = math.inf
    states: list[frozenset[tuple[str, int, str]]] = dataclasses.field(default_factory=list)
    answers: list[tuple[str, int, int, torch.Tensor]] = dataclasses.field(default_factory=list)
    errors: list[BaseException] = dataclasses.field(default_factory=list)

    def run(self) -> None:
        self.stop = time.monotonic() + self.seconds
        names = ["public", "private", "bank", "generate"]
        threads = [threading.Thread(target=self.guarded, args=(self.read, name)) for name in names]
        threads.append(threading.Thread(target=self.guarded, args=(self.write,)))
        self.content: dict[str, tuple[int, str]] = {}
        for number in range(4):
            self.put(f"d{number}", number)
        self.note()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def guarded(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except BaseException as error:
            self.errors.append(error)
            self.stop = 0.0

    @property
    def goes_on(self) -> bool:
        return time.monotonic() < self.stop and min(len(self.answers), len(self.states)) < self.enough

    def note(self) -> None:
        self.states.append(frozenset((name, *each) for name, each in self.content.items()))

    def put(self, name: str, seed: int) -> None:
        tag = "public" if seed % 2 else "private"
        self.model.memorize(self.bank, tokens(seed, 12), name, tags=[tag])
        self.content[name] = (seed, tag)

    def write(self) -> None:
        draw = random.Random(0)
        seed = itertools.count(10)
        while self.goes_on:
            name = f"d{draw.randrange(6)}"
            kind = draw.choice(["put", "delete", "tag", "update", "compact"])
            if name not in self.content:
                self.put(name, next(seed) % 50)
            elif kind == "delete":
                self.bank.delete(name)
                del self.content[name]
            elif kind == "tag":
                number, tag = self.content[name]
                tag = "private" if tag == "public" else "public"
                self.bank.tag(name, [tag])
                self.content[name] = number, tag
            elif kind == "update":
                number = next(seed) % 50
                self.bank.update(name, tokens(number, 12), model=self.model)
                self.content[name] = number, self.content[name][1]
            elif kind == "compact" and self.bank._on_disk is not None:
                self.bank.folder.compact()
            self.note()
            time.sleep(0.001)

    def read(self, name: str) -> None:
        memory = self.bank.select(tags=name) if name in ("public", "private") else self.bank
        while self.goes_on:
            begin = len(self.states) - 1
            if name == "generate":
                self.model.generate(IDS, memory=memory, max_new_tokens=3, do_sample=False)
            else:
                found = answer(self.model, memory)
                self.answers.append((name, begin, len(self.states), found))

    def check(self, count: int) -> None:
        """Compare some of the answers with those of the states that were passed through meanwhile."""
        assert not self.errors, self.errors
        answers = self.answers if len(self.answers) <= count else random.Random(1).sample(self.answers, count)
        known: dict[Any, torch.Tensor] = {}
        for name, begin, end, found in answers:
            # A change is noted when it is done, and may be seen before.
            states = {
                frozenset(each[:2] for each in state if name == "bank" or each[2] == name)
                for state in self.states[begin : end + 1]
            }
            for state in states - known.keys():
                bank = MemoryBank.for_model(self.model, storage_dtype="float32")
                for document, seed in sorted(state):
                    self.model.memorize(bank, tokens(seed, 12), document)
                known[state] = answer(self.model, bank)
            nearest = min(float((found - known[state]).abs().max()) for state in states)
            assert nearest < 1e-3, f"{name}: read no state of {len(states)}, the nearest is {nearest} away"


@pytest.mark.parametrize("in_folder", [False, True])
def test_readers_beside_a_writer(model, in_folder, tmp_path):
    soak = Soak(model, make(model, "", **({"folder": tmp_path / "bank"} if in_folder else {})), seconds=30, enough=14)
    soak.run()
    soak.check(8)
    assert len(soak.states) > 5
    assert len(soak.answers) > 5


@pytest.mark.slow
@pytest.mark.parametrize("in_folder", [False, True])
def test_readers_beside_a_writer_for_long(model, in_folder, tmp_path):
    """Half of an hour each, or of the seconds that `LONGMEM_SOAK_SECONDS` says; files and memory do not grow meanwhile."""
    options = {"folder": tmp_path / "bank"} if in_folder else {}
    end, process, held = time.monotonic() + SOAK_SECONDS / 2, psutil.Process(), []
    for number in itertools.count():  # in rounds, whose answers are compared and forgotten
        folder = {name: place / str(number) for name, place in options.items()}
        soak = Soak(model, make(model, "", **folder), seconds=min(30.0, max(1.0, end - time.monotonic())))
        soak.run()
        soak.check(1000)
        soak.bank.close()
        del soak
        gc.collect()
        held.append((process.num_fds(), process.memory_info().rss))
        if time.monotonic() >= end:
            break
    print(in_folder, held)
    assert max(files for files, _ in held) <= held[0][0]
    assert held[-1][1] - held[min(2, len(held) - 1)][1] < 100e6  # the first rounds fill what torch and SQLite keep
