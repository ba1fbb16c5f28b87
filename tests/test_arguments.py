"""Nothing is accepted and dropped: every argument of everything public has an effect here; that a wrong one is refused,
`test_wrong_calls.py` shows. An argument without a row fails the first test.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from model.conftest import build_backbone
from transformers import DynamicCache, GenerationConfig, PreTrainedConfig
from wrong_values import IDS, World, make_world, public_callables

import longmem
from longmem import LongMemConfig, LongMemForCausalLM, MemoryBank, MemoryStream
from longmem.memory.rows.documents import SourcePart
from longmem.model import names, pretrained

OF_TRANSFORMERS = set(inspect.signature(PreTrainedConfig.__init__).parameters)
Effect = Callable[[World], bool]


def differ(one: Any, other: Any) -> bool:
    """Return whether two results are not the same."""
    if isinstance(one, torch.Tensor):
        return one.shape != other.shape or bool((one != other).any())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) != len(other) or any(map(differ, one, other))
    return bool(one != other)


def built(**fields: Any) -> LongMemForCausalLM:
    torch.manual_seed(1)
    options = {"segment_length": 32, "num_retrieved_tokens": 8, **fields}
    return LongMemForCausalLM.from_backbone(build_backbone("llama"), **options).eval()


def footprint(model: LongMemForCausalLM) -> list[Any]:
    """Return what a configuration determines: trained weights, stored numbers, and what is read of them."""
    bank = MemoryBank.for_model(model, storage_dtype="float32")
    model.memorize(bank, torch.arange(90), "a")
    output = model(IDS, memory=bank)
    keys, _ = model.encode(IDS)
    weights = [(name, tuple(each.shape), each.dtype) for name, each in model.side_network.trained_parameters().items()]
    return [output.logits.float(), keys, weights, bank.num_tokens, bank.search_keys(bank.memory_layers[0])]


def of_config(other: dict[str, Any], usual: dict[str, Any] | None = None) -> Effect:
    return lambda w: differ(footprint(built(**(usual or {}))), footprint(built(**{**(usual or {}), **other})))


PAPER = {"residual": "paper", "layer_reduction_factor": 2, "memory_layers": [2]}
CONFIG: dict[str, Effect] = {
    "backbone_name_or_path": lambda w: differ(LongMemConfig(backbone_name_or_path="x").backbone_name_or_path, None),
    "backbone_revision": lambda w: differ(LongMemConfig(backbone_revision="x").backbone_revision, None),
    "backbone_config": lambda w: LongMemConfig(backbone_config=w.model.backbone.config).num_backbone_layers == 4,
    "layer_reduction_factor": of_config({"layer_reduction_factor": 2}, {"memory_layers": [2]}),
    "memory_layers": of_config({"memory_layers": [1, 2]}),
    "memory_heads": of_config({"memory_heads": [[1]]}),
    "chunk_size": of_config({"chunk_size": 8}),
    "forget_sinks": of_config({"forget_sinks": True}),
    "start_token_ids": of_config({"start_token_ids": [5]}),
    "start_reads": of_config({"start_reads": False}),
    "search": of_config({"search": "token"}),
    "choice_per": of_config({"choice_per": "group"}),
    "num_retrieved_tokens": of_config({"num_retrieved_tokens": 16}),
    "num_neighbours": of_config({"num_neighbours": 8}),
    "segment_length": of_config({"segment_length": 16}),
    "memory_distance": of_config({"memory_distance": 4}),
    "distance_per": of_config({"distance_per": "head"}),
    "residual": of_config({"residual": "paper"}, {"layer_reduction_factor": 2, "memory_layers": [2]}),
    "residual_states": of_config({"residual_states": "post_norm"}, PAPER),
    "fusion": of_config({"fusion": "gated", "memory_bias_init": 0.0}, {"memory_bias_init": 0.0}),
    "init": of_config({"init": "identity"}, PAPER),
    "side_layer_offset": of_config({"side_layer_offset": 1}, PAPER),
    "num_side_layers": of_config({"num_side_layers": 1, "memory_layers": [0]}, {**PAPER, "memory_layers": [0]}),
    "final_norm": of_config({"final_norm": "side"}, PAPER),
    "side_layer_options": of_config({"side_layer_options": {"rms_norm_eps": 0.5}}, PAPER),
    "side_network_dtype": of_config({"side_network_dtype": "bfloat16"}),
    "memory_bias_init": of_config({"memory_bias_init": 2.0}),
    "memory_null_init": of_config({"memory_null_init": 2.0}),
    "lora": of_config({"lora": {"rank": 2}}),
}


def bank_with(**options: Any) -> MemoryBank:
    return MemoryBank(**{"memory_layers": [2], "chunk_size": 4, **options})


def filled(w: World, **options: Any) -> MemoryBank:
    """Return a bank with three documents of eight tokens."""
    bank = bank_with(**options)
    for number, name in enumerate("abc"):
        bank.add(name, w.keys, w.keys, range(8), dated=1e9 * (1 + number / 10))
    return bank


BANK: dict[str, Effect] = {
    "memory_layers": lambda w: bank_with(memory_layers=[1, 2]).memory_layers == (1, 2),
    "chunk_size": lambda w: filled(w, chunk_size=8).num_chunks == 3 != filled(w).num_chunks,
    "capacity_tokens": lambda w: filled(w, capacity_tokens=16).num_tokens == 16,
    "capacity_bytes": lambda w: filled(w, capacity_bytes=1000).num_tokens < 24,
    "search": lambda w: filled(w, search="token").by_token,
    "index": lambda w: bank_with(index="hnsw").index != bank_with().index,
    "eviction": lambda w: bank_with(eviction="lru").eviction != bank_with().eviction,
    "storage_dtype": lambda w: filled(w, storage_dtype="float32").nbytes > filled(w).nbytes,
    "device": lambda w: bank_with(device="meta").device.type == "meta",
    "refresh": lambda w: bank_with(refresh="lazy").refresh != bank_with().refresh,
    "fingerprint": lambda w: bank_with(fingerprint="x").fingerprint == "x",
    "age_prior": lambda w: bank_with(age_prior="exp:a=1").age_prior is not None,
}


def opened(w: World, **options: Any) -> MemoryBank:
    bank = MemoryBank.open(w.folder / "bank", **{"read_only": True, **options})
    bank.close()
    return bank


def own_folder(w: World, **options: Any) -> MemoryBank:
    """Return a bank of its own, opened: what is chosen stays in its folder."""
    w.bank.save("own-folder")
    bank = MemoryBank.open("own-folder", **options)
    bank.close()
    return bank


def raises(call: Callable[[], Any]) -> bool:
    try:
        call()
    except Exception:
        return True
    return False


def after(w: World, change: Callable[[MemoryBank], Any], look: Callable[[MemoryBank], Any]) -> bool:
    """Return whether a change is seen in a bank."""
    bank = w.fresh()
    before = look(bank)
    change(bank)
    return differ(before, look(bank))


def other_model(w: World) -> LongMemForCausalLM:
    """Return a model of the same sizes whose encoder is another one."""
    backbone = build_backbone("llama", vocab_size=256)
    with torch.no_grad():
        backbone.get_input_embeddings().weight.mul_(1.5)  # type: ignore[operator, union-attr]
    return LongMemForCausalLM.from_backbone(backbone, segment_length=32, num_retrieved_tokens=8).eval()


def added(w: World, **options: Any) -> MemoryBank:
    bank = w.fresh()
    bank.add("n", w.keys, w.keys, **options)
    return bank


def appended(w: World, **options: Any) -> MemoryBank:
    bank = bank_with()
    source = {name: value for name, value in options.items() if name != "segment"}
    bank.add("n", w.keys, w.keys, **source)
    bank.append("n", w.keys, [2 * each for each in w.keys], **options)
    return bank


def found(w: World, **options: Any) -> Any:
    bank = options.pop("bank", None) or filled(w, age_prior="exp:a=1e-5")
    return tuple(bank.search(**{"layer": 2, "queries": torch.ones(2, 1, 8), "num_chunks": 3, **options}))[:2]


SOURCE = {"token_ids": range(8), "text": "abcdefgh", "char_ends": range(1, 9)}
BANK_CALLS: dict[str, dict[str, Effect]] = {
    "for_model": {
        "model": lambda w: (
            MemoryBank.for_model(w.model).fingerprint != MemoryBank.for_model(other_model(w)).fingerprint
        ),
        "folder": lambda w: MemoryBank.for_model(w.model, folder="own").folder.path.is_dir(),
        "options": lambda w: MemoryBank.for_model(w.model, capacity_tokens=64).capacity_tokens == 64,
    },
    "create": {
        "folder": lambda w: MemoryBank.create("made", memory_layers=[0], chunk_size=4).folder.path.name == "made",
        "settings": lambda w: MemoryBank.create("small", memory_layers=[0], chunk_size=2).chunk_size == 2,
    },
    "open": {
        "folder": lambda w: len(opened(w).documents()) == 2,
        "model": lambda w: raises(lambda: opened(w, model=other_model(w))),
        "read_only": lambda w: raises(lambda: MemoryBank.open(w.folder / "bank", read_only=True).delete("a")),
        "device": lambda w: opened(w, device="meta").device.type == "meta",
        "mmap": lambda w: opened(w, mmap=False)._on_disk is not None,
        "refresh": lambda w: own_folder(w, refresh="lazy").refresh == "lazy",
        "strict": lambda w: not raises(lambda: own_folder(w, model=other_model(w), strict=False)),
    },
    "load": {
        "folder": lambda w: len(MemoryBank.load(w.folder / "bank").documents()) == 2,
        "model": lambda w: raises(lambda: MemoryBank.load(w.folder / "bank", other_model(w))),
        "device": lambda w: MemoryBank.load(w.folder / "bank", device="meta").device.type == "meta",
        "refresh": lambda w: MemoryBank.load(w.folder / "bank", refresh="lazy").refresh == "lazy",
        "strict": lambda w: not raises(lambda: MemoryBank.load(w.folder / "bank", other_model(w), strict=False)),
    },
    "save": {"folder": lambda w: w.bank.save("saved") is None and Path("saved").is_dir()},
    "to": {
        "device": lambda w: w.bank.copy().to("meta").device.type == "meta",
        "device_budget": lambda w: raises(lambda: w.bank.copy().to("meta", device_budget=1)),
    },
    "copy": {"device": lambda w: w.bank.copy(device="meta").device.type == "meta"},
    "add": {
        "document_id": lambda w: "n" in added(w),
        "keys": lambda w: differ(added(w).search_keys(2), w.bank.search_keys(2)),
        "values": lambda w: added(w).info("n").num_tokens == 8,
        "token_ids": lambda w: added(w, token_ids=range(8)).token_ids("n") is not None,
        "text": lambda w: added(w, **SOURCE).text("n") == "abcdefgh",
        "char_ends": lambda w: added(w, **SOURCE).locate(torch.tensor([25]))[0].text == "abcd",  # type: ignore[union-attr]
        "tags": lambda w: added(w, tags=["x"]).info("n").tags == ("x",),
        "segment": lambda w: added(w, token_ids=range(8), segment="new").segments("n")[0].is_known,
        "dated": lambda w: added(w, dated=1.0).info("n").dated == 1.0,
        "valid_until": lambda w: added(w, valid_until=1.0).expire() == ["n"],
    },
    "append": {
        "document_id": lambda w: appended(w).info("n").num_tokens == 16,
        "keys": lambda w: appended(w).num_chunks == 4,
        "values": lambda w: differ(*gathered(appended(w), rows=torch.tensor([[0, 2]] * 2))[1].unbind(1)),
        "token_ids": lambda w: len(appended(w, token_ids=range(8)).token_ids("n")) == 16,  # type: ignore[arg-type]
        "text": lambda w: appended(w, **SOURCE).text("n") == "abcdefgh" * 2,
        "char_ends": lambda w: appended(w, **SOURCE).locate(torch.tensor([3]))[0].text == "efgh",  # type: ignore[union-attr]
        "segment": lambda w: appended(w, token_ids=range(8), segment="new").segments("n")[-1].is_known,
    },
    "update": {
        "document_id": lambda w: after(
            w, lambda b: b.update("a", IDS[0], model=w.model), lambda b: b.info("a").num_tokens
        ),
        "text_or_ids": lambda w: after(w, lambda b: b.update("a", "new", model=w.model), lambda b: b.text("a")),
        "model": lambda w: raises(lambda: w.fresh().update("a", "new", model=other_model(w))),
        "batch_size": lambda w: batches(w, lambda b, **k: b.update("a", list(range(128)), model=w.model, **k)),
        "progress": lambda w: told(lambda **k: w.fresh().update("a", "new", model=w.model, **k)),
    },
    "copy_tokens": {
        "document_id": lambda w: "n" in copied(w),
        "bank": lambda w: copied(w).info("n").num_tokens == 4,
        "origin_id": lambda w: differ(copied(w).search_keys(2)[:, -1], copied(w, origin_id="b").search_keys(2)[:, -1]),
        "origin": lambda w: differ(copied(w).search_keys(2)[:, -1], copied(w, origin=8).search_keys(2)[:, -1]),
        "part": lambda w: copied(w, part=SourcePart(IDS[0, :8])).info("n").num_tokens == 8,
        "said": lambda w: copied(w, tags=["x"]).info("n").tags == ("x",),
    },
    "delete": {"document_id": lambda w: after(w, lambda b: b.delete("a"), lambda b: b.documents())},
    "rename": {
        "old": lambda w: after(w, lambda b: b.rename("a", "n"), lambda b: "a" in b),
        "new": lambda w: after(w, lambda b: b.rename("a", "n"), lambda b: "n" in b),
    },
    "tag": {
        "document_id": lambda w: after(w, lambda b: b.tag("b", ["x"]), lambda b: b.info("b").tags),
        "tags": lambda w: after(w, lambda b: b.tag("a", ["x"]), lambda b: b.info("a").tags),
    },
    "pin": {
        "document_id": lambda w: after(w, lambda b: b.pin("b"), lambda b: b.info("b").is_pinned),
        "is_pinned": lambda w: not after(w, lambda b: b.pin("a", False), lambda b: b.info("a").is_pinned),
    },
    "use_index": {"index": lambda w: after(w, lambda b: b.use_index("hnsw"), lambda b: b.index)},
    "use_age_prior": {"age_prior": lambda w: after(w, lambda b: b.use_age_prior("exp:a=1"), lambda b: b.age_prior)},
    "supersede": {
        "document_id": lambda w: after(w, lambda b: b.supersede("a"), lambda b: b.info("a").is_superseded),
        "by": lambda w: after(w, lambda b: b.supersede("a", "b"), lambda b: b.info("a").superseded_by),
    },
    "restore": {
        "document_id": lambda w: not after(w, lambda b: (b.supersede("a"), b.restore("a")), lambda b: b.info("a"))
    },
    "expire": {"now": lambda w: added(w, valid_until=time.time() + 99).expire(now=time.time() + 100) == ["n"]},
    "info": {"document_id": lambda w: differ(w.bank.info("a"), w.bank.info("b"))},
    "segments": {"document_id": lambda w: differ(w.bank.segments("a"), w.bank.segments("b"))},
    "token_ids": {
        "document_id": lambda w: differ(w.bank.token_ids("a"), w.bank.token_ids("b")),
        "start": lambda w: added(w, **SOURCE).token_ids("n", start=6).tolist() == [6, 7],  # type: ignore[union-attr]
    },
    "text": {
        "document_id": lambda w: added(w, **SOURCE).text("n") != w.bank.text("a"),
        "start": lambda w: added(w, **SOURCE).text("n", start=2) == "cdefgh",
        "stop": lambda w: added(w, **SOURCE).text("n", stop=2) == "ab",
    },
    "find": {
        "text": lambda w: differ(*(passages(noted(w).find(text, k=1)) for text in ("cat", "dog"))),
        "model": lambda w: differ(*(passages(noted(w).find("a cat", model, k=9)) for model in (w.model, None))),
        "k": lambda w: len(noted(w).find("the", w.model, k=1)) == 1 < len(noted(w).find("the", w.model, k=2)),
    },
    "ready_for": {"model": lambda w: raises(lambda: w.fresh().ready_for(other_model(w)))},
    "select": {
        "document_ids": lambda w: w.bank.select("a").documents() == ["a"],
        "tags": lambda w: w.bank.select(tags=["second"]).documents() == ["b"],
    },
    "search": {
        "layer": lambda w: raises(lambda: found(w, layer=1)),
        "queries": lambda w: differ(found(w), found(w, queries=-torch.ones(2, 1, 8))),
        "num_chunks": lambda w: differ(found(w), found(w, num_chunks=2)),
        "scaling": lambda w: differ(found(w), found(w, scaling=0.5)),
        "newest": lambda w: differ(found(w, scaling=0.5), found(w, scaling=0.5, newest=2e9)),
        "selection": lambda w: differ(found(w), found(w, bank=(b := filled(w)), selection=b.select("a").selection)),
    },
    "log_weights": {
        "rows": lambda w: differ(*filled(w, age_prior="exp:a=1e-5").log_weights(torch.tensor([0, 5])).unbind()),
        "newest": lambda w: differ(
            *(filled(w, age_prior="exp:a=1e-5").log_weights(torch.tensor([0]), newest=n) for n in (None, 2e9))
        ),
        "selection": lambda w: (
            differ(
                *(
                    (b := filled(w, age_prior="exp:a=1e-5")).log_weights(torch.tensor([0]), selection=s)
                    for s in (None, b.select("a").selection)
                )
            )
            if (b := filled(w, age_prior="exp:a=1e-5"))
            else False
        ),
    },
    "search_keys": {"layer": lambda w: raises(lambda: w.bank.search_keys(1))},
    "stored": {
        "layer": lambda w: raises(lambda: w.bank.stored(1, w.bank.generation)),
        "generation": lambda w: w.bank.stored(2, w.bank.generation) is not None and w.bank.stored(2, -1) is None,
    },
    "gather": {
        "layer": lambda w: raises(lambda: gathered(w.bank, layer=1)),
        "rows": lambda w: differ(gathered(w.bank), gathered(w.bank, rows=torch.tensor([[3], [3]]))),
        "generation": lambda w: raises(lambda: gathered(w.bank, generation=-1)),
    },
    "nearest": {
        "layer": lambda w: raises(lambda: w.bank.nearest(1, torch.ones(2, 1, 8), 3)),
        "queries": lambda w: differ(*(w.bank.nearest(2, sign * torch.ones(2, 1, 8), 3).rows for sign in (1, -1))),
        "num_chunks": lambda w: w.bank.nearest(2, torch.ones(2, 1, 8), 3).rows.shape[2] == 3,
        "selection": lambda w: differ(
            *(w.bank.nearest(2, torch.ones(2, 1, 8), 9, selection=s).rows for s in (None, w.bank.select("b").selection))
        ),
    },
    "sample": {
        "num_chunks": lambda w: w.bank.sample(3).rows.shape[2] == 3,
        "selection": lambda w: differ(
            w.bank.sample(3).rows, w.bank.sample(3, selection=w.bank.select("b").selection).rows
        ),
    },
    "next_ids": {
        "rows": lambda w: differ(*(w.bank.next_ids(torch.tensor([row]), w.bank.generation) for row in (0, 20))),
        "generation": lambda w: raises(lambda: w.bank.next_ids(torch.tensor([0]), -1)),
    },
    "locate": {"rows": lambda w: differ(*w.bank.locate(torch.tensor([0, 20])))},
}


def gathered(bank: MemoryBank, layer: int = 2, rows: Any = None, generation: Any = None) -> Any:
    rows = torch.zeros(2, 1, dtype=torch.int64) if rows is None else rows
    return tuple(bank.gather(layer, rows, bank.generation if generation is None else generation))


def noted(w: World) -> MemoryBank:
    """Return a bank with two notes that are text."""
    bank = w.bank.empty_like()
    for name, text in (("cats", "The cat sat on the old mat all day."), ("dogs", "One dog ran along the old road.")):
        w.model.memorize(bank, text, name)
    return bank


def passages(found: Any) -> list[tuple[str, int]]:
    return [(each.document_id, each.start) for each in found]


def copied(w: World, origin_id: str = "a", origin: int = 0, part: Any = None, **said: Any) -> MemoryBank:
    bank = w.fresh()
    if part is None:
        part = SourcePart(w.bank.token_ids(origin_id)[origin : origin + 4])
    bank.copy_tokens("n", w.bank, origin_id, origin, part, **said)
    return bank


def told(call: Callable[..., Any]) -> bool:
    steps: list[tuple[int, int]] = []
    call(progress=lambda done, total: steps.append((done, total)))
    return bool(steps)


def batches(w: World, call: Callable[..., Any]) -> bool:
    """Return whether fewer, larger batches are encoded with a larger `batch_size`."""
    steps: list[list[int]] = [[], []]
    for size, seen in zip((1, 2), steps, strict=True):
        call(w.fresh(), batch_size=size, progress=lambda done, total, seen=seen: seen.append(done))
    return len(steps[1]) < len(steps[0])


def memorized(w: World, ids: Any = range(64), name: str = "n", **options: Any) -> MemoryBank:
    bank = options.pop("bank", None) or w.fresh()
    w.model.memorize(bank, list(ids) if isinstance(ids, range) else ids, name, **options)
    return bank


def logits(w: World, **options: Any) -> Any:
    return w.model(IDS, **options).logits


def streamed(w: World, **options: Any) -> MemoryStream:
    stream = w.model.stream(w.fresh(), **options)
    stream.read(list(range(50)))
    return stream


def drawn(w: World, **options: Any) -> list[int]:
    return list(streamed(w).generate(4, **options))


MASK = torch.tensor([[0] * 4 + [1] * 8])
MODEL: dict[str, dict[str, Effect]] = {
    "": {
        "config": lambda w: (
            LongMemForCausalLM(LongMemConfig(segment_length=8), build_backbone("llama")).config.segment_length == 8
        ),
        "backbone": lambda w: other_model(w).backbone is not w.model.backbone,
        "tokenizer": lambda w: (
            LongMemForCausalLM(w.model.config, w.model.backbone, tokenizer=w.model.tokenizer).tokenizer
            is w.model.tokenizer
        ),
    },
    "forward": {
        "input_ids": lambda w: differ(logits(w), w.model(IDS + 1).logits),
        "attention_mask": lambda w: differ(logits(w), logits(w, attention_mask=MASK)),
        "position_ids": lambda w: differ(logits(w), logits(w, position_ids=2 * IDS)),
        "cache": lambda w: differ(logits(w), logits(w, cache=past(w))),
        "past_key_values": lambda w: differ(logits(w), logits(w, past_key_values=past(w))),
        "labels": lambda w: w.model(IDS, labels=IDS).loss is not None,
        "use_cache": lambda w: past(w) is not None,
        "memory": lambda w: differ(logits(w), logits(w, memory=w.bank)),
        "logits_to_keep": lambda w: logits(w, logits_to_keep=2).shape[1] == 2,
        "output_memory_reads": lambda w: bool(w.model(IDS, memory=w.bank, output_memory_reads=True).memory_reads),
        "output_memory_keys": lambda w: bool(w.model(IDS, output_memory_keys=True).memory_keys),
        "num_items_in_batch": lambda w: differ(
            *(w.model(IDS, labels=IDS, num_items_in_batch=n).loss for n in (None, 99))
        ),
    },
    "prepare_inputs_for_generation": {
        "input_ids": lambda w: differ(
            *(w.model.prepare_inputs_for_generation(each, cache=None)["input_ids"] for each in (IDS, IDS + 1))
        )
    },
    "find": {
        "memory": lambda w: differ(passages(w.model.find(noted(w), "cat")), passages(w.model.find(w.bank, "cat"))),
        "text": lambda w: differ(*(shares(w.model.find(noted(w), text)) for text in ("cat", "road"))),
        "k": lambda w: len(w.model.find(noted(w), "the", k=1)) == 1 < len(w.model.find(noted(w), "the", k=2)),
    },
    "generate": {
        "given": lambda w: w.model.generate(IDS, max_new_tokens=1).shape[1] == 13,
        "options": lambda w: len(generated(w).memory_reads) == 2 and bool(generated(w).memory_reads[0]),
    },
    "run_backbone": {
        "input_ids": lambda w: differ(*(w.model.run_backbone(ids).keys[2] for ids in (IDS, IDS + 1))),
        "extra_hidden_layers": lambda w: 1 in w.model.run_backbone(IDS, extra_hidden_layers=[1]).hidden_states,
        "with_keys": lambda w: not w.model.run_backbone(IDS, with_keys=False).keys,
        "inputs": lambda w: differ(*(w.model.run_backbone(IDS, position_ids=n * IDS).hidden_states[2] for n in (1, 2))),
    },
    "encode": {
        "input_ids": lambda w: differ(w.model.encode(IDS), w.model.encode(IDS + 1)),
        "inputs": lambda w: differ(w.model.encode(IDS), w.model.encode(IDS, attention_mask=MASK)),
    },
    "memorize": {
        "bank": lambda w: "n" in memorized(w),
        "text_or_ids": lambda w: memorized(w, "text").text("n") == "text",
        "document_id": lambda w: "m" in memorized(w, name="m"),
        "append": lambda w: memorized(w, name="a", append=True).info("a").num_tokens == 128,
        "tags": lambda w: memorized(w, tags=["x"]).info("n").tags == ("x",),
        "dated": lambda w: memorized(w, dated=5.0).info("n").dated == 5.0,
        "valid_until": lambda w: memorized(w, valid_until=5.0).expire() == ["n"],
        "reuse": lambda w: w.model.memorize(w.fresh(), list(range(64)), "n", reuse=(w.bank, "a")).num_encoded == 0,
        "batch_size": lambda w: batches(w, lambda b, **k: memorized(w, range(128), bank=b, **k)),
        "progress": lambda w: told(lambda **k: memorized(w, **k)),
    },
    "stream": {
        "memory": lambda w: "stream" in streamed(w).memory,
        "document_id": lambda w: "mine" in streamed(w, document_id="mine").memory,
        "window": lambda w: len(streamed(w, window=16).local_ids) < len(streamed(w).local_ids),
        "keep": lambda w: differ(streamed(w, keep=4).local_ids, streamed(w).local_ids),
        "seed": lambda w: differ(
            *(list(streamed(w, seed=n).generate(8, do_sample=True, temperature=5.0)) for n in (0, 1))
        ),
    },
    "from_backbone": {
        "backbone": lambda w: built().config.num_backbone_layers == 4,
        "tokenizer": lambda w: (
            LongMemForCausalLM.from_backbone(build_backbone("llama"), tokenizer=w.model.tokenizer).tokenizer
            is w.model.tokenizer
        ),
        "backbone_options": lambda w: named(w, backbone_options={"dtype": "bfloat16"}).backbone.dtype == torch.bfloat16,
        "options": lambda w: built(chunk_size=2).config.chunk_size == 2,
    },
    "from_pretrained": {
        "pretrained_model_name_or_path": lambda w: opened_model(w).config.segment_length == 32,
        "backbone": lambda w: opened_model(w, backbone=w.model.backbone).backbone is w.model.backbone,
        "revision": lambda w: sought(w, revision="v2")["revision"] == "v2",
        "subfolder": lambda w: sought(w, subfolder="x")["subfolder"] == "x",
        "config": lambda w: opened_model(w, config=changed(w, memory_distance=3)).config.memory_distance == 3,
        "generation_config": lambda w: (
            opened_model(w, generation_config=GenerationConfig(top_k=7)).generation_config.top_k == 7
        ),
        "output_loading_info": lambda w: isinstance(opened_model(w, output_loading_info=True), tuple),
        "strict_backbone": lambda w: (
            raises(lambda: opened_model(w, backbone=other_model(w).backbone))
            and not raises(lambda: opened_model(w, backbone=other_model(w).backbone, strict_backbone=False))
        ),
        "tokenizer": lambda w: opened_model(w, tokenizer=w.model.tokenizer).tokenizer is w.model.tokenizer,
        "variant": lambda w: raises(lambda: opened_model(w, variant="fp16")),
        "backbone_options": lambda w: (
            opened_model(w, backbone_options={"dtype": "bfloat16"}).backbone.dtype == torch.bfloat16
        ),
        "options": lambda w: opened_model(w, dtype="bfloat16").backbone.dtype == torch.bfloat16,
    },
    "save_pretrained": {
        "save_directory": lambda w: w.model.save_pretrained("out") is None and Path("out/config.json").is_file(),
        "dtype": lambda w: saved_bytes(w, dtype="bfloat16") < saved_bytes(w),
        "save_backbone": lambda w: saved_bytes(w, save_backbone=True) > saved_bytes(w),
        "options": lambda w: saved_bytes(w, max_shard_size="8KB") != saved_bytes(w),
        "is_main_process": lambda w: saved_bytes(w, is_main_process=False) == 0,
        "state_dict": lambda w: raises(lambda: saved_bytes(w, state_dict={})),
        "push_to_hub": lambda w: bool(pushed(w, lambda: w.model.save_pretrained("out", push_to_hub=True))),
        "repo_id": lambda w: (
            pushed(w, lambda: w.model.save_pretrained("out", push_to_hub=True, repo_id="me/x"))["repo_id"] == "me/x"
        ),
    },
    "push_to_hub": {
        "repo_id": lambda w: push(w)["repo_id"] == "me/y",
        "private": lambda w: push(w, private=True)["private"],
        "create_pr": lambda w: push(w, create_pr=True)["create_pr"],
        "token": lambda w: push(w, token="hf_x")["token"] == "hf_x",
        "dtype": lambda w: differ(push(w)["bytes"], push(w, dtype="bfloat16")["bytes"]),
        "save_backbone": lambda w: differ(push(w)["bytes"], push(w, save_backbone=True)["bytes"]),
        **{
            name: lambda w, name=name: push(w, **{name: "said"})[name] == "said"  # type: ignore[misc]
            for name in ("commit_message", "commit_description", "revision")
        },
        "options": lambda w: differ(push(w)["bytes"], push(w, max_shard_size="8KB")["bytes"]),
    },
    "resize_token_embeddings": {
        "new_num_tokens": lambda w: raises(lambda: w.model.resize_token_embeddings(300)),
        "pad_to_multiple_of": lambda w: raises(lambda: w.model.resize_token_embeddings(None, 100)),
        "args": lambda w: raises(lambda: w.model.resize_token_embeddings(300, None, False)),
    },
    "set_input_embeddings": {"value": lambda w: raises(lambda: w.model.set_input_embeddings(torch.nn.Embedding(3, 4)))},
    "set_output_embeddings": {
        "new_embeddings": lambda w: raises(lambda: w.model.set_output_embeddings(torch.nn.Linear(3, 4)))
    },
    "set_attn_implementation": {
        **dict.fromkeys(
            ("attn_implementation", "args"), lambda w: raises(lambda: w.model.set_attn_implementation("eager"))
        )
    },
    "get_memory_footprint": {
        "return_buffers": lambda w: w.model.get_memory_footprint() > w.model.get_memory_footprint(return_buffers=False)
    },
    "init_continuous_batching": {"args": lambda w: raises(lambda: w.model.init_continuous_batching())},
    "load_side_state_dict": {"state": lambda w: raises(lambda: built().load_side_state_dict({}))},
    "encoder_stamp": {
        "exact": lambda w: found_by_hashing_alone(exact=True) and not found_by_hashing_alone(exact=False)
    },
    "train": {"mode": lambda w: built().train(True).side_network.training and not built().train(False).training},
    "requires_grad_": {
        "requires_grad": lambda w: (
            not any(each.requires_grad for each in built().requires_grad_(False).side_network.parameters())
        )
    },
}


def found_by_hashing_alone(exact: bool) -> bool:
    """Return whether a write past all signs of the tripwire is seen in the stamp."""
    model = built()
    before = model.encoder_stamp().digest
    model.backbone.model.layers[0].mlp.up_proj.weight.data.view(-1)[1] += 1
    return model.encoder_stamp(exact=exact).digest != before


def explained(w: World, **options: Any) -> Any:
    """Return what a trace says: the text, and the shares of memory."""
    given = {"model": w.model, "prompt": "the cat", "memory": noted(w), "max_new_tokens": 2, **options}
    trace = longmem.explain(**{name: value for name, value in given.items() if value is not None})
    return trace.words, trace.memory_shares.tolist()


def ending(w: World) -> MemoryStream:
    """Return a stream that goes on with a token that its tokenizer skips."""
    stream = streamed(w)
    (first,) = stream.generate(1)
    tokenizer = copy.deepcopy(w.model.tokenizer)
    tokenizer.add_special_tokens({"eos_token": tokenizer.convert_ids_to_tokens(first)})
    model = LongMemForCausalLM(w.model.config, w.model.backbone, tokenizer).eval()
    stream = model.stream(MemoryBank.for_model(model))
    stream.read(list(range(50)))
    return stream


def shares(found: Any) -> list[tuple[str, int, float]]:
    return [(each.document_id, each.start, each.score) for each in found]


def changed(w: World, **fields: Any) -> LongMemConfig:
    return LongMemConfig.from_pretrained(w.folder / "model", **fields)


def sought(w: World, **options: Any) -> dict[str, Any]:
    """Return what is asked of the Hub for a model that it does not have."""
    with mock.patch.object(names, "hf_hub_download", side_effect=OSError("none")) as asked:
        assert raises(lambda: LongMemForCausalLM.from_pretrained("somebody/saved", **options))
    return dict(asked.call_args.kwargs)


def pushed(w: World, push: Callable[[], Any]) -> dict[str, Any]:
    """Return what the Hub is told in an upload, and how many bytes each of its files has."""
    told: dict[str, Any] = {}

    def upload(folder_path: Path, **options: Any) -> None:
        sizes = {path.name: path.stat().st_size for path in folder_path.rglob("*.safetensors")}
        told.update(options, bytes=sorted(sizes.items()))

    with mock.patch.object(pretrained, "HfApi") as api:
        api.return_value.create_repo.side_effect = lambda repo_id, **options: (
            told.update(options) or mock.Mock(repo_id=repo_id)
        )
        api.return_value.upload_folder.side_effect = upload
        push()
        told.update(api.call_args.kwargs)
    return told


def push(w: World, **options: Any) -> dict[str, Any]:
    return pushed(w, lambda: w.model.push_to_hub("me/y", **options))


def made(w: World, config: LongMemConfig | None = None, **options: Any) -> LongMemForCausalLM:
    return LongMemForCausalLM(w.model.config if config is None else config, w.model.backbone, **options)


def generated(w: World) -> Any:
    asked = {"memory": w.bank, "output_memory_reads": True, "return_dict_in_generate": True}
    return w.model.generate(IDS, max_new_tokens=2, **asked)


def past(w: World) -> DynamicCache:
    return w.model(IDS + 5, use_cache=True).past_key_values or w.model(IDS + 5, use_cache=True).cache


def named(w: World, **options: Any) -> LongMemForCausalLM:
    return LongMemForCausalLM.from_backbone(str(w.folder / "backbone"), segment_length=32, **options)


def opened_model(w: World, **options: Any) -> LongMemForCausalLM:
    return LongMemForCausalLM.from_pretrained(w.folder / "model", **options)


def saved_bytes(w: World, **options: Any) -> int:
    folder = Path(f"saved-{time.monotonic_ns()}")
    w.model.save_pretrained(folder, **options)
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


STREAM: dict[str, dict[str, Effect]] = {
    "": {
        "model": lambda w: streamed(w).model is w.model,
        "memory": lambda w: streamed(w).memory is not streamed(w).memory,
        "state": lambda w: streamed(w).num_tokens == 50 != w.model.stream(w.fresh()).num_tokens,
    },
    "read": {"text_or_ids": lambda w: w.model.stream(w.fresh()).read("abc") == 3},
    "score": {"text_or_ids": lambda w: len(w.model.stream(w.fresh()).score("abc")) == 3},
    "generate": {
        "max_new_tokens": lambda w: len(list(streamed(w).generate(3))) == 3,
        "options": lambda w: differ(drawn(w), drawn(w, do_sample=True, temperature=9.0)),
    },
    "generate_text": {
        "max_new_tokens": lambda w: differ(*("".join(streamed(w).generate_text(n)) for n in (4, 9))),
        "skip_special_tokens": lambda w: differ(
            *("".join(ending(w).generate_text(3, skip_special_tokens=s)) for s in (False, True))
        ),
        "options": lambda w: differ(
            "".join(streamed(w).generate_text(8)),
            "".join(streamed(w).generate_text(8, do_sample=True, temperature=9.0)),
        ),
    },
    "save": {"folder": lambda w: streamed(w).save("stream") is None and Path("stream/stream.json").is_file()},
    "load": {
        "folder": lambda w: MemoryStream.load(w.folder / "stream", w.model).num_tokens == 0,
        "model": lambda w: raises(lambda: MemoryStream.load(w.folder / "stream", other_model(w))),
        "device": lambda w: MemoryStream.load(w.folder / "stream", w.model, device="meta").memory.device.type == "meta",
    },
}
EFFECTS: dict[str, dict[str, Effect]] = {
    "LongMemConfig": CONFIG,
    "LongMemConfig.missing_start": {"ids": lambda w: LongMemConfig(start_token_ids=[5]).missing_start([5, 6]) == []},
    "LongMemConfig.from_dict": {"config_dict": lambda w: LongMemConfig.from_dict({"chunk_size": 8}).chunk_size == 8},
    "explain": {
        "model": lambda w: raises(lambda: explained(w, model=other_model(w), prompt=[1, 2])),
        "prompt": lambda w: differ(explained(w), explained(w, prompt="a dog")),
        "memory": lambda w: differ(explained(w), explained(w, memory=w.bank)),
        "answer": lambda w: differ(explained(w), explained(w, answer=" mat", max_new_tokens=None)),
        "max_new_tokens": lambda w: differ(explained(w), explained(w, max_new_tokens=4)),
        "options": lambda w: raises(lambda: explained(w, no_such_option=1)),
    },
    "MemoryBank": BANK,
    **{f"MemoryBank.{name}": rows for name, rows in BANK_CALLS.items()},
    **{f"LongMemForCausalLM.{name}".rstrip("."): rows for name, rows in MODEL.items()},
    **{f"MemoryStream.{name}".rstrip("."): rows for name, rows in STREAM.items()},
}
# Shown elsewhere: look-ups in a configuration, and a training of minutes (`tests/training/test_heads.py`).
ELSEWHERE = {"LongMemConfig.source_layer", "LongMemConfig.memory_layer_of", "LongMemConfig.heads_of"} | {
    "LongMemConfig.get_text_config",
    "LongMemForCausalLM.create_masks_for_generate",  # a hook: test_a_cache_of_fixed_size_gives_the_same_numbers
    "calibrate_heads",
}
SLOW = {"LongMemConfig"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def test_every_argument_has_a_row() -> None:
    missing, left_over = [], []
    for name, function in public_callables().items():
        arguments = set(inspect.signature(function).parameters) - {"self", "cls", "kwargs"}
        if name == "LongMemConfig":
            arguments -= OF_TRANSFORMERS
        if (
            name not in ELSEWHERE
            and not name.startswith("LongMemModel")
            and not name.endswith("register_for_auto_class")
        ):
            missing += [f"{name}({each})" for each in sorted(arguments - set(EFFECTS.get(name, ())))]
            left_over += [f"{name}({each})" for each in sorted(set(EFFECTS.get(name, ())) - arguments)]
    assert missing == []
    assert left_over == []


@pytest.mark.parametrize("name", [pytest.param(each, marks=[pytest.mark.slow] * (each in SLOW)) for each in EFFECTS])
def test_every_argument_has_an_effect(name: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [argument for argument, has_effect in EFFECTS[name].items() if not has_effect(world)] == []
