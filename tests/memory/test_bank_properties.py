"""Any sequence of operations against a bank that is only a list of chunks (promises 1 to 4 and 7 of the design)."""

import contextlib
import functools
import shutil
import tempfile
import warnings
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from named_encoder import NamedEncoder

from longmem.memory import DocumentInfo, MemoryBank
from longmem.memory.folder import disk_storage, tensor_file
from longmem.memory.index import FlatIndex, approximate
from longmem.memory.memorize import Memorized
from longmem.memory.rows.storage import STORAGE_DTYPES, decode, encode
from longmem.plugins import PLUGINS

LAYERS = (2, 5)
HEADS = {2: 1, 5: 2}
UNIQUE_DIM = 512  # layer 2 gives each token a direction of its own, so that each chunk is nearest to its own key
NAMES = st.sampled_from(["a", "b", "c", "d"])
LENGTHS = st.integers(1, 15)


class MirrorIndex(FlatIndex):
    """Return a flat index that notes what it is told, and checks at each search that it was told everything."""

    def __init__(self, store):
        super().__init__(store)
        self.held: dict[int, torch.Tensor] = {}

    def rows_written(self, rows):
        for row in rows.tolist():
            assert row not in self.held
            self.held[row] = self.store.search_keys[:, row].clone()

    def rows_moved(self, sources, destinations):
        for source, destination in zip(sources.tolist(), destinations.tolist(), strict=True):
            assert destination not in self.held
            self.held[destination] = self.held.pop(source)

    def rows_dropped(self, rows):
        for row in rows.tolist():
            del self.held[row]

    def top_chunks(self, queries, search_keys, num_chunks):
        assert sorted(self.held) == list(range(self.store.num_rows))
        held = torch.stack([self.held[row] for row in range(len(self.held))], dim=1)
        assert torch.equal(held, self.store.search_keys)
        return super().top_chunks(queries, search_keys, num_chunks)


class NaiveDocument:
    """Return a document that keeps all its tokens for ever: (id, {layer: key}, {layer: value})."""

    def __init__(self, name):
        self.name = name
        self.tokens = []
        self.is_pinned = False


