"""A bank of shards behind a wire gives what `BankShards` over the same folders gives, and writes what a bank writes."""

from __future__ import annotations

import ast
import contextlib
import pickle
import shutil
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from local_shards import LocalShards, bytes_of_read
from tiny_models import save_tiny_backbone, some_text

import longmem
from longmem import LongMemForCausalLM, MemoryBank, explain
from longmem.cluster import ClusterBank
from longmem.cluster.bank import shard_folders
from longmem.cluster.merge import Ranking
from longmem.encoder.stamp import EncoderStamp
from longmem.errors import ChangedMemoryError, MissingShardError, StaleMemoryError
from longmem.memory import BankShards
from longmem.memory.protocols import AttendingMemory, Memory
from longmem.model.attention import search_and_attend

NAMES = [f"document-{number}" for number in range(7)]
OPTIONS = {
    "segment_length": 16,
    "num_retrieved_tokens": 8,
    "chunk_size": 4,
    "memory_layers": [1, 3],
    "layer_reduction_factor": 1,
}
# What a model, and its banks, may be; each is read through the wire as without.
MODELS = {
    "as it is": {},
    "by token": {"search": "token", "choice_per": "group"},
    "with a null slot": {"memory_null_init": 1.0},
    "gated": {"fusion": "gated"},
    "some heads": {"memory_heads": [[0], [1]]},
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_backbone(tmp_path_factory.mktemp("backbone")))


@pytest.fixture(scope="module")
def model(backbone: str) -> LongMemForCausalLM:
    return LongMemForCausalLM.from_backbone(backbone, **OPTIONS).eval()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., tuple[ClusterBank, LocalShards]]]:
    made: list[LocalShards] = []

    def make_cluster(model: LongMemForCausalLM, count: int = 3, fill: bool = True, **options: object):
        folders = ClusterBank.create(tmp_path / f"bank-{len(made)}", count, model, **options)
        shards = LocalShards([Path(each) for each in folders])
        made.append(shards)
        bank = ClusterBank(shards)
        for place, name in enumerate(NAMES if fill else ()):
            tags = ["even"] if place % 2 == 0 else []
            model.memorize(bank, some_text(12 + place, seed=place), name, tags=tags, dated=1e9 + place * 86_400)
        return bank, shards

    yield make_cluster
    for each in made:
        each.close()


def whole(shards: LocalShards) -> BankShards:
    """Return the same folders as `BankShards` reads them."""
    return BankShards(MemoryBank.open(each, read_only=True) for each in shards.folders)


@pytest.fixture
def prompt() -> torch.Tensor:
    return torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(5))


SLOW = pytest.mark.slow  # the kinds that differ less


@pytest.mark.parametrize(
    "kind", ["as it is", "by token", *(pytest.param(kind, marks=SLOW) for kind in list(MODELS)[2:])]
)
def test_a_cluster_bank_is_read_as_its_shards_are(kind, backbone, make, prompt):
    model = LongMemForCausalLM.from_backbone(backbone, **OPTIONS | MODELS[kind]).eval()
    bank, shards = make(model)
    other = whole(shards)
    assert isinstance(bank, Memory)
    assert isinstance(bank, AttendingMemory)
    assert not isinstance(other, AttendingMemory)
    with torch.no_grad():
        got = model(prompt, memory=bank, output_memory_reads=True)
        expected = model(prompt, memory=other, output_memory_reads=True)
        without = model(prompt)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert (got.logits - without.logits).abs().max() > 1e-3
    assert len(got.memory_reads) == len(expected.memory_reads) > 0
    for one, two in zip(got.memory_reads, expected.memory_reads, strict=True):
        assert (one.rows != two.rows).float().mean() < 0.06  # of ties, the order is a matter of the last bit
        torch.testing.assert_close(one.chunk_weights, two.chunk_weights, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.memory_share, two.memory_share, rtol=1e-4, atol=1e-5)
    rows = got.memory_reads[0].rows
    torch.testing.assert_close(rows, expected.memory_reads[0].rows)
    assert bank.locate(rows) == other.locate(rows)
    assert "gather" not in shards.methods  # keys and values never crossed


