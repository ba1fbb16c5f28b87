"""Calls of everything public, the kind of each of their arguments, and values of that kind that must be refused."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny_models import save_tiny_backbone
from transformers import PreTrainedConfig

from longmem import LongMemConfig, LongMemForCausalLM, MemoryBank, MemoryStream, calibrate_heads
from longmem.memory.rows.documents import SourcePart
from longmem.training.heads import HeadSettings

NAN, INF = math.nan, math.inf
HALF = "\ud800"  # half of a surrogate pair, which nothing can write
IDS = torch.arange(12)[None]
ROWS = torch.zeros(2, 1).long()
# Kinds of arguments. The first value of each is tried in every run, all of them in the slow tests.
WRONG: dict[str, tuple[Any, ...]] = {
    "flag": ("yes", 1, 0, [], 2.5),
    "count": (0, -1, 2.5, "4", True, 10**18, NAN),
    "integer": ("x", 2.5, True, [1], 2**70),
    "origin": (2, "x", 2.5, True, [1], 2**70, -4, 400, 64),
    "part": (SourcePart(IDS[0, :3]), 5, b"x", SourcePart(IDS[0, :0])),
    "folder": ("", " ", 5, b"x", "a\0b", ["a"]),
    "device": ("cuda:99", "gpu", 5, ["cpu"], "cuda:x", "", "mps:7"),
    "model": ("x", 5, object(), MemoryBank, [], LongMemForCausalLM),
    "models": (5, "x", ["x"], [None]),
    "bank": ("x", 5, None, [], {}, MemoryBank),
    "reuse": ("x", 5, [], {}, (1, 2), ("a", "b")),
    "memory": ("x", 5, [], [None], ["a"], MemoryBank, {"a": 1}),
    "document": ("", 5, None, ["a"], b"a", HALF),
    "known document": ("aa", "", 5, None, ["a"]),
    "documents": (["zz"], 5, [5], "zz", [""]),
    "tags": ("x", 5, [5], [""], [None], [HALF]),
    "known tags": (["typo"], 5, [""], [5], "typo"),
    "date": ("x", NAN, INF, 1e15, True, [1]),
    "progress": (5, "x", lambda: None, []),
    "text": ("", " \n", None, 5, [0.5], [True, False], [[1, 2], [3, 4]], [999], [-1], b"x", ["a"], HALF),
    "piece": (
        None,
        5,
        [0.5],
        [True, False],
        [[1, 2], [3, 4]],
        [999],
        [-1],
        b"x",
        ["a"],
        HALF,
    ),  # a blank one is nothing, and no mistake
    "ids": ("x", None, IDS[0], IDS.float(), IDS.bool(), IDS + 300, IDS - 20, IDS[:, :0], IDS[:0], [[1, 2]]),
    "mask": (
        *(torch.ones(1, 12), torch.ones(1, 5).long(), torch.ones(2, 12).long(), torch.ones(12).long(), "x"),
        *(torch.full((1, 12), 3), torch.full((1, 12), -1), torch.full((1, 12), 0.5), [1] * 12),
    ),
    "positions": (torch.arange(5)[None], torch.arange(12), IDS.float(), IDS - 5, "x", [0]),
    "cache": ("x", (), 5, [IDS]),
    "labels": (IDS[:, :5], IDS.float(), IDS + 300, IDS - 30, "x", [1]),
    "keep logits": (-1, 1.5, "x", True, torch.ones(1)),
    "items": (0, -3, "x", NAN, True),
    "index": ("flatt", 5, None, "ivf:probed_share=7", "ivf:probed=7", "ivf:x"),
    "eviction": ("fif", 5, None, "ttl:seconds=-1", "ttl:seconds=nan", "lru:x=1"),
    "storage": ("float8", 5, None, torch.int64),
    "refresh": ("froz", 5, {}, "bounded:max_lag=-1", {"name": "x"}),
    "fingerprint": ("", 5, [], b"x"),
    "age": ("expp", 5, "exp:a=-5", "exp:b=1"),
    "search": ("tokens", 5, None),
    "layers": ([], [2**80], [-1], [0, 0], 5, "0", None, [1.5], [True]),
    "layer": (9, "x", None),
    "segment": ("x", 5, "NEW"),
    "token ids": ([1] * 7, "abcdefgh", 5, [1.5] * 8, [-1] * 8, [2**40] * 8, [[1]] * 8),
    "rows": (
        torch.tensor([99]),
        torch.zeros(1, device="meta").long(),
        torch.tensor([0.5]),
        "x",
        [0],
        torch.tensor([-5]),
    ),
    "gathered": (torch.full((2, 1), 99), torch.zeros(3, 1).long(), "x", torch.zeros(2, 1)),
    "queries": (
        "x",
        torch.zeros(2, 2, 8, device="meta"),
        torch.zeros(1, 2, 8),
        torch.zeros(2, 2, 3),
        torch.zeros(2, 8),
        torch.zeros(2, 2, 8).long(),
    ),
    "scaling": (-1.0, "x", NAN, 0.0, INF),
    "name": ("", " ", 5, None, [], b"x"),
    "options": (5, "x", [1], {1: 2}, {"dtype": "float3"}),
    "tokenizer": (5, "x"),
    "dtype": ("x", 5, torch.int8),
    "state": (5, {}, {"x": torch.ones(1)}),
    "texts": ([], 5, ["a"], ["a", 5], ["a", " "], ""),
    "settings": (
        5,
        {},
        HeadSettings(steps=0),
        HeadSettings(num_neighbours=2**20),
        HeadSettings(dtype="x"),
        HeadSettings(pull=NAN),
    ),  # type: ignore[arg-type]
    "console": (5, "x"),
    "string": (5, b"x"),
    "factor": (0, 3, "2", 2.0),
    "chunk": (0, -4, "4", 4.0, True, 5),
    "size": (0, -1, "4", 2.5),
    "distance": (-1, "x", 2.5),
    "memory layers": ([9], [2, 1], [], "ab", 5, [1.5], [-1]),
    "memory heads": ([1], [[9]], [[]], "x", [[1], [2], [3]]),
    "start": ([-1], [10**6], ["<s>"], [2.5], "x", 2),
    "choice": ("mixed", 5, None),
    "number": (NAN, INF, "x", True),
    "lora": (5, {}, {"rank": 0}, {"rank": 4, "alpha": INF}, {"rank": 4, "target_modules": "q"}, {1: 4}, {"rnk": 4}),
    "saved configuration": (5, {}, object(), True),
    "loaded": ("x", 5, object(), PreTrainedConfig),
    "asked": ("", 5, b"a", ["a"]),
    "one memory": ("x", 5, {}, MemoryBank),
    "another size": (300, 7000, "x", 2.5),
    "place": (-1, "x", 2.5, True),
    "precision": ("float8", 5, "half"),
    "paper's": (1, "side"),
    "paper's options": (5, {"rms_norm_eps": 1e-5}),
    "configuration": (5, {}, {"model_type": "llamaa"}, "x"),
    "drawn": (NAN, "x", -1.0, True),
    "hidden layers": ([99], [-1]),
}


class World(NamedTuple):
    """What the calls work on."""

    model: LongMemForCausalLM
    bank: MemoryBank
    folder: Path  # with a backbone, a saved model, a bank and a stream in it

    @property
    def keys(self) -> list[torch.Tensor]:
        """Return keys of eight tokens, for each memory layer."""
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(2, 8, 8, generator=generator) for _ in self.bank.memory_layers]

    def fresh(self) -> MemoryBank:
        """Return a bank of its own with the same documents."""
        return self.bank.copy()

    def read_stream(self) -> MemoryStream:
        """Return a stream that has read something."""
        stream = self.model.stream(self.fresh())
        stream.read(list(range(20)))
        return stream


def make_world(folder: Path) -> World:
    """Return a tiny model and a bank with the documents "a" and "b"."""
    backbone = save_tiny_backbone(folder / "backbone")
    model = LongMemForCausalLM.from_backbone(str(backbone), segment_length=32, num_retrieved_tokens=8).eval()
    model.save_pretrained(folder / "model")
    bank = MemoryBank.for_model(model)
    model.memorize(bank, torch.arange(64), "a", tags=["first"], dated=1e9)
    model.memorize(bank, torch.arange(64, 100), "b", tags=["second"], dated=1.1e9)
    bank.save(folder / "bank")
    model.stream(bank.copy()).save(folder / "stream")
    return World(model, bank, folder)


def of_backbone(world: World, **fields: Any) -> Any:
    """Return a model on the tiny backbone."""
    return LongMemForCausalLM.from_backbone(world.model.backbone, **{"segment_length": 32, **fields})


Call = tuple[Callable[..., Any], dict[str, str]]
# Each makes a good call, with what is given instead of its arguments; and the kinds of these, by name.
CALLS: dict[str, Call] = {
    "MemoryBank": (
        lambda w, **k: MemoryBank(**{"memory_layers": [0], "chunk_size": 4, **k}),
        {
            "memory_layers": "layers",
            "capacity_tokens": "count",
            "capacity_bytes": "count",
            "chunk_size": "count",
            "search": "search",
            "index": "index",
            "eviction": "eviction",
            "storage_dtype": "storage",
            "device": "device",
            "refresh": "refresh",
            "fingerprint": "fingerprint",
            "age_prior": "age",
        },
    ),
    "MemoryBank.for_model": (
        lambda w, model=None, **k: MemoryBank.for_model(w.model if model is None else model, **k),
        {"model": "model", "folder": "folder", "capacity_tokens": "count", "chunk_size": "count", "search": "search"},
    ),
    "MemoryBank.create": (
        lambda w, folder="new", **k: MemoryBank.create(folder, **{"memory_layers": [0], "chunk_size": 4, **k}),
        {"folder": "folder", "device": "device", "index": "index"},
    ),
    "MemoryBank.open": (
        lambda w, folder=None, model=None, **k: MemoryBank.open(
            folder if folder is not None else w.folder / "bank", model, **k
        ),
        {
            "folder": "folder",
            "model": "model",
            "read_only": "flag",
            "device": "device",
            "mmap": "flag",
            "refresh": "refresh",
        }
        | {"strict": "flag"},
    ),
    "MemoryBank.load": (
        lambda w, folder=None, model=None, **k: MemoryBank.load(
            folder if folder is not None else w.folder / "bank", model, **k
        ),
        {"folder": "folder", "model": "model", "device": "device", "refresh": "refresh", "strict": "flag"},
    ),
    "MemoryBank.save": (lambda w, folder: w.bank.save(folder), {"folder": "folder"}),
    "MemoryBank.copy": (lambda w, device: w.bank.copy(device=device), {"device": "device"}),
    "MemoryBank.add": (
        lambda w, document_id="n", **k: w.bank.add(document_id, **{"keys": w.keys, "values": w.keys, **k}),
        {"document_id": "document", "tags": "tags", "segment": "segment", "dated": "date", "valid_until": "date"}
        | {"token_ids": "token ids", "keys": "string", "values": "string"},
    ),
    "MemoryBank.append": (
        lambda w, document_id="a", **k: w.bank.append(document_id, **{"keys": w.keys, "values": w.keys, **k}),
        {"document_id": "known document", "segment": "segment", "token_ids": "token ids"},
    ),
    "MemoryBank.update": (
        lambda w, document_id="a", text_or_ids="hello", **k: w.bank.update(
            document_id, text_or_ids, **{"model": w.model, **k}
        ),
        {
            "document_id": "known document",
            "text_or_ids": "text",
            "model": "model",
            "batch_size": "count",
            "progress": "progress",
        },
    ),
    "MemoryBank.copy_tokens": (
        lambda w, **k: w.bank.copy_tokens(
            **{"document_id": "n", "bank": w.bank, "origin_id": "a", "origin": 0, "part": SourcePart(IDS[0, :4]), **k}
        ),
        {
            "document_id": "document",
            "bank": "bank",
            "origin_id": "known document",
            "origin": "origin",
            "part": "part",
        },
    ),
    "MemoryBank.to": (
        lambda w, **k: w.bank.to(**{"device": "cpu", **k}),
        {"device": "device", "device_budget": "count"},
    ),
    "MemoryBank.delete": (lambda w, document_id: w.bank.delete(document_id), {"document_id": "known document"}),
    "MemoryBank.rename": (
        lambda w, old="a", new="n": w.bank.rename(old, new),
        {"old": "known document", "new": "document"},
    ),
    "MemoryBank.tag": (
        lambda w, document_id="a", tags=(): w.bank.tag(document_id, tags),
        {"document_id": "known document", "tags": "tags"},
    ),
    "MemoryBank.pin": (
        lambda w, document_id="a", is_pinned=True: w.bank.pin(document_id, is_pinned),
        {"document_id": "known document", "is_pinned": "flag"},
    ),
    "MemoryBank.use_index": (lambda w, index: w.bank.use_index(index), {"index": "index"}),
    "MemoryBank.use_age_prior": (lambda w, age_prior: w.bank.use_age_prior(age_prior), {"age_prior": "age"}),
    "MemoryBank.supersede": (
        lambda w, document_id="a", by="b": w.bank.supersede(document_id, by),
        {"document_id": "known document"},
    ),
    "MemoryBank.restore": (lambda w, document_id: w.bank.restore(document_id), {"document_id": "known document"}),
    "MemoryBank.expire": (lambda w, now: w.bank.expire(now), {"now": "date"}),
    "MemoryBank.info": (lambda w, document_id: w.bank.info(document_id), {"document_id": "known document"}),
    "MemoryBank.segments": (lambda w, document_id: w.bank.segments(document_id), {"document_id": "known document"}),
    "MemoryBank.token_ids": (
        lambda w, document_id="a", **k: w.bank.token_ids(document_id, **k),
        {"document_id": "known document", "start": "place"},
    ),
    "MemoryBank.ready_for": (lambda w, model: w.bank.ready_for(model), {"model": "model"}),
    "MemoryBank.select": (
        lambda w, document_ids=None, tags=(): w.bank.select(document_ids, tags=tags),
        {"document_ids": "documents", "tags": "known tags"},
    ),
    "MemoryBank.search": (
        lambda w, **k: w.bank.search(**{"layer": 2, "queries": torch.ones(2, 2, 8), "num_chunks": 2, **k}),
        {"layer": "layer", "queries": "queries", "num_chunks": "count", "scaling": "scaling", "selection": "string"},
    ),
    "MemoryBank.log_weights": (lambda w, rows, **k: w.bank.log_weights(rows, **k), {"rows": "rows"}),
    "MemoryBank.search_keys": (lambda w, layer: w.bank.search_keys(layer), {"layer": "layer"}),
    "MemoryBank.stored": (lambda w, layer: w.bank.stored(layer, w.bank.generation), {"layer": "layer"}),
    "MemoryBank.gather": (
        lambda w, layer=2, rows=ROWS: w.bank.gather(layer, rows, w.bank.generation),
        {"layer": "layer", "rows": "gathered"},
    ),
    "MemoryBank.nearest": (
        lambda w, **k: w.bank.nearest(**{"layer": 2, "queries": torch.ones(2, 2, 8), "num_chunks": 2, **k}),
        {"layer": "layer", "queries": "queries", "num_chunks": "count", "selection": "string"},
    ),
    "MemoryBank.sample": (
        lambda w, num_chunks=2, **k: w.bank.sample(num_chunks, **k),
        {"num_chunks": "count", "selection": "string"},
    ),
    "MemoryBank.next_ids": (lambda w, rows: w.bank.next_ids(rows, w.bank.generation), {"rows": "rows"}),
    "MemoryBank.locate": (lambda w, rows: w.bank.locate(rows), {"rows": "rows"}),
    "MemoryBank.freshness.use": (lambda w, refresh: w.bank.freshness.use(refresh), {"refresh": "refresh"}),
    "MemoryBank.freshness.reencode": (
        lambda w, model=None, **k: w.bank.freshness.reencode(w.model if model is None else model, **k),
        {"model": "model", "workers": "models", "budget_tokens": "integer", "progress": "progress"},
    ),
    "MemoryBank.freshness.sweep": (
        lambda w, model=None, **k: w.bank.freshness.sweep(w.model if model is None else model, **k),
        {"model": "model", "budget_tokens": "integer"},
    ),
    "MemoryBank.freshness.report": (
        lambda w, model=None, **k: w.bank.freshness.report(w.model if model is None else model, **k),
        {"model": "model", "probe": "flag"},
    ),
    "LongMemForCausalLM": (
        lambda w, **k: LongMemForCausalLM(**{"config": w.model.config, "backbone": w.model.backbone, **k}),
        {"config": "configuration", "backbone": "name", "tokenizer": "tokenizer"},
    ),
    "LongMemForCausalLM.from_backbone": (
        lambda w, backbone="", **k: (
            LongMemForCausalLM.from_backbone(backbone or str(w.folder / "backbone"), **k)
            if "backbone_options" in k or "tokenizer" in k
            else LongMemForCausalLM.from_backbone(backbone, **k)
        ),
        {"backbone": "name", "backbone_options": "options", "tokenizer": "tokenizer"},
    ),
    "LongMemForCausalLM.from_pretrained": (
        lambda w, pretrained_model_name_or_path=None, **k: LongMemForCausalLM.from_pretrained(
            w.folder / "model" if k else pretrained_model_name_or_path, **k
        ),
        {"pretrained_model_name_or_path": "name", "config": "saved configuration", "backbone": "loaded"}
        | {"tokenizer": "tokenizer", "backbone_options": "options", "generation_config": "loaded"}
        | dict.fromkeys(("strict_backbone", "output_loading_info"), "flag")
        | dict.fromkeys(("revision", "subfolder", "variant"), "string"),
    ),
    "LongMemForCausalLM.save_pretrained": (
        lambda w, save_directory="out", **k: w.model.save_pretrained(save_directory, **k),
        {
            "save_directory": "folder",
            "dtype": "dtype",
            "save_backbone": "flag",
            "state_dict": "state",
            "repo_id": "string",
        }
        | dict.fromkeys(("is_main_process", "push_to_hub"), "flag"),
    ),
    "LongMemForCausalLM.push_to_hub": (
        lambda w, repo_id="me/x", **k: w.model.push_to_hub(repo_id, **k),
        {"dtype": "dtype"}
        | dict.fromkeys(("repo_id", "commit_message", "commit_description", "revision"), "string")
        | dict.fromkeys(("private", "save_backbone", "create_pr"), "flag"),
    ),
    "LongMemForCausalLM.find": (
        lambda w, memory=None, text="a", k=1: w.model.find(w.bank if memory is None else memory, text, k),
        {"text": "asked", "k": "count", "memory": "one memory"},
    ),
    "LongMemForCausalLM.resize_token_embeddings": (
        lambda w, **k: w.model.resize_token_embeddings(**k),
        {"new_num_tokens": "another size", "pad_to_multiple_of": "another size"},
    ),
    "LongMemForCausalLM.set_input_embeddings": (
        lambda w, value: w.model.set_input_embeddings(value),
        {"value": "loaded"},
    ),
    "LongMemForCausalLM.set_output_embeddings": (
        lambda w, new_embeddings: w.model.set_output_embeddings(new_embeddings),
        {"new_embeddings": "loaded"},
    ),
    "LongMemForCausalLM.get_memory_footprint": (
        lambda w, return_buffers: w.model.get_memory_footprint(return_buffers),
        {"return_buffers": "flag"},
    ),
    "MemoryBank.find": (
        lambda w, text="a", k=1, model=None: w.bank.find(text, model, k),
        {"text": "asked", "k": "count", "model": "model"},
    ),
    "MemoryBank.text": (
        lambda w, document_id="a", **k: w.bank.text(document_id, **k),
        {"document_id": "known document", "start": "place", "stop": "place"},
    ),
    "MemoryStream.generate_text": (
        lambda w, **k: list(w.read_stream().generate_text(**{"max_new_tokens": 1, **k})),
        {"max_new_tokens": "place", "skip_special_tokens": "flag"},
    ),
    "LongMemForCausalLM.load_side_state_dict": (
        lambda w, state: w.model.load_side_state_dict(state),
        {"state": "state"},
    ),
    "LongMemForCausalLM.encoder_stamp": (lambda w, exact: w.model.encoder_stamp(exact=exact), {"exact": "flag"}),
    "LongMemForCausalLM.forward": (
        lambda w, input_ids=IDS, **k: w.model(input_ids, **k),
        {
            "input_ids": "ids",
            "attention_mask": "mask",
            "position_ids": "positions",
            "cache": "cache",
            "labels": "labels",
        }
        | {"use_cache": "flag", "memory": "memory", "logits_to_keep": "keep logits", "output_memory_reads": "flag"}
        | {
            "output_memory_keys": "flag",
            "num_items_in_batch": "items",
            "past_key_values": "cache",
            "return_dict": "flag",
        },
    ),
    "LongMemForCausalLM.generate": (
        lambda w, input_ids=IDS, **k: w.model.generate(input_ids, **{"max_new_tokens": 1, **k}),
        {"input_ids": "ids", "attention_mask": "mask", "memory": "memory", "max_new_tokens": "count"},
    ),
    "LongMemForCausalLM.encode": (
        lambda w, input_ids=IDS, **k: w.model.encode(input_ids, **k),
        {"input_ids": "ids", "attention_mask": "mask", "position_ids": "positions"},
    ),
    "LongMemForCausalLM.run_backbone": (
        lambda w, input_ids=IDS, **k: w.model.run_backbone(input_ids, **k),
        {"input_ids": "ids", "attention_mask": "mask", "extra_hidden_layers": "hidden layers"},
    ),
    "LongMemForCausalLM.memorize": (
        lambda w, **k: w.model.memorize(**{"bank": w.bank, "text_or_ids": "hello", "document_id": "n", **k}),
        {
            "bank": "bank",
            "text_or_ids": "text",
            "document_id": "document",
            "append": "flag",
            "tags": "tags",
            "dated": "date",
        }
        | {"valid_until": "date", "reuse": "reuse", "batch_size": "count", "progress": "progress"},
    ),
    "LongMemForCausalLM.stream": (
        lambda w, memory=None, **k: w.model.stream(w.bank if memory is None else memory, **k),
        {"document_id": "document", "window": "integer", "keep": "integer", "seed": "integer", "memory": "memory"},
    ),
    "MemoryStream.read": (lambda w, text_or_ids: w.read_stream().read(text_or_ids), {"text_or_ids": "piece"}),
    "MemoryStream.score": (lambda w, text_or_ids: w.read_stream().score(text_or_ids), {"text_or_ids": "piece"}),
    "MemoryStream.generate": (
        lambda w, max_new_tokens=1, **k: w.read_stream().generate(max_new_tokens, **{"do_sample": True, **k}),
        {"max_new_tokens": "integer", "temperature": "drawn", "top_p": "drawn", "top_k": "drawn"},
    ),
    "MemoryStream.save": (lambda w, folder: w.read_stream().save(folder), {"folder": "folder"}),
    "MemoryStream.load": (
        lambda w, folder=None, model=None, **k: MemoryStream.load(
            w.folder / "stream" if folder is None else folder, w.model if model is None else model, **k
        ),
        {"folder": "folder", "model": "model", "device": "device"},
    ),
    "calibrate_heads": (
        lambda w, backbone="x", texts=("a", "b"), **k: calibrate_heads(backbone, texts, **k),
        {"backbone": "name", "texts": "texts", "settings": "settings", "console": "console"},
    ),
    "LongMemConfig": (
        lambda w, **k: of_backbone(w, **k) if "backbone_config" not in k else LongMemConfig(**k),
        {"backbone_config": "configuration", "layer_reduction_factor": "factor", "memory_layers": "memory layers"}
        | {"memory_heads": "memory heads", "chunk_size": "chunk", "forget_sinks": "flag", "search": "choice"}
        | {"start_token_ids": "start", "start_reads": "flag", "distance_per": "choice"}
        | {
            "num_retrieved_tokens": "chunk",
            "segment_length": "size",
            "memory_distance": "distance",
            "residual": "choice",
        }
        | {"residual_states": "choice", "fusion": "choice", "init": "choice", "side_layer_offset": "paper's"}
        | {"num_side_layers": "paper's", "final_norm": "choice", "side_layer_options": "paper's options"}
        | {
            "side_network_dtype": "precision",
            "memory_bias_init": "number",
            "memory_null_init": "number",
            "lora": "lora",
        }
        | {"backbone_revision": "string"},
    ),
}


def rows(every: bool) -> Iterator[tuple[str, str, Any]]:
    """Yield (callable, argument, wrong value): one value for each argument, or every value."""
    for name, (_, arguments) in CALLS.items():
        for argument, kind in arguments.items():
            for value in WRONG[kind] if every else WRONG[kind][:1]:
                yield name, argument, value


def public_callables() -> dict[str, Callable[..., Any]]:
    """Return the functions and public methods of all that `longmem` exports, by their names."""
    import longmem

    found: dict[str, Callable[..., Any]] = {}
    for exported in longmem.__all__:
        thing = getattr(longmem, exported)
        if not inspect.isclass(thing):
            found[exported] = thing
            continue
        if issubclass(thing, Exception):
            continue
        found[exported] = thing.__init__
        for owner in thing.__mro__:
            if owner.__module__.startswith("longmem."):
                for name, method in vars(owner).items():
                    function = method.__func__ if isinstance(method, classmethod) else method
                    if inspect.isfunction(function) and not name.startswith("_"):
                        found.setdefault(f"{exported}.{name}", function)
    return found