class NaiveBank:
    """Return a bank that is a list of (document, position) for each resident chunk, in the order of writing."""

    def __init__(self, chunk_size, capacity):
        self.chunk_size, self.capacity = chunk_size, capacity
        self.documents, self.resident = [], []

    def find(self, name):
        return next((document for document in self.documents if document.name == name), None)

    def has_room(self, name, num_tokens):
        """Return whether all new chunks of a document, or at least the last of them, find room beside what is pinned."""
        document = self.find(name)
        num_waiting = len(document.tokens) % self.chunk_size if document else 0
        num_chunks = self.chunks_in(num_waiting + num_tokens)
        room = self.capacity - sum(owner.is_pinned for owner, _ in self.resident)
        room += bool(document and document.is_pinned and num_waiting)  # the row of the last chunk is taken over
        return num_chunks <= room or (room > 0 and not (document and document.is_pinned))

    def chunks_in(self, num_tokens):
        return -(-num_tokens // self.chunk_size)

    def write(self, name, tokens):
        document = self.find(name)
        if document is None:
            document = NaiveDocument(name)
            self.documents.append(document)
        first = len(document.tokens) // self.chunk_size
        document.tokens.extend(tokens)
        self.resident = [each for each in self.resident if each != (document, first)]  # it is written anew
        self.resident += [(document, i) for i in range(first, self.chunks_in(len(document.tokens)))]
        while len(self.resident) > self.capacity:
            self.resident.remove(next(each for each in self.resident if not each[0].is_pinned))
        self.documents = [each for each in self.documents if self.chunks_of(each)]

    def delete(self, name):
        document = self.find(name)
        self.documents.remove(document)
        self.resident = [(owner, i) for owner, i in self.resident if owner is not document]

    def chunks_of(self, document):
        return [i for owner, i in self.resident if owner is document]

    def info(self, document):
        chunks, num_tokens = self.chunks_of(document), len(document.tokens)
        return DocumentInfo(
            document.name,
            num_tokens,
            len(chunks),
            num_tokens % self.chunk_size,
            chunks[0] * self.chunk_size,
            is_pinned=document.is_pinned,
        )

    def chunk(self, document, i, layer):
        """Return keys and values (kv_heads, tokens, dim) of one chunk."""
        tokens = document.tokens[i * self.chunk_size : (i + 1) * self.chunk_size]
        return tuple(torch.stack([token[part][layer] for token in tokens], dim=1) for part in (1, 2))


class BankMachine(RuleBasedStateMachine):
    """Do the same to both banks, and compare all that can be read."""

    index = "mirror"
    in_folder = False

    @initialize(
        chunk_size=st.integers(1, 4),
        capacity=st.sampled_from([1, 2, 3, 5, 8, 13, 21]),
        with_ids=st.booleans(),
        storage_dtype=st.sampled_from(["float16", "int8"]),
    )
    def start(self, chunk_size, capacity, with_ids, storage_dtype):
        self.patch = pytest.MonkeyPatch()
        self.patch.setitem(PLUGINS["index"], "mirror", MirrorIndex)
        self.patch.setattr(approximate, "EXACT_BELOW", 3)
        self.patch.setattr(approximate, "POINTS_PER_CENTROID", 1)
        self.patch.setattr(tensor_file.os, "fsync", lambda descriptor: None)  # not what is tested here
        self.patch.setattr(disk_storage, "SEGMENTS_TO_MERGE", 3)
        self.folder = tempfile.mkdtemp()
        options = dict(
            memory_layers=LAYERS,
            chunk_size=chunk_size,
            capacity_tokens=chunk_size * capacity,
            index=self.index,
            storage_dtype=storage_dtype,
        )
        make = functools.partial(MemoryBank.create, self.folder) if self.in_folder else MemoryBank
        self.bank = make(**options)
        self.storage_dtype = STORAGE_DTYPES[storage_dtype]
        self.naive = NaiveBank(chunk_size, capacity)
        self.with_ids = with_ids
        self.generator = torch.Generator().manual_seed(0)
        self.num_written = 0
        self.views = []
        self.saved = False

    def teardown(self):
        self.bank.close()
        self.patch.undo()
        shutil.rmtree(self.folder, ignore_errors=True)

    def new_tokens(self, count):
        tokens = []
        for _ in range(count):
            unique = torch.zeros(1, UNIQUE_DIM)
            unique[0, self.num_written % UNIQUE_DIM] = 1.0
            # Numbers that float16 holds exactly: the naive bank need not round while nothing is decoded.
            random = torch.randint(-64, 64, (3, 2, 4), generator=self.generator) / 16
            tokens.append((self.num_written, {2: unique, 5: random[0]}, {2: random[1, :1], 5: random[2]}))
            self.num_written += 1
        return tokens

    def write(self, bank, name, tokens):
        keys, values = (
            [torch.stack([token[part][layer] for token in tokens], dim=1) for layer in LAYERS] for part in (1, 2)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            write = bank.append if name in bank else bank.add
            write(name, keys, values, [token[0] for token in tokens] if self.with_ids else None)

    @rule(name=NAMES, count=LENGTHS)
    def add_or_append(self, name, count):
        self.saved = False
        tokens = self.new_tokens(count)
        if self.naive.has_room(name, count):
            self.write(self.bank, name, tokens)
            self.naive.write(name, tokens)
        else:
            with pytest.raises(ValueError, match="are pinned"):
                self.write(self.bank, name, tokens)

    @precondition(lambda self: self.naive.documents)
    @rule(data=st.data())
    def delete(self, data):
        name = data.draw(st.sampled_from([document.name for document in self.naive.documents]))
        self.saved = False
        self.bank.delete(name)
        self.naive.delete(name)

    @precondition(lambda self: self.naive.documents)
    @rule(data=st.data(), is_pinned=st.booleans())
    def pin(self, data, is_pinned):
        document = data.draw(st.sampled_from(self.naive.documents))
        self.saved = False
        self.bank.pin(document.name, is_pinned)
        document.is_pinned = is_pinned

    @precondition(lambda self: self.in_folder)
    @rule()
    def compact(self):
        self.bank.folder.compact()
        self.bank.folder.verify()

    @precondition(lambda self: self.in_folder and self.naive.documents)
    @rule(data=st.data(), count=LENGTHS)
    def break_off(self, data, count):
        name = data.draw(st.sampled_from([document.name for document in self.naive.documents]))
        tokens = self.new_tokens(count)
        with contextlib.suppress(KeyError, ValueError), self.bank.transaction():
            self.bank.delete(name)
            self.write(self.bank, name, tokens)
            raise KeyError
        self.views = []

    @precondition(lambda self: self.naive.documents)
    @rule(data=st.data(), new=st.sampled_from(["a", "e", "f"]))
    def rename(self, data, new):
        document = data.draw(st.sampled_from(self.naive.documents))
        if self.naive.find(new) is None:
            self.bank.rename(document.name, new)
            document.name = new

    @precondition(lambda self: self.naive.documents)
    @rule(data=st.data(), count=LENGTHS, cut=LENGTHS)
    def update(self, data, count, cut):
        name = data.draw(st.sampled_from([document.name for document in self.naive.documents]))
        if self.bank._table.shapes is None:
            return
        tokens, machine = self.new_tokens(count), self

        def memorize(model, bank, text_or_ids, document_id, *, reuse, **options):
            for piece in (tokens[:cut], tokens[cut:]):
                if piece:
                    machine.write(bank, document_id, piece)
            return Memorized.of(len(tokens), len(tokens), 0)

        document = self.naive.find(name)
        room = self.naive.capacity - sum(owner.is_pinned and owner is not document for owner, _ in self.naive.resident)
        if min(self.naive.capacity, self.naive.chunks_in(count)) > room:
            with pytest.raises(ValueError, match="are pinned"), mock.patch("longmem.memory.bank.memorize", memorize):
                self.bank.update(name, "", model=NamedEncoder())
            return
        with mock.patch("longmem.memory.bank.memorize", memorize):
            self.bank.update(name, "", model=NamedEncoder())
        # What did not fit while the new text was encoded counts as written, in both.
        self.naive.delete(name)
        self.naive.write(name, tokens)
        self.naive.find(name).is_pinned = document.is_pinned

    @precondition(lambda self: not self.saved)  # a second time would show nothing new
    @rule()
    def save_and_load(self):
        self.saved = True
        if self.in_folder:
            self.bank.close()
            self.bank = MemoryBank.open(self.folder)
        else:
            self.bank.save(self.folder)
            self.bank = MemoryBank.load(self.folder)
        self.views = []

    @precondition(lambda self: self.naive.documents)
    @rule(data=st.data())
    def select(self, data):
        names = [document.name for document in self.naive.documents]
        chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
        self.views = [*self.views[-1:], (self.bank.select(chosen), chosen)]

    @invariant()
    def same_documents(self):
        if hasattr(self, "bank"):
            assert self.bank.documents() == [self.naive.info(document) for document in self.naive.documents]
            assert self.bank.num_chunks == len(self.naive.resident)
            resident = map(self.naive.info, self.naive.documents)
            assert self.bank.num_tokens == sum(each.num_tokens - each.first_resident_token for each in resident)
            for document in self.naive.documents:
                ids, first = self.bank.token_ids(document.name), self.naive.info(document).first_resident_token
                expected = [token[0] for token in document.tokens[first:]] if self.with_ids else None
                assert (None if ids is None else ids.tolist()) == expected

    @invariant()
    def same_reads(self):
        if hasattr(self, "bank"):
            self.compare(self.bank, self.naive.resident)
            for view, names in self.views:
                self.compare(view, [(owner, i) for owner, i in self.naive.resident if owner.name in names])

    def compare(self, reader, resident):
        """Compare search, gather and locate with the resident chunks, in both layers."""
        size = self.naive.chunk_size
        places = {(owner.name, i * size, min((i + 1) * size, len(owner.tokens))): (owner, i) for owner, i in resident}
        assert len(places) == len(resident)
        assert reader.is_empty == (not resident)
        for layer in LAYERS:
            chunks = {place: self.naive.chunk(*which, layer) for place, which in places.items()}
            means = {place: keys.double().mean(dim=1) for place, (keys, _) in chunks.items()}
            dim = UNIQUE_DIM if layer == 2 else 4
            own = list(means.values())
            queries = torch.stack([*own, torch.ones(HEADS[layer], dim, dtype=torch.double)], dim=1)
            num_chunks = len(resident) + 2
            rows, scores, _, _, sizes = reader.search(layer, queries, num_chunks)
            assert (rows >= 0).sum(dim=-1).eq(len(resident)).all()
            assert (rows[..., len(resident) :] == -1).all()
            assert torch.isneginf(scores[..., len(resident) :]).all()
            if not resident:
                continue
            rows, scores = rows[..., : len(resident)], scores[..., : len(resident)]
            # For each head, query and slot the naive number of the chunk that was found there.
            number = {place: i for i, place in enumerate(places)}
            found = torch.tensor([number[place[:3]] for place in reader.locate(rows)]).view(rows.shape)
            assert (found.sort(dim=-1).values == torch.arange(len(resident))).all()
            lengths = torch.tensor([stop - start for _, start, stop in places])
            assert torch.equal(
                torch.full_like(rows, size) if sizes is None else sizes[..., : len(resident)], lengths[found]
            )
            naive = (queries @ torch.stack(own, dim=2)).gather(2, found)
            torch.testing.assert_close(scores.double(), naive, rtol=1e-4, atol=1e-4)
            assert (naive.diff(dim=-1) < 1e-4).all()
            if layer == 2:
                assert (found[0, : len(own), 0] == torch.arange(len(own))).all()
            keys, values = reader.gather(layer, rows[:, -1], reader.generation)
            for part, stored in enumerate((keys, values)):
                filled = [pair[part] for pair in chunks.values()]  # up, with copies of their last tokens
                filled = [each[:, torch.arange(size).clamp(max=each.shape[1] - 1)] for each in filled]
                expected = decode(encode(torch.stack(filled, dim=1), self.storage_dtype)).float()
                for head in range(HEADS[layer]):
                    assert torch.equal(stored[head].float(), expected[head, found[head, -1]])


def machine_test(index, max_examples, in_folder=False, is_slow=False):
    """Return a test of a bank with this index, as pytest collects it."""
    machine = type("BankMachine", (BankMachine,), {"index": index, "in_folder": in_folder})
    machine.TestCase.settings = settings(
        max_examples=max_examples,
        stateful_step_count=25,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    if is_slow:
        machine.TestCase.pytestmark = [pytest.mark.slow]
    return machine.TestCase


# Thresholds and settings with which each kind is at work in a bank of a few chunks, and has to find all of them.
CLUSTERS, GRAPH, CODES = (
    "ivf:probed_share=1",
    "hnsw:search_depth=100",
    "pq:probed_share=1,bits=4,candidates=100",
)
test_any_sequence_of_operations = machine_test("mirror", 12)
test_any_sequence_in_a_folder = machine_test("flat", 6, in_folder=True)
test_any_sequence_with_clusters = machine_test(CLUSTERS, 3)
test_any_sequence_with_a_graph = machine_test(GRAPH, 3)
test_any_sequence_with_codes = machine_test(CODES, 3)
test_any_sequence_in_a_folder_with_clusters = machine_test(CLUSTERS, 3, in_folder=True)
test_any_sequence_in_a_folder_with_a_graph = machine_test(GRAPH, 3, in_folder=True)
test_any_sequence_in_a_folder_with_codes = machine_test(CODES, 3, in_folder=True)
# The same with more examples.
test_many_sequences_of_operations = machine_test("mirror", 150, is_slow=True)
test_many_sequences_in_a_folder = machine_test("flat", 75, in_folder=True, is_slow=True)
test_many_sequences_with_clusters = machine_test(CLUSTERS, 40, in_folder=True, is_slow=True)
test_many_sequences_with_a_graph = machine_test(GRAPH, 40, in_folder=True, is_slow=True)
test_many_sequences_with_codes = machine_test(CODES, 40, in_folder=True, is_slow=True)