@SLOW
def test_prompts_and_tokens_of_generate_are_those_of_the_shards(model, make, prompt):
    bank, shards = make(model)
    ids = model.generate(prompt, memory=bank, max_new_tokens=12, do_sample=False)
    assert ids.tolist() == model.generate(prompt, memory=whole(shards), max_new_tokens=12, do_sample=False).tolist()


@torch.no_grad()
def test_neighbours_are_those_of_the_shards(backbone, make, prompt, monkeypatch):
    monkeypatch.setattr(longmem.model.neighbours, "SAMPLED_CHUNKS", 4096)  # all: shards without a document have no part
    model = LongMemForCausalLM.from_backbone(backbone, **OPTIONS, num_neighbours=6).eval()
    bank, shards = make(model)
    other = whole(shards)
    for mine, its in ((bank, other), (bank.select(NAMES[:2]), other.select(NAMES[:2]))):
        got, expected = (model(prompt, memory=each, output_memory_reads=True) for each in (mine, its))
        assert expected.memory_neighbours.share.min() > 0
        assert (got.memory_neighbours.token_ids == expected.memory_neighbours.token_ids).float().mean() > 0.99
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
    empty, _ = make(model, fill=False)
    assert model(prompt, memory=empty, output_memory_reads=True).memory_neighbours is None


def test_age_counts_as_in_the_shards(model, make, prompt):
    bank, shards = make(model, age_prior="poly:a=0.1")
    with torch.no_grad():
        got, expected = (model(prompt, memory=each, output_memory_reads=True) for each in (bank, whole(shards)))
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
    for one, two in zip(got.memory_reads, expected.memory_reads, strict=True):
        torch.testing.assert_close(one.log_weights, two.log_weights)
        assert one.log_weights.any()


def test_search_gather_and_finding_are_those_of_the_shards(model, make):
    bank, shards = make(model)
    other = whole(shards)
    queries = torch.randn(2, 5, 8)
    layer = bank.memory_layers[0]
    one, two = bank.search(layer, queries, 40), other.search(layer, queries, 40)
    for got, expected in zip((one.rows, one.scores, one.sizes), (two.rows, two.scores, two.sizes), strict=True):
        torch.testing.assert_close(got, expected, check_dtype=False)
    missing = (two.rows < 0).flatten(1)
    got = bank.gather(layer, one.rows.flatten(1), one.generation)
    expected = other.gather(layer, two.rows.flatten(1), two.generation)
    for mine, its in zip(got, expected, strict=True):
        torch.testing.assert_close(mine[~missing], its[~missing])
    assert bank.find("dog", k=5) == other.find("dog", k=5)
    passages = zip(bank.find("the old dog", model, 3), other.find("the old dog", model, 3), strict=True)
    for mine, its in passages:
        assert mine._replace(score=0) == its._replace(score=0)
        assert mine.score == pytest.approx(its.score, rel=1e-4)
    traces = [explain(model, "the old dog", memory=each, answer=" sat on") for each in (bank, other)]
    assert traces[0].places == traces[1].places
    for token in range(len(traces[0])):
        mine, its = (dict(each.weights(token)) for each in traces)
        assert mine == pytest.approx(its, rel=1e-3, abs=1e-6)


def test_a_selection_reads_its_documents_alone(model, make, prompt):
    bank, shards = make(model)
    for chosen, names in ((bank.select(NAMES[1:3]), NAMES[1:3]), (bank.select(tags="even"), NAMES[::2])):
        other = BankShards(
            each.select([name for name in names if name in each])
            for each in (MemoryBank.open(folder, read_only=True) for folder in shards.folders)
            if any(name in each for name in names)
        )
        with torch.no_grad():
            got, expected = (model(prompt, memory=each, output_memory_reads=True) for each in (chosen, other))
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
        assert chosen.locate(got.memory_reads[0].rows) == other.locate(expected.memory_reads[0].rows)
        assert chosen.num_tokens == other.num_tokens
        assert sorted(each.document_id for each in chosen.documents()) == sorted(names)
    with pytest.raises(ValueError, match="document-99"):
        bank.select("document-99")
    with pytest.raises(ValueError, match="odd"):
        bank.select(tags="odd")


@pytest.mark.parametrize(
    ("checkpointing", "is_small"), [pytest.param(False, False, marks=SLOW), (True, False), (False, True)]
)
def test_gradients_are_those_of_the_shards(checkpointing, is_small, backbone, make, prompt):
    model = LongMemForCausalLM.from_backbone(backbone, **OPTIONS)
    bank, shards = make(model, fill=not is_small)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    if is_small:  # fewer chunks than are read, and none in the first shard
        model.memorize(bank, "a cat", next(name for name in NAMES if bank.shard_of(name) > 0))
    gradients = []
    for memory in (bank, whole(shards)):
        model.zero_grad()
        model(prompt, labels=prompt, memory=memory, use_cache=False).loss.backward()
        own = model.side_network.trained_parameters().items()
        gradients.append({name: each.grad for name, each in own if each.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert gradients[0]
    for name, got in gradients[0].items():
        torch.testing.assert_close(got, gradients[1][name], rtol=1e-3, atol=1e-5)
    assert "gather" in shards.methods


def test_a_pass_reads_one_state_whatever_is_written(model, make, prompt):
    bank, shards = make(model)
    with torch.no_grad():
        expected = model(prompt, memory=bank).logits
    ask, written = shards.ask, []

    def ask_and_write(asked, **options):
        answers = ask(asked, **options)
        if not written and any(request[0] == "attend" for request in asked.values()):
            written.append(True)
            model.memorize(ClusterBank(shards), some_text(60, seed=99), "meanwhile")
            ClusterBank(shards).delete(NAMES[0])
        return answers

    shards.ask = ask_and_write
    with torch.no_grad():
        during, after = (model(prompt, memory=bank).logits for _ in range(2))
    assert written
    torch.testing.assert_close(during, expected)
    assert (after - expected).abs().max() > 1e-4


@pytest.mark.parametrize("is_written", [False, pytest.param(True, marks=SLOW)])
def test_a_shard_that_starts_again_within_a_pass_goes_on_or_is_refused(is_written, model, make, prompt):
    bank, shards = make(model)
    with torch.no_grad():
        expected = model(prompt, memory=bank).logits
    ask, attended = shards.ask, []

    def ask_and_die(asked, **options):
        if any(request[0] == "attend" for request in asked.values()):
            attended.append(asked)
            if len(attended) == 2:
                for number in range(3):
                    shards.restart(number)
                    if is_written:
                        shards.shards[number].bank.clear()
        return ask(asked, **options)

    shards.ask = ask_and_die
    with torch.no_grad():
        if is_written:
            with pytest.raises(ChangedMemoryError):
                model(prompt, memory=bank)
        else:
            torch.testing.assert_close(model(prompt, memory=bank).logits, expected)


def test_a_silent_shard_is_an_error_or_is_left_out_and_named(model, make, prompt):
    bank, shards = make(model)
    shards.silent = {1}
    with torch.no_grad(), pytest.raises(MissingShardError, match=r"\[1\].*on_missing"):
        model(prompt, memory=bank)
    shards.silent = set()
    some = ClusterBank(shards, on_missing="skip")
    shards.silent = {0}
    with pytest.raises(MissingShardError, match=r"\[0\].*on_missing"):
        ClusterBank(shards)
    with pytest.warns(UserWarning, match=r"shards \[0\] of 3"):
        assert ClusterBank(shards, on_missing="skip").missing == (0,)
    shards.silent = {1}
    with torch.no_grad(), pytest.warns(UserWarning, match=r"shards \[1\] of 3"):
        got = model(prompt, memory=some, output_memory_reads=True)
    assert some.missing == (1,)
    others = BankShards(MemoryBank.open(shards.folders[number], read_only=True) for number in (0, 2))
    with torch.no_grad():
        torch.testing.assert_close(got.logits, model(prompt, memory=others).logits, rtol=1e-4, atol=1e-4)
    assert not (got.memory_reads[0].rows % 3 == 1).logical_and(got.memory_reads[0].rows >= 0).any()


@pytest.mark.parametrize("trips", [1, 2])
def test_bytes_on_the_wire_are_those_of_the_formula(trips, model, make):
    bank, shards = make(model)
    bank = ClusterBank(shards, wire_dtype="float16", trips=trips)
    layer, queries, k, dim = bank.memory_layers[0], torch.randn(2, 200, 8), 2, 8
    before = shards.traffic.sent + shards.traffic.received
    bank.attend(layer, queries, k, scaling=0.3, dtype=torch.float32)
    done = shards.traffic.sent + shards.traffic.received - before
    assert done == pytest.approx(bytes_of_read(trips, 3, 400, k, dim), rel=0.15)  # sizes of short chunks are not in it
    assert trips == 1 or done < 0.7 * bytes_of_read(1, 3, 400, k, dim)


@pytest.mark.parametrize("options", [{}, {"age_prior": "poly:a=0.1"}, {"storage_dtype": "int8"}], ids=str)
def test_two_trips_give_what_one_gives(options, model, make, prompt):
    _, shards = make(model, count=5, **options)
    reads = []
    for trips in (1, 2):
        shards.methods.clear()
        bank = ClusterBank(shards, trips=trips)
        with torch.no_grad():
            reads.append(model(prompt, memory=bank, output_memory_reads=True))
            nothing = (
                model(prompt, memory=bank.select(NAMES[0])).logits,
                model(prompt, memory=bank.select(NAMES[1])).logits,
            )
        assert not torch.equal(*nothing)
        assert ({"rank", "attend_best"} <= set(shards.methods)) == ("attend" not in shards.methods) == (trips == 2)
    torch.testing.assert_close(reads[1].logits, reads[0].logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reads[1].memory_reads[0].rows, reads[0].memory_reads[0].rows, rtol=0, atol=0)
    for one, two in zip(*(each.memory_reads for each in reads), strict=True):
        assert (one.rows != two.rows).float().mean() < 0.06  # of ties, the order is a matter of the last bit
        for name in ("chunk_weights", "memory_share", "log_weights"):
            if (expected := getattr(one, name)) is not None:
                torch.testing.assert_close(getattr(two, name), expected, rtol=1e-4, atol=1e-6)
    gradients = []
    for trips in (1, 2):
        own = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        read = search_and_attend(own, ClusterBank(shards, trips=trips), model.config.memory_layers[0], 6, 0.3, None, 3)
        (read.output.sum() + read.logsumexp.sum()).backward()
        gradients.append(own.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 1e-4


def test_a_shard_that_starts_again_between_two_trips_is_asked_in_one(model, make, prompt):
    _, shards = make(model)
    bank = ClusterBank(shards, trips=2)
    with torch.no_grad():
        expected, ask = model(prompt, memory=bank).logits, shards.ask

        def ask_and_die(asked, **options):
            if "attend_best" in {request[0] for request in asked.values()} and "attend" not in shards.methods:
                shards.restart(min(asked))
            return ask(asked, **options)

        shards.ask = ask_and_die
        torch.testing.assert_close(model(prompt, memory=bank).logits, expected)
    assert "attend" in shards.methods


def test_the_number_of_trips_is_what_sends_less(model, make):
    bank, shards = make(model)
    for count, method in ((1, "attend"), (4_000, "rank")):
        shards.methods.clear()
        bank.attend(bank.memory_layers[0], torch.randn(2, count, 8), 8, scaling=0.3)
        assert method in shards.methods
    with pytest.raises(ValueError, match="`trips` must be 1, 2 or None.*got 3"):
        ClusterBank(shards, trips=3)


# Writing.


def test_what_is_written_through_the_wire_is_what_a_bank_would_hold(model, make, tmp_path):
    bank, shards = make(model)
    with MemoryBank.for_model(model, folder=tmp_path / "one") as one:
        for place, name in enumerate(NAMES):
            tags = ["even"] if place % 2 == 0 else []
            model.memorize(one, some_text(12 + place, seed=place), name, tags=tags, dated=1e9 + place * 86_400)
        for each in (bank, one):
            model.memorize(each, " and more of it", NAMES[0], append=True)
            each.update(NAMES[1], some_text(13, seed=1) + " fell", model=model)
            each.delete(NAMES[2])
            each.supersede(NAMES[3])
            each.tag(NAMES[4], ["new"])
            each.pin(NAMES[5])
        listed = sorted(bank.documents(), key=lambda each: each.document_id)
        expected = sorted(one.documents(), key=lambda each: each.document_id)
        assert listed == expected
        for info in expected:
            name = info.document_id
            assert bank.text(name) == one.text(name)
            assert bank.token_ids(name).tolist() == one.token_ids(name).tolist()
        query = torch.randn(2, 4, 8)
        for layer in bank.memory_layers:
            torch.testing.assert_close(bank.search(layer, query, 9).scores, one.search(layer, query, 9).scores)
    assert bank.num_tokens == sum(each.num_tokens for each in expected)
    for name in NAMES:
        holders = [number for number, each in enumerate(shards.shards) if name in each.bank]
        assert holders == ([] if name == NAMES[2] else [bank.shard_of(name)])


def test_an_update_copies_what_did_not_change(model, make):
    bank, _ = make(model, fill=False)
    text = some_text(60, seed=4)
    model.memorize(bank, text, "novel", tags=["kept"])
    encoded = bank.update("novel", text + " and fell", model=model)
    assert 0 < encoded < 40
    assert bank.text("novel") == text + " and fell"
    assert bank.info("novel").tags == ("kept",)
    fresh, _ = make(model, fill=False)
    model.memorize(fresh, text + " and fell", "novel")
    query, layer = torch.randn(2, 4, 8), bank.memory_layers[0]
    torch.testing.assert_close(bank.search(layer, query, 9).scores, fresh.search(layer, query, 9).scores)


def test_a_transaction_is_of_one_shard_and_all_or_nothing(model, make):
    bank, _ = make(model)
    one = NAMES[0]
    same = next(name for name in NAMES[1:] if bank.shard_of(name) == bank.shard_of(one))
    other = next(name for name in NAMES if bank.shard_of(name) != bank.shard_of(one))
    with bank.transaction():
        bank.tag(one, ["even"])
        with pytest.raises(ValueError, match="one shard"):
            bank.delete(other)
    assert one in bank
    with pytest.raises(ValueError, match="`by` must be a document of the shard"):
        bank.supersede(one, by=other)
    with bank.transaction():
        bank.supersede(one, by=same)
        bank.tag(one, ["old"])
    assert bank.info(one).superseded_by == same
    with pytest.raises(ValueError, match="document-77"):
        bank.delete("document-77")
    with pytest.raises(ValueError, match="document-0"):
        model.memorize(bank, "a cat", one)


@pytest.mark.parametrize("moment", [pytest.param("before", marks=SLOW), "after"])
@pytest.mark.parametrize("method", ["memorize", "append", "delete", "update"])
def test_a_shard_that_dies_in_a_commit_has_made_it_once(method, moment, model, make):
    bank, shards = make(model)
    name = "new" if method == "memorize" else NAMES[0]
    number, before = bank.shard_of(name), bank.text(NAMES[0])
    kills = shards.dies_before if moment == "before" else shards.dies_after
    kills[number] = "commit"
    if method == "memorize":
        model.memorize(bank, "the dog sat", name)
        assert bank.text(name) == "the dog sat"
    elif method == "append":
        model.memorize(bank, " and fell", name, append=True)
        assert bank.text(name) == before + " and fell"
    elif method == "update":
        bank.update(name, before + " now", model=model)
        assert bank.text(name) == before + " now"
    else:
        bank.delete(name)
        assert name not in bank
    assert not kills


def test_a_bank_on_the_wire_can_be_sent(model, make, monkeypatch):
    bank, shards = make(model)
    monkeypatch.setattr(LocalShards, "__reduce__", lambda self: (_same, (id(self),)), raising=False)
    _SENT[id(shards)] = shards
    twin = pickle.loads(pickle.dumps(bank.select(NAMES[:2])))
    assert sorted(each.document_id for each in twin.documents()) == NAMES[:2]


_SENT: dict[int, LocalShards] = {}


def _same(number: int) -> LocalShards:
    return _SENT[number]


def test_no_module_imports_ray_before_a_cluster_is_joined():
    for path in Path(longmem.__file__).parent.rglob("*.py"):
        for statement in ast.parse(path.read_text()).body:
            names = [each.name for each in statement.names] if isinstance(statement, ast.Import) else []
            names += [statement.module or ""] if isinstance(statement, ast.ImportFrom) else []
            assert "ray" not in {name.partition(".")[0] for name in names}, path


@pytest.mark.parametrize(
    ("address", "error", "said"),
    [
        (None, ConnectionError("Could not find any running Ray instance"), r"at 'auto' \(Could not find any"),
        ("host:1", RuntimeError("trace\nfailed to connect to GCS"), r"at 'host:1' \(failed to connect to GCS\)"),
        ("nowhere", ValueError("Malformed address"), r"at 'nowhere' \(Malformed address\)"),
        ("host:1", OSError("a token"), r"\(a token\)"),
        ("ray://host:10001", None, "HOST:PORT of the cluster itself.*got 'ray://host:10001'"),
    ],
    ids=str,
)
def test_a_cluster_that_can_not_be_joined(address, error, said, monkeypatch):
    def init(**given: object) -> None:
        assert error is not None
        raise error

    known = types.SimpleNamespace(RayError=OSError)
    fake = types.SimpleNamespace(is_initialized=lambda: False, init=init, exceptions=known)
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=said):
        ClusterBank.connect("notes")


def test_another_encoder_is_refused_as_by_a_bank(backbone, make, model, prompt):
    bank, _ = make(model)
    other = LongMemForCausalLM.from_backbone(backbone, **OPTIONS).eval()
    with torch.no_grad():
        other.backbone.get_input_embeddings().weight[0] += 1
        with pytest.raises(StaleMemoryError, match="differ in weights"):
            other(prompt, memory=bank)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(prompt, memory=bank)


def test_threads_have_transactions_and_encoders_of_their_own(model, make):
    bank, _ = make(model, fill=False)
    model.memorize(bank, "the cat sat", NAMES[0])
    started, may_go = threading.Event(), threading.Event()
    same = [name for name in NAMES[1:] if bank.shard_of(name) == bank.shard_of(NAMES[0])][0]

    def fail() -> None:
        with contextlib.suppress(ZeroDivisionError), bank.transaction():
            bank.tag(NAMES[0], ["lost"])
            started.set()
            may_go.wait(60)
            raise ZeroDivisionError

    thread = threading.Thread(target=fail)
    thread.start()
    assert started.wait(60)
    model.memorize(bank, "the dog sat", same)
    may_go.set()
    thread.join()
    assert bank.text(same) == "the dog sat"  # on the disk since it was memorized, whatever becomes of others' changes
    assert bank.info(NAMES[0]).tags == ()
    own = bank.fingerprint
    thread = threading.Thread(target=lambda: bank.write_as(EncoderStamp("another")))
    thread.start()
    thread.join()
    assert bank.fingerprint == bank.select(same).fingerprint == own


def test_an_update_is_part_of_its_transaction(model, make):
    bank, shards = make(model)
    before = bank.text(NAMES[0])

    def change(tag_first: bool, fails: bool) -> None:
        with bank.transaction():
            if tag_first:
                bank.tag(NAMES[0], ["new"])
            bank.update(NAMES[0], "the dog sat", model=model)
            bank.tag(NAMES[0], ["new"])
            if fails:
                raise ZeroDivisionError

    with pytest.raises(ValueError, match="was changed in this transaction"):  # it would be read, to copy from
        change(tag_first=True, fails=False)
    with pytest.raises(ZeroDivisionError):
        change(tag_first=False, fails=True)
    assert (bank.text(NAMES[0]), bank.info(NAMES[0]).tags) == (before, ("even",))
    shards.dies_after[bank.shard_of(NAMES[0])] = "commit"
    change(tag_first=False, fails=False)
    assert (bank.text(NAMES[0]), bank.info(NAMES[0]).tags) == ("the dog sat", ("new",))
    assert shards.methods.count("commit") == len(NAMES) + 2


@pytest.mark.parametrize("lost", [0, 1, 2, "all"])
def test_a_bank_without_one_of_its_shards_is_refused(lost, model, tmp_path):
    folders = ClusterBank.create(tmp_path / "bank", 3, model)
    assert [str(each) for each in shard_folders(tmp_path / "bank")] == folders
    for number in range(3) if lost == "all" else [lost]:
        shutil.rmtree(folders[number])
    with pytest.raises(ValueError, match="all of a bank's 3 shards"):
        shard_folders(tmp_path / "bank")


def test_a_shard_names_its_model_from_no_file_but_its_own(model, make, tmp_path):
    _, shards = make(model, fill=False)
    path = Path(shards.folders[0]) / "model.json"
    path.write_text('{"model": "mine"}')
    assert ClusterBank(shards).model_name == "mine"
    path.rename(tmp_path / "outside.json")
    path.symlink_to(tmp_path / "outside.json")
    assert ClusterBank(shards).model_name is None


def test_shards_that_can_not_all_be_made_leave_none(model, tmp_path, monkeypatch):
    make_one, made = MemoryBank.for_model, []

    def fail_at_the_last(*given: object, **options: object) -> MemoryBank:
        made.append(1)
        if len(made) == 3:
            raise OSError(28, "no space left")
        return make_one(*given, **options)

    monkeypatch.setattr(MemoryBank, "for_model", fail_at_the_last)
    with pytest.raises(OSError, match="no space left"):
        ClusterBank.create(tmp_path / "bank", 3, model)
    assert not list((tmp_path / "bank").iterdir())
    assert len(ClusterBank.create(tmp_path / "bank", 2, model)) == 2


def test_long_chunks_and_many_of_them_are_counted_whole(tmp_path):
    length = 40_000
    MemoryBank.create(tmp_path / "bank", memory_layers=[1], chunk_size=length).close()
    shards = LocalShards([tmp_path / "bank"])
    bank, keys = ClusterBank(shards), [torch.randn(1, 2 * length - 1, 2)]
    bank.add("long", keys, keys)
    assert sorted(bank.search(1, torch.ones(1, 1, 2), 2).sizes.flatten().tolist()) == [length - 1, length]
    shards.close()
    scores = torch.zeros(1, 1, length)
    assert Ranking([0], scores, torch.zeros_like(scores).long(), scores.long()).wanted(0).tolist() == [[length]]
