"""LongMem in the hands of other people's tools: Auto classes, pipelines, trainers, peft, TRL, compilers, the Hub, lm-eval."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.metadata
import importlib.util
import inspect
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import huggingface_hub
import pytest
import torch
import transformers
from kept_fast import fast
from model.conftest import BACKBONES, SMALL, build_backbone
from safetensors.torch import load_file
from tiny_models import save_tiny_backbone, some_text
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from longmem import LongMemConfig, LongMemForCausalLM, LongMemModel, MemoryBank
from longmem.backbone.interception import dispatch_attention
from longmem.backbone.loading import BACKBONE_OPTIONS, HUB_OPTIONS, LOAD_OPTIONS
from longmem.model import names, pretrained, saving
from longmem.model.memory_attention import banks_per_lane
from longmem.model.side_network import holds_nothing

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
SIZES: dict[str, Any] = {"segment_length": 16, "num_retrieved_tokens": 8}
IDS = torch.arange(48).view(3, 16)
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a backbone that has a chat template, and a changed model saved on it."""
    folder = tmp_path_factory.mktemp("ecosystem")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(save_tiny_backbone(folder / "backbone"))
    tokenizer.chat_template = CHAT
    tokenizer.pad_token, tokenizer.eos_token = tokenizer.convert_ids_to_tokens([0, 1])
    tokenizer.save_pretrained(folder / "backbone")
    model = LongMemForCausalLM.from_backbone(str(folder / "backbone"), **SIZES)
    with torch.no_grad():
        for weight in model.side_network.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    model.save_pretrained(folder / "saved")
    (folder / "book.txt").write_text(some_text(120))
    return folder


@pytest.fixture
def model(place: Path) -> LongMemForCausalLM:
    return LongMemForCausalLM.from_pretrained(place / "saved")


@pytest.fixture
def bank(model: LongMemForCausalLM) -> MemoryBank:
    bank = MemoryBank.for_model(model)
    model.memorize(bank, torch.arange(60, 160), "a")
    return bank


# A pretrained model of transformers ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_model_without_its_head(place: Path, model: LongMemForCausalLM, bank: MemoryBank) -> None:
    expected = model(IDS, memory=bank)
    base = AutoModel.from_pretrained(place / "saved")
    assert type(base) is LongMemModel
    for each in (base, model.base_model):
        output = each(IDS, memory=bank, output_memory_reads=True)
        assert torch.equal(model.get_output_embeddings()(output.last_hidden_state), expected.logits)
        assert len(output.memory_reads) == 1
        assert not torch.equal(each(IDS).last_hidden_state, output.last_hidden_state)
    assert type(model.base_model) is LongMemModel
    assert type(model) is LongMemForCausalLM


def test_the_backbone_is_moved_along_and_is_no_submodule(model: LongMemForCausalLM) -> None:
    assert {name.partition(".")[0] for name in model.state_dict()} == {"side_network"}
    assert not {id(each) for each in model.backbone.parameters()} & {id(each) for each in model.parameters()}
    model.to(torch.bfloat16)
    assert {each.dtype for each in [*model.backbone.parameters(), *model.parameters()]} == {torch.bfloat16}
    assert (model.dtype, model.device) == (torch.bfloat16, torch.device("cpu"))
    assert not model.train().backbone.training


def test_the_name_is_that_of_what_was_opened(place: Path, model: LongMemForCausalLM) -> None:
    assert model.name_or_path == model.config.name_or_path == str(place / "saved")
    new = LongMemForCausalLM.from_backbone(place / "backbone", **SIZES)
    assert AutoTokenizer.from_pretrained(new.name_or_path).chat_template == CHAT


def test_embeddings_keep_their_size(model: LongMemForCausalLM) -> None:
    assert model.resize_token_embeddings(256) is model.resize_token_embeddings() is model.get_input_embeddings()
    with pytest.raises(ValueError, match=r"`new_num_tokens` must stay the backbone's 256.*got 300; resize"):
        model.resize_token_embeddings(300)


# Each option of `from_pretrained`, a value, and what it does: a function of the model, and what that returns.
OPENED: dict[str, tuple[Any, Any, Any]] = {
    "dtype": ("bfloat16", lambda model: (model.backbone.dtype, model.side_network.dtype), (torch.bfloat16,) * 2),
    "torch_dtype": (torch.bfloat16, lambda model: model.backbone.dtype, torch.bfloat16),
    "attn_implementation": ("eager", lambda model: model.backbone.config._attn_implementation, "eager"),
    "device_map": ({"": "cpu"}, lambda model: getattr(model, "hf_device_map", "none"), {"backbone.": "cpu"}),
    "backbone_options": ({"dtype": "bfloat16"}, lambda model: model.backbone.dtype, torch.bfloat16),
    "memory_distance": (5, lambda model: model.config.memory_distance, 5),
}


@pytest.mark.parametrize("option", OPENED)
@pytest.mark.parametrize("opener", ["auto", "saved", "new"])
def test_every_option_goes_where_it_belongs(place: Path, option: str, opener: str, monkeypatch: Any) -> None:
    value, look, expected = OPENED[option]
    name = place / ("backbone" if opener == "new" else "saved")
    if opener == "auto":
        kind: Any = AutoModelForCausalLM.from_pretrained
    else:
        kind = LongMemForCausalLM.from_backbone if opener == "new" else LongMemForCausalLM.from_pretrained
    sizes = SIZES if opener == "new" else {}
    if option == "device_map":  # a device map of one device leaves no trace; it is enough that the backbone gets it
        given: dict[str, Any] = {}
        load = pretrained.load_backbone

        def watched(name: str, revision: Any, **options: Any) -> Any:
            given.update(options)
            backbone = load(name, revision, **options)
            backbone.hf_device_map = options.get("device_map")
            return backbone

        monkeypatch.setattr(pretrained, "load_backbone", watched)
        assert look(kind(name, device_map=value, **sizes)) == expected
        assert given["device_map"] == value
        return
    assert look(kind(name, **sizes)) != expected
    assert look(kind(name, **{option: value}, **sizes)) == expected


def test_options_of_loading_reach_the_backbone_and_of_the_hub_all_files(place: Path, monkeypatch: Any) -> None:
    """Values that can't be tried here are followed to where transformers and the Hub take them."""
    backbone = AutoModelForCausalLM.from_pretrained(place / "backbone")
    seen: dict[str, dict[str, Any]] = {}

    def note(key: str, result: Any) -> Any:
        return lambda *args, **kwargs: (seen.update({key: {**kwargs, "args": args}}), result)[1]

    def fetched(name: str, file: str, **options: Any) -> str:
        seen["config"] = options
        return str(place / "saved" / file)

    monkeypatch.setattr(names, "hf_hub_download", fetched)
    monkeypatch.setattr(names, "snapshot_download", note("files", str(place)))
    monkeypatch.setattr(pretrained, "load_backbone", note("backbone", backbone))
    monkeypatch.setattr(pretrained, "load_tokenizer", note("tokenizer", "a tokenizer"))
    hub = {"cache_dir": "/cache", "force_download": True, "local_files_only": True, "token": "hf_x"}
    loading = {name: f"value of {name}" for name in LOAD_OPTIONS}
    assert set(hub) == set(HUB_OPTIONS)
    model = LongMemForCausalLM.from_pretrained(
        "somebody/saved", revision="v2", subfolder="saved", trust_remote_code=True, weights_only=True, **hub, **loading
    )
    assert seen["config"] == {"revision": "v2", "subfolder": "saved", **hub}
    patterns = [f"saved/{each}" for each in names.PATTERNS]
    assert seen["files"] == {"revision": "v2", "allow_patterns": patterns, "args": ("somebody/saved",), **hub}
    assert seen["backbone"] == {"args": (str(place / "backbone"), None), **loading, **hub}
    assert model.tokenizer == "a tokenizer"
    assert seen["tokenizer"] == {"args": (str(place / "saved"), None), "trust_remote_code": False, **hub}
    loading = {name: f"value of {name}" for name in BACKBONE_OPTIONS}
    new = LongMemForCausalLM.from_backbone(place / "backbone", revision="v3", **hub, **loading, **SIZES)
    assert seen["backbone"] == {"args": (str(place / "backbone"), "v3"), **loading, **hub}
    assert (new.config.backbone_revision, new.tokenizer) == ("v3", "a tokenizer")
    assert seen["tokenizer"]["trust_remote_code"] == "value of trust_remote_code"


def test_all_that_transformers_takes_is_taken_or_refused_by_name() -> None:
    """Every option that transformers' own `from_pretrained` reads is known: an unknown one would be called a misspelling."""
    source = inspect.getsource(pretrained.PreTrainedModel.from_pretrained)
    read = {line.split('kwargs.pop("')[1].split('"')[0] for line in source.splitlines() if 'kwargs.pop("' in line}
    read |= set(inspect.signature(pretrained.PreTrainedModel.from_pretrained).parameters) - {"model_args", "kwargs"}
    refused = {"state_dict", "key_mapping", "gguf_file", "adapter_name", "tqdm_class", "ignore_mismatched_sizes"}
    ours = set(inspect.signature(LongMemForCausalLM.from_pretrained).parameters) | {"generation_config"}
    known = ours | BACKBONE_OPTIONS | set(HUB_OPTIONS) | set(pretrained.LOAD_HABITS) | refused
    assert read - known == set()


def test_a_side_network_in_a_subfolder_and_in_a_variant(place: Path, model: LongMemForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "deep" / "inside", variant="small", max_shard_size="8KB")
    assert len(list((tmp_path / "deep" / "inside").glob("model.small-*-of-*.safetensors"))) > 1
    again, info = LongMemForCausalLM.from_pretrained(
        tmp_path / "deep", subfolder="inside", variant="small", output_loading_info=True
    )
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert not any(info.values())
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        LongMemForCausalLM.from_pretrained(tmp_path / "deep", subfolder="inside")
    new = LongMemForCausalLM.from_backbone(place, subfolder="backbone", **SIZES)
    assert new.config.backbone_name_or_path == str(place / "backbone")


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("saved", {"devicemap": "auto"}, "`devicemap` is not an option here. Did you mean `device_map`"),
    ("saved", {"ignore_mismatched_sizes": True}, "`ignore_mismatched_sizes` must be False"),
    ("saved", {"use_safetensors": False}, "`use_safetensors` must be True"),
    ("saved", {"state_dict": {}}, "`state_dict` is not an option here"),
    ("saved", {"lora": {"rank": 2}}, "do not fit the network"),
    ("saved", {"load_in_8bit": True}, r"Use `quantization_config=BitsAndBytesConfig"),
    ("saved", {"use_auth_token": "hf_x"}, "Use `token`"),
    ("backbone", {"chunksize": 4}, "`chunksize` is not a field of LongMemConfig. Did you mean `chunk_size`"),
    ("backbone", {"subfolder": "nowhere"}, "`subfolder` must be in a local folder"),
    ("backbone", {"revision": "a", "backbone_revision": "b"}, "one option under two names"),
]


@pytest.mark.parametrize(("name", "options", "words"), REFUSED)
def test_what_would_be_ignored_is_refused(place: Path, name: str, options: dict[str, Any], words: str) -> None:
    opener = LongMemForCausalLM.from_pretrained if name == "saved" else LongMemForCausalLM.from_backbone
    with pytest.raises(ValueError, match=words):
        opener(place / name, **options)


@pytest.mark.parametrize("option", ["dtype", "attn_implementation", "device_map", "revision"])
def test_a_loaded_backbone_is_not_loaded_again(place: Path, model: LongMemForCausalLM, option: str) -> None:
    with pytest.raises(ValueError, match=rf"`{option}` says how a backbone is loaded"):
        LongMemForCausalLM.from_backbone(model.backbone, **{option: "auto"}, **SIZES)
    if option != "revision":  # that of the side network
        with pytest.raises(ValueError, match=rf"`{option}` says how a backbone is loaded"):
            LongMemForCausalLM.from_pretrained(place / "saved", backbone=model.backbone, **{option: "auto"})


# Each is what somebody who knows transformers tries: what is done with a model, and what must hold of it.
def refused(call: Any, words: str) -> bool:
    with pytest.raises(ValueError, match=words):
        call()
    return True


def opened(model: LongMemForCausalLM, **options: Any) -> LongMemForCausalLM:
    return AutoModelForCausalLM.from_pretrained(model.name_or_path, **options)


def same(one: Any, other: Any, bank: MemoryBank) -> bool:
    """Return whether two models give the same, to the bit."""
    return torch.equal(one(IDS, memory=bank).logits, other(IDS, memory=bank).logits)


def drafted(model: LongMemForCausalLM, bank: MemoryBank, **options: Any) -> list[int]:
    return model.generate(IDS[:1], memory=bank, max_new_tokens=5, do_sample=False, **options)[0].tolist()


def padded(model: LongMemForCausalLM, bank: MemoryBank, **options: Any) -> bool:
    """Return whether a row with padding on its left goes on as it does alone."""
    ids, mask = IDS[:2].clone(), torch.ones_like(IDS[:2])
    ids[1, :6], mask[1, :6] = 0, 0
    both = model.generate(ids, attention_mask=mask, memory=bank, max_new_tokens=5, do_sample=False, **options)
    alone = model.generate(ids[1:, 6:], memory=bank, max_new_tokens=5, do_sample=False, **options)
    return torch.equal(both[1, -5:], alone[0, -5:])


def streamed(model: LongMemForCausalLM, bank: MemoryBank) -> bool:
    streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True)
    ids = model.generate(IDS[:1], memory=bank, max_new_tokens=5, do_sample=False, streamer=streamer)
    return "".join(streamer) == model.tokenizer.decode(ids[0, 16:])


def half(model: LongMemForCausalLM, dtype: torch.dtype) -> bool:
    small = opened(model, dtype=dtype)
    bank = MemoryBank.for_model(small)
    small.memorize(bank, torch.arange(60, 160), "a")
    floats = {each.dtype for each in small.parameters()} - {torch.float32}  # biases of memory stay as they are
    return (small.dtype, floats) == (dtype, {dtype}) and len(drafted(small, bank)) == 21


def pipelined(model: LongMemForCausalLM, bank: MemoryBank) -> bool:
    speak = pipeline("text-generation", model=model.name_or_path, dtype="float32", device_map="auto")
    asked = ["the cat", "a dog sat on"]
    options = {"max_new_tokens": 3, "do_sample": False, "return_full_text": False, "memory": bank}
    together = speak(asked, batch_size=2, **options)
    return together == [speak(each, **options) for each in asked]


def downloaded(model: LongMemForCausalLM, cache: Path, **options: Any) -> LongMemForCausalLM:
    """Return the model, opened by name from a cache of the Hub that holds it and its backbone, without a connection."""
    backbone, model.config.backbone_name_or_path = model.config.backbone_name_or_path, "me/backbone"
    model.save_pretrained(cache / "saved")
    for name, folder in (("backbone", Path(str(backbone))), ("saved", cache / "saved")):
        repository = cache / f"models--me--{name}"
        shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("a" * 40)
    return AutoModelForCausalLM.from_pretrained("me/saved", cache_dir=str(cache), local_files_only=True, **options)


def on_itself(model: LongMemForCausalLM, folder: Path) -> Path:
    """Return a saved model whose configuration somebody let name it as its own backbone."""
    model.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"backbone_name_or_path": str(folder)}))
    return folder


TRIED: dict[str, Callable[[LongMemForCausalLM, MemoryBank, Path], bool]] = {
    "config: sizes": lambda m, b, p: (
        [getattr(AutoConfig.from_pretrained(m.name_or_path), name) for name in SIZES_OF_ANY] == [256, 32, 4, 4, 2048]
    ),
    "config: tokens": lambda m, b, p: m.config.eos_token_id is None and not m.config.tie_word_embeddings,
    "config: heads": lambda m, b, p: (
        [m.config.num_key_value_heads, m.config.head_dim, m.config.intermediate_size, m.config.use_cache]
        == [2, 8, 48, True]
    ),
    "config: what nobody has": lambda m, b, p: not hasattr(m.config, "n_nothing"),
    "config: a size": lambda m, b, p: refused(
        lambda: AutoConfig.from_pretrained(m.name_or_path, vocab_size=5),
        "`vocab_size` must be the backbone's own, got 5",
    ),
    "config: of a backbone": lambda m, b, p: (
        (each := LongMemConfig.from_pretrained(m.config.backbone_name_or_path, chunk_size=2)).vocab_size == 256
        and each.chunk_size == 2
    ),
    "config: an option": lambda m, b, p: AutoConfig.from_pretrained(m.name_or_path, chunk_size=2).chunk_size == 2,
    "from_config": lambda m, b, p: (
        not torch.equal(*(AutoModelForCausalLM.from_config(m.config).backbone.lm_head.weight for _ in range(2)))
    ),
    "from_config: base": lambda m, b, p: type(AutoModel.from_config(m.config)) is LongMemModel,
    "from_config: dtype": lambda m, b, p: (
        AutoModelForCausalLM.from_config(m.config, dtype=torch.bfloat16).dtype == torch.bfloat16
    ),
    "from_config: without a backbone": lambda m, b, p: refused(
        lambda: AutoModelForCausalLM.from_config(LongMemConfig()), "`config` must have a `backbone_config`"
    ),
    "from_pretrained: config": lambda m, b, p: (
        opened(m, config=LongMemConfig.from_pretrained(m.name_or_path, memory_distance=3)).config.memory_distance == 3
    ),
    "from_pretrained: use_cache": lambda m, b, p: not opened(m, use_cache=False).generation_config.use_cache,
    "from_pretrained: pad_token_id": lambda m, b, p: (
        (each := opened(m, pad_token_id=7)).config.pad_token_id == each.generation_config.pad_token_id == 7
    ),
    "from_pretrained: our own with pad_token_id": lambda m, b, p: (
        LongMemForCausalLM.from_pretrained(m.name_or_path, pad_token_id=7).generation_config.pad_token_id == 7
    ),
    "from_pretrained: generation_config": lambda m, b, p: (
        opened(m, generation_config=GenerationConfig(max_new_tokens=3)).generate(IDS[:1]).shape[1] == 19
    ),
    "from_pretrained: hidden states": lambda m, b, p: refused(
        lambda: opened(m, output_hidden_states=True)(IDS), "`output_hidden_states=True` is not available"
    ),
    "from_pretrained: its own backbone": lambda m, b, p: refused(
        lambda: AutoModelForCausalLM.from_pretrained(on_itself(m, p)), "must be a causal LM, got the LongMem model in"
    ),
    "from_backbone: ours": lambda m, b, p: refused(
        lambda: LongMemForCausalLM.from_backbone(m), "must be a causal LM alone, got a LongMemForCausalLM"
    ),
    "from_pretrained: misspelt": lambda m, b, p: refused(lambda: opened(m, usecache=True), "Did you mean `use_cache`"),
    "from_pretrained: low_cpu_mem_usage": lambda m, b, p: same(opened(m, low_cpu_mem_usage=True), m, b),
    "bfloat16": lambda m, b, p: half(m, torch.bfloat16),
    "float16": lambda m, b, p: half(m, torch.float16),
    "to": lambda m, b, p: opened(m).to(torch.float64).to("cpu", torch.float32)(IDS).logits.dtype == torch.float32,
    "to: meta": lambda m, b, p: opened(m).to("meta").device.type == "meta",
    "attention: shown": lambda m, b, p: (
        [opened(m, attn_implementation=kind).config._attn_implementation for kind in ("eager", "sdpa")]
        == ["eager", "sdpa"]
    ),
    "attention: another": lambda m, b, p: refused(
        lambda: m.set_attn_implementation("eager"), "`attn_implementation` must stay 'sdpa'.*got 'eager'"
    ),
    "attention: the same": lambda m, b, p: m.set_attn_implementation("sdpa") is None,
    "attention: unknown": lambda m, b, p: refused(lambda: m.set_attn_implementation("fast"), "attn_implementation"),
    "embeddings: another size": lambda m, b, p: refused(
        lambda: m.resize_token_embeddings(pad_to_multiple_of=100),
        "up to `pad_to_multiple_of` must stay the backbone's 256.*got 300",
    ),
    "embeddings: a multiple": lambda m, b, p: m.resize_token_embeddings(250, 64) is m.get_input_embeddings(),
    "embeddings: others": lambda m, b, p: refused(
        lambda: m.set_input_embeddings(torch.nn.Embedding(3, 4)), "`value` must stay the backbone's token embeddings"
    ),
    "head: another": lambda m, b, p: refused(
        lambda: m.set_output_embeddings(torch.nn.Linear(3, 4)), "`new_embeddings` must stay the backbone's head"
    ),
    "memory footprint": lambda m, b, p: (
        m.get_memory_footprint()
        == transformers.PreTrainedModel.get_memory_footprint(m) + m.backbone.get_memory_footprint()
    ),
    "pickle": lambda m, b, p: same(pickle.loads(pickle.dumps(m)), m, b),
    "deepcopy": lambda m, b, p: same(copy.deepcopy(m), m, b),
    "load_state_dict": lambda m, b, p: str(m.load_state_dict(m.state_dict())) == "<All keys matched successfully>",
    "offload": lambda m, b, p: torch.equal(accelerate.cpu_offload(opened(m), "cpu")(IDS).logits, m(IDS).logits),
    "save: over the backbone": lambda m, b, p: (
        refused(lambda: m.save_pretrained(m.config.backbone_name_or_path), "another folder than that of the backbone")
        and same(opened(m), m, b)
    ),
    "save: where the backbone's name would lead": lambda m, b, p: refused(
        lambda: (setattr(m.config, "backbone_name_or_path", str(p / "new")), m.save_pretrained(p / "new")),
        "another folder than that of the backbone",
    ),
    "save: shards": lambda m, b, p: (
        m.save_pretrained(p, max_shard_size="20KB") is None
        and (p / "model.safetensors.index.json").is_file()
        and same(LongMemForCausalLM.from_pretrained(p), m, b)
    ),
    "save: variant": lambda m, b, p: (
        m.save_pretrained(p, variant="fp16") is None
        and same(AutoModelForCausalLM.from_pretrained(p, variant="fp16"), m, b)
        and refused(lambda: AutoModelForCausalLM.from_pretrained(p), r"holds no model\.safetensors")
    ),
    "save: class that opens it": lambda m, b, p: same(
        getattr(transformers, opened_by(m)).from_pretrained(m.name_or_path), m, b
    ),
    "hub: from its cache": lambda m, b, p: (
        same(each := downloaded(m, p), m, b)
        and each.name_or_path == "me/saved"
        and each.tokenizer.chat_template == CHAT
    ),
    "generate: generation_config": lambda m, b, p: (
        m.generate(IDS[:1], memory=b, generation_config=GenerationConfig(max_new_tokens=2)).shape[1] == 18
    ),
    "generate: all that a tokenizer gives": lambda m, b, p: refused(
        lambda: m.generate(m.tokenizer("a", return_tensors="pt")), r"to be passed on as `\*\*inputs`"
    ),
    "generate: padding": lambda m, b, p: padded(m, b),
    "generate: padding and beams": lambda m, b, p: padded(m, b, num_beams=3),
    "generate: beams, several": lambda m, b, p: (
        m.generate(IDS, memory=[b, b, b], num_beams=4, num_return_sequences=2, max_new_tokens=2).shape == (6, 18)
    ),
    "generate: no cache": lambda m, b, p: drafted(m, b, use_cache=False) == drafted(m, b),
    "generate: fixed cache": lambda m, b, p: drafted(m, b, cache_implementation="static") == drafted(m, b),
    "generate: prefill in pieces": lambda m, b, p: drafted(m, b, prefill_chunk_size=4) == drafted(m, b),
    "generate: streamer": lambda m, b, p: streamed(m, b),
    "generate: guidance": lambda m, b, p: drafted(m, b, guidance_scale=3.0) != drafted(m, b),
    "generate: misspelt": lambda m, b, p: refused(lambda: drafted(m, b, num_beam=2), "num_beam"),
    "generate: early exit": lambda m, b, p: refused(
        lambda: drafted(m, b, assistant_early_exit=2), "`assistant_early_exit` must be left out, got 2"
    ),
    "generate: attentions": lambda m, b, p: refused(
        lambda: drafted(m, b, output_attentions=True, return_dict_in_generate=True), "Use `output_memory_reads=True`"
    ),
    "generate: continuous batching": lambda m, b, p: refused(
        lambda: m.generate_batch(inputs=[[1, 2, 3]]), "continuous batching is not available"
    ),
    "pipeline: batch": lambda m, b, p: pipelined(m, b),
}
SIZES_OF_ANY = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")


def opened_by(model: LongMemForCausalLM) -> str:
    return json.loads((Path(model.name_or_path) / "config.json").read_text())["architectures"][0]


@pytest.mark.parametrize("trial", TRIED)
def test_what_a_user_of_transformers_tries(trial: str, model: Any, bank: MemoryBank, tmp_path: Path) -> None:
    with torch.no_grad():
        assert TRIED[trial](model, bank, tmp_path)


# Sizes of the tiny Llama, and kinds of attention that not every architecture has.
OF_ONE_ARCHITECTURE = {"config: sizes", "config: tokens", "config: heads"} | {
    f"attention: {name}" for name in ("shown", "another", "the same")
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_what_they_try_on_other_architectures(kind: str, place: Path, tmp_path: Path) -> None:
    build_backbone(kind, vocab_size=256).save_pretrained(tmp_path / "backbone")
    AutoTokenizer.from_pretrained(place / "backbone").save_pretrained(tmp_path / "backbone")
    LongMemForCausalLM.from_backbone(tmp_path / "backbone", **SIZES).save_pretrained(tmp_path / "saved")
    failed = []
    for number, name in enumerate(TRIED.keys() - OF_ONE_ARCHITECTURE):
        model = LongMemForCausalLM.from_pretrained(tmp_path / "saved")
        bank = MemoryBank.for_model(model)
        model.memorize(bank, torch.arange(60, 160), "a")
        try:
            with torch.no_grad():
                assert TRIED[name](model, bank, tmp_path / str(number))
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}"[:200])
    assert failed == []


# Files ----------------------------------------------------------------------------------------------------------------------


def test_a_file_with_notes_of_others_opens_with_one_warning(place: Path, tmp_path: Path) -> None:
    settings = json.loads((place / "saved" / "config.json").read_text())
    understood = {"use_cache": False, "pad_token_id": 3, "eos_token_id": 4}
    later = {"a_field_of_tomorrow": 1, "note": "of somebody"}
    for extra, expected in ((understood, 0), (understood | later, 1)):
        (tmp_path / "config.json").write_text(json.dumps(settings | extra))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            config = LongMemConfig.from_pretrained(tmp_path)
        found = [str(each.message) for each in caught if "does not understand" in str(each.message)]
        assert len(found) == expected
        assert all("a_field_of_tomorrow, note" in each for each in found)
        assert (config.use_cache, config.pad_token_id, config.chunk_size) == (False, 3, 4)
        assert not hasattr(config, "note")
    with pytest.raises(ValueError, match="`a_field_of_tomorrow` is not a field of LongMemConfig"):
        LongMemConfig(**later)


def test_a_saved_folder_has_all_that_opens_it(place: Path, model: LongMemForCausalLM) -> None:
    saved = place / "saved"
    assert AutoTokenizer.from_pretrained(saved).chat_template == model.tokenizer.chat_template == CHAT
    auto_map = json.loads((saved / "config.json").read_text())["auto_map"]
    spec = importlib.util.spec_from_file_location(saving.SHIM, saved / f"{saving.SHIM}.py")
    assert spec is not None
    assert spec.loader is not None
    shim = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shim)
    for name, known in (("AutoModel", LongMemModel), ("AutoModelForCausalLM", LongMemForCausalLM)):
        assert getattr(shim, auto_map[name].removeprefix(f"{saving.SHIM}.")) is known
    text = pipeline("text-generation", model=str(saved))("the cat", max_new_tokens=3, do_sample=False)
    ids = model.generate(**model.tokenizer("the cat", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert text[0]["generated_text"] == model.tokenizer.decode(ids[0])


def test_the_tokenizer_of_a_folder_is_the_backbones(place: Path, model: LongMemForCausalLM) -> None:
    new = LongMemForCausalLM.from_backbone(place / "backbone", **SIZES)
    assert model.encoder_stamp().recipe["tokenizer"] == new.encoder_stamp().recipe["tokenizer"]
    assert model.encoder_fingerprint() == new.encoder_fingerprint()


FRESH = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
assert "longmem" not in sys.modules
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
assert tokenizer.chat_template and "longmem" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
ids = torch.arange(16)[None]
assert torch.equal(model.get_output_embeddings()(base(ids).last_hidden_state), model(ids).logits)
speak = pipeline("text-generation", model=folder, trust_remote_code=True)
chat = speak([{"role": "user", "content": "the cat"}], max_new_tokens=2, do_sample=False)
assert chat[0]["generated_text"][-1]["role"] == "assistant"
model.save_pretrained(sys.argv[2])
assert torch.equal(AutoModelForCausalLM.from_pretrained(sys.argv[2]).eval()(ids).logits, model(ids).logits)
print("opened", float(model(ids).logits.double().sum()))
"""


@pytest.mark.slow
def test_a_process_that_never_imported_the_package_opens_a_folder(place: Path, model: Any, tmp_path: Path) -> None:
    program = [sys.executable, "-c", FRESH, str(place / "saved"), str(tmp_path / "again")]
    done = subprocess.run(program, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) == float(model(torch.arange(16)[None]).logits.double().sum().detach())
    names, again = ({path.name for path in folder.iterdir()} for folder in (place / "saved", tmp_path / "again"))
    assert again - {"__pycache__"} == names - {"__pycache__"}  # which Python makes where it imports the folder's module


@pytest.mark.slow
def test_transformers_serves_a_folder_and_chats_with_it(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    command, name = str(Path(sys.executable).parent / "transformers"), str(place / "saved")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    url, options = f"http://localhost:{port}", ["--trust-remote-code", "--device", "cpu", "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([command, "serve", name, *options], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        for _ in range(600):
            assert server.poll() is None, (tmp_path / "log").read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health") as health:
                if health.status == 200:
                    break
            time.sleep(1)
        messages = [{"role": "user", "content": "the cat"}]
        asked = {"model": name, "messages": messages, "max_tokens": 4, "temperature": 0, "stream": False}
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(asked).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request) as answer:
            said = json.load(answer)["choices"][0]["message"]["content"]
        model = LongMemForCausalLM.from_pretrained(place / "saved")
        prompt = model.tokenizer.apply_chat_template(messages, return_tensors="pt", add_generation_prompt=True)
        expected = model.generate(**prompt, max_new_tokens=4, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert said == model.tokenizer.decode(expected, skip_special_tokens=True)
        # At the limit of tokens it asks whether to go on. Without the Hub it may not speak to this machine either.
        env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        chat = subprocess.run(
            [command, "chat", name, url, "max_new_tokens=4", "do_sample=False"],
            input="the cat\nn\n!exit\n!exit\n", capture_output=True, text=True, errors="replace", check=False,
            cwd=tmp_path, env=env,
        )  # fmt: skip
        assert chat.returncode == 0, chat.stderr
        assert f"<{name}>:" in "".join(chat.stdout.split("\n"))
        assert "token limit" in chat.stdout
    finally:
        server.terminate()
        server.wait()


class FakeHub:
    """Repositories in memory, behind the methods of `HfApi` that an upload needs."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool | None] = {}
        self.token: Any = None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
        def create_repo(api: Any, repo_id: str, *, private: Any = None, exist_ok: bool = False, **options: Any) -> Any:
            repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
            assert exist_ok or repo_id not in self.repositories
            self.repositories.setdefault(repo_id, {})
            self.private.setdefault(repo_id, private)
            self.token = api.token
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(api: Any, *, repo_id: str, folder_path: Path, **options: Any) -> str:
            found = (path for path in Path(folder_path).rglob("*") if path.is_file())
            self.repositories[repo_id] |= {str(path.relative_to(folder_path)): path.read_bytes() for path in found}
            return str(options["commit_message"])

        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
        monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
        return self


def test_a_push_makes_its_repository_and_names_no_path(
    place: Path, model: LongMemForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub().install(monkeypatch)
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, private=True, token="hf_secret", commit_message="first")
    assert (hub.private, hub.token) == ({"me/mine": True}, "hf_secret")
    assert model.push_to_hub("me/mine", commit_message="second") == "second"
    sent = hub.repositories["me/mine"]
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", f"{saving.SHIM}.py"} <= set(sent)
    for name, content in sent.items():
        assert str(place).encode() not in content, name
        assert b"hf_secret" not in content, name
    card = sent["README.md"].decode()
    assert "not on the Hub: you need `backbone`, a llama of 4 layers, hidden size 32" in " ".join(card.split())
    received = tmp_path / "received"
    received.mkdir()
    for name, content in sent.items():
        (received / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"pass `backbone=` with that model, a llama of 4 layers"):
        LongMemForCausalLM.from_pretrained(received)
    again = LongMemForCausalLM.from_pretrained(received, backbone=model.backbone)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.tokenizer.chat_template == CHAT
    assert LongMemForCausalLM.from_pretrained(tmp_path / "mine").config.backbone_name_or_path == str(place / "backbone")


def test_a_push_with_the_backbone_opens_elsewhere(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub().install(monkeypatch)
    model.push_to_hub("me/whole", save_backbone=True, dtype="bfloat16")
    for name, content in hub.repositories["me/whole"].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert LongMemForCausalLM.from_pretrained(tmp_path).config.backbone_name_or_path == str(tmp_path / "backbone")
    assert load_file(tmp_path / "model.safetensors").popitem()[1].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"private": True}, "`private` is of an upload, got it without `push_to_hub=True`"),
        ({"max_shards": 1}, "`max_shards` is not an option here. Did you mean `max_shard_size`"),
        ({"state_dict": {"backbone.x": torch.zeros(1)}}, "`state_dict` must have all that is saved"),
    ],
)
def test_saving_refuses_what_it_would_ignore(model: Any, tmp_path: Path, options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model.save_pretrained(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# Training in loops of others --------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"input_ids": torch.arange(number, number + 16), "labels": torch.arange(number, number + 16)}


@pytest.mark.parametrize(
    ("lora", "with_memory"),
    [
        (None, True),
        ({"rank": 2}, False),
        pytest.param(None, False, marks=pytest.mark.slow),
        pytest.param({"rank": 2}, True, marks=pytest.mark.slow),
    ],
)
def test_checkpoints_of_the_trainer(place: Path, tmp_path: Path, lora: Any, with_memory: bool, caplog: Any) -> None:
    """Validation, the best model, prediction, going on, and opening a checkpoint by name."""

    def trainer(model: LongMemForCausalLM) -> Trainer:
        bank = MemoryBank.for_model(model)
        model.memorize(bank, torch.arange(60, 160), "a")
        memory = {"memory": bank} if with_memory else {}
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
            per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        return Trainer(
            model,
            arguments,
            train_dataset=Rows(),
            eval_dataset=Rows(),
            data_collator=lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]} | memory,
            processing_class=model.tokenizer,
        )

    def new() -> LongMemForCausalLM:
        torch.manual_seed(0)
        return LongMemForCausalLM.from_backbone(place / "backbone", lora=lora, **SIZES)

    first = trainer(new())
    before = {name: weight.clone() for name, weight in first.model.backbone.state_dict().items()}
    first.model.config.use_cache, first.model.config.pad_token_id = False, 0
    first.train()
    assert first.predict(Rows()).predictions.shape == (8, 16, 256)  # logits alone: no memory, no cache
    assert all(torch.equal(weight, before[name]) for name, weight in first.model.backbone.state_dict().items())
    checkpoint = tmp_path / "checkpoint-4"
    opened = LongMemForCausalLM.from_pretrained(checkpoint)
    written = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(opened.state_dict()[name], weight) for name, weight in written.items())
    assert all(name.startswith("side_network.") and "base_layer" not in name for name in written)
    assert (opened.config.use_cache, opened.config.lora) == (False, first.model.config.lora)
    assert opened.config.backbone_name_or_path == str(place / "backbone")
    second = trainer(new())
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(second.model.state_dict()[name], weight) for name, weight in written.items())
    assert "missing keys" not in caplog.text


def test_peft_with_plain_names_reaches_the_side_network_alone(model: Any, bank: MemoryBank, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    fingerprint, frozen = model.encoder_fingerprint(), {name for name, _ in model.backbone.named_modules()}
    with pytest.raises(ValueError, match="BackboneHead"):
        get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
    for targets in (["q_proj"], "all-linear"):
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
        trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
        assert len(trained) == (4 if targets == ["q_proj"] else 28)
        assert all(".side_network." in name and "lora_" in name for name in trained)
        adapted(input_ids=IDS, labels=IDS, memory=bank).loss.backward()
        assert {name for name, weight in adapted.named_parameters() if weight.grad is not None} == trained
        assert {name for name, _ in model.backbone.named_modules()} == frozen
        assert not any(weight.requires_grad for weight in model.backbone.parameters())
        assert model.encoder_fingerprint() == fingerprint
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if name in trained:
                    weight.add_(torch.randn_like(weight) * 0.2)
            expected = adapted.eval()(input_ids=IDS, memory=bank).logits
        ids = adapted.generate(input_ids=IDS[:1], memory=bank, max_new_tokens=2, do_sample=False)
        assert ids.shape == (1, 18)
        adapted.save_pretrained(tmp_path)
        model = adapted.unload()
        assert (model(IDS, memory=bank).logits - expected).abs().max() > 1e-2
    again = PeftModel.from_pretrained(model, tmp_path).eval()
    assert torch.equal(again(input_ids=IDS, memory=bank).logits, expected)


def test_a_lora_config_of_peft_is_taken_as_settings(place: Path) -> None:
    from peft import LoraConfig

    given = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1, target_modules=["v_proj", "q_proj"], task_type="CAUSAL_LM")
    expected = {"rank": 4, "alpha": 16.0, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
    assert LongMemForCausalLM.from_backbone(place / "backbone", lora=given, **SIZES).config.lora == expected
    for extra in (
        {"use_rslora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"layers_to_transform": [1]},
    ):
        with pytest.raises(ValueError, match=rf"`{next(iter(extra))}` of the LoraConfig in `lora` can't be had"):
            LongMemConfig(lora=LoraConfig(r=4, **extra))
    with pytest.raises(ValueError, match=r"`lora` must be a dict of settings or a peft\.LoraConfig, got 4"):
        LongMemConfig(lora=4)


class Readers(torch.utils.data.Dataset):
    """What a data worker reads of a bank that came along with its data set."""

    def __init__(self, bank: MemoryBank) -> None:
        self.bank = bank

    def __len__(self) -> int:
        return 2

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.bank.token_ids("a")[number : number + 8]  # type: ignore[index]


@torch.no_grad()
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_bank_on_disk_goes_along_with_a_copy(model: LongMemForCausalLM, tmp_path: Path, workers: int) -> None:
    with MemoryBank.for_model(model, folder=tmp_path / "bank") as bank:
        model.memorize(bank, torch.arange(60, 160), "a")
        for twin in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
            assert torch.equal(model(IDS, memory=twin).logits, model(IDS, memory=bank).logits)
            with pytest.raises(ValueError, match="read_only=True"):
                twin.delete("a")
            twin.close()
        spawned = {"multiprocessing_context": "spawn"} if workers else {}
        rows = list(torch.utils.data.DataLoader(Readers(bank), num_workers=workers, **spawned))  # type: ignore[arg-type]
        assert [row.tolist() for row in rows] == [[list(range(60, 68))], [list(range(61, 69))]]


@torch.no_grad()
def test_rows_that_a_trainer_packed_are_read_as_if_alone(model: LongMemForCausalLM, bank: MemoryBank) -> None:
    """TRL packs several texts into one row and says where they begin; the backbone's masks keep them apart."""
    parts = [torch.arange(10), torch.arange(40, 46)]
    packed = {
        "position_ids": torch.cat([torch.arange(len(part)) for part in parts])[None],
        "cu_seq_lens_q": torch.tensor([0, 10, 16], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, 10, 16], dtype=torch.int32),
        "max_length_q": 10,
        "max_length_k": 10,
        "seq_idx": None,
    }
    for memory in (None, bank):
        found = model(torch.cat(parts)[None], memory=memory, **packed).logits
        alone = torch.cat([model(part[None], memory=memory).logits for part in parts], dim=1)
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            model.base_model(torch.cat(parts)[None], memory=memory, **packed).last_hidden_state,
            torch.cat([model.base_model(part[None], memory=memory).last_hidden_state for part in parts], dim=1),
            rtol=1e-4,
            atol=1e-4,
        )


# Generation -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assistant", ["backbone", "longmem", "lookup"])
def test_assisted_generation_reads_memory(
    place: Path, model: Any, bank: MemoryBank, assistant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(IDS[:1], memory=bank, **options)
    if assistant == "lookup":
        helper: dict[str, Any] = {"prompt_lookup_num_tokens": 2}
    else:
        kind = AutoModelForCausalLM.from_pretrained
        helper = {"assistant_model": kind(place / ("backbone" if assistant == "backbone" else "saved")).eval()}

    def refuse(bank: MemoryBank, memo: Any) -> None:
        raise AssertionError("a bank was copied")

    monkeypatch.setattr(MemoryBank, "__deepcopy__", refuse, raising=False)
    assert torch.equal(model.generate(IDS[:1], memory=bank, **options, **helper), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", fast(2, ["qwen3", "llama", "gemma2", "gpt2"]))
def test_a_cache_of_fixed_size_gives_the_same_numbers(kind: str) -> None:
    """Its masks are made before a step, where the growing one's are made in it; one row has padding on its left."""
    model = LongMemForCausalLM.from_backbone(build_backbone(kind), **SIZES).eval()
    bank = MemoryBank.for_model(model)
    model.memorize(bank, torch.arange(60), "a")
    ids, mask = IDS[:2].clone(), torch.ones_like(IDS[:2])
    ids[1, :6], mask[1, :6] = 0, 0
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask, "output_scores": True}
    for memory in (None, bank):
        scores = [
            model.generate(
                ids, memory=memory, return_dict_in_generate=True, cache_implementation=cache, **options
            ).scores
            for cache in (None, "static")
        ]
        torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)


LONG_ROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 3.0, 6.0, 2.0],
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 2, "do_sample": False}, {"do_sample": True}])
def test_without_memory_a_rotary_kind_that_switches_gives_what_its_backbone_does(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"max_position_embeddings": 64, "original_max_position_embeddings": 16, "rope_parameters": LONG_ROPE}
    monkeypatch.setitem(BACKBONES, "phi3", dict(SMALL, num_key_value_heads=2))
    backbone = build_backbone("phi3", **sizes)
    model = LongMemForCausalLM.from_backbone(backbone, **SIZES).eval()
    ids = torch.randint(2, 97, (2, 10), generator=torch.Generator().manual_seed(0))
    found = []
    for each in (backbone, model):
        torch.manual_seed(1)
        found.append(each.generate(ids, max_new_tokens=16, **options))
    assert torch.equal(*found)
    bank = MemoryBank.for_model(model)
    model.memorize(bank, torch.arange(40), "a")
    assert model.generate(ids, memory=bank, max_new_tokens=16, do_sample=False).shape == (2, 26)


# Compilers --------------------------------------------------------------------------------------------------------------------


def traced_files() -> set[str]:
    """Return the files of functions that the compiler has traced since the last reset."""
    from torch._dynamo.utils import get_compilation_metrics

    return {str(metric.co_filename) for metric in get_compilation_metrics()}


@torch.no_grad()
def test_bookkeeping_is_outside_of_every_graph(model: Any, bank: MemoryBank, monkeypatch: pytest.MonkeyPatch) -> None:
    import jaxtyping
    from torch._dynamo import reset
    from torch._dynamo.utils import clear_compilation_metrics

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # shape checks can't be compiled
    other = LongMemForCausalLM.from_pretrained(model.name_or_path)

    def enter() -> Any:
        banks = banks_per_lane(other, bank, 1)  # makes the encoder's stamp
        return holds_nothing(banks), other.run_backbone(IDS[:1]).hidden_states

    reset()
    clear_compilation_metrics()
    is_empty, states = torch.compile(enter, backend="eager")()
    assert not is_empty
    assert states.keys() == model.run_backbone(IDS[:1]).hidden_states.keys()
    assert other.encoder_fingerprint() == model.encoder_fingerprint()
    assert not [name for name in traced_files() if "/longmem/" in name]
    attention = model.side_network.layers[0].attention  # what may be replaced, and is not, stays within a graph
    text = model.config.get_text_config()
    query, key = (torch.randn(1, heads, 5, 8) for heads in (text.num_attention_heads, text.num_key_value_heads))
    attend = functools.partial(dispatch_attention, attention, query, key, key, None, scaling=0.3)
    torch.testing.assert_close(torch.compile(attend, backend="eager", fullgraph=True)(), attend())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["torch.compile", "model.compile"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_model_is_the_same_encoder(
    place: Path, bank: MemoryBank, how: str, backend: str, monkeypatch: Any
) -> None:
    import jaxtyping
    from torch._dynamo import reset
    from torch._dynamo.utils import clear_compilation_metrics

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # shape checks can't be compiled
    plain = LongMemForCausalLM.from_pretrained(place / "saved")
    reset()
    clear_compilation_metrics()
    model = LongMemForCausalLM.from_pretrained(place / "saved")
    if how == "model.compile":
        model.compile(backend=backend)
    compiled = model if how == "model.compile" else torch.compile(model, backend=backend)
    with torch.no_grad():
        for memory in (bank, None):
            found, expected = compiled(IDS, memory=memory).logits, plain(IDS, memory=memory).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert model.encoder_fingerprint() == plain.encoder_fingerprint()
    traced = traced_files()
    assert any("/longmem/model/side_network" in name for name in traced)
    assert not [name for name in traced if any(f"/longmem/{part}/" in name for part in ("encoder", "memory"))]
    losses = [each.train()(IDS, labels=IDS, memory=bank).loss for each in (plain, model)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_trainer_compiles(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    losses = []
    for compile_it in (False, True):
        torch.manual_seed(0)
        model = LongMemForCausalLM.from_backbone(place / "backbone", **SIZES)
        arguments = TrainingArguments(
            str(tmp_path / str(compile_it)), max_steps=2, torch_compile=compile_it, report_to=[], use_cpu=True,
            torch_compile_backend="eager" if compile_it else None, per_device_train_batch_size=2, save_steps=2,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=Rows())  # type: ignore[arg-type]
        losses.append(trainer.train().training_loss)
        LongMemForCausalLM.from_pretrained(tmp_path / str(compile_it) / "checkpoint-2")
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# lm-eval ----------------------------------------------------------------------------------------------------------------------


def test_lm_eval_finds_the_model_by_name() -> None:
    """lm-eval puts the text of an entry point under the name, and lets the class take its place that registers itself."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.registry import Registry, get_model

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lm_eval.models"]
    entry = importlib.metadata.EntryPoint("longmem", declared["longmem"], "lm_eval.models")
    registry: Any = Registry("models")
    registry.register("longmem", target=entry.value)
    found = registry.get("longmem")
    assert found is entry.load() is get_model("longmem")
    assert entry.value == f"{found.__module__}:{found.__name__}"


# Examples ---------------------------------------------------------------------------------------------------------------------


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["train_with_trainer", "train_with_accelerate", "adapt_with_peft"])
def test_examples_that_train(place: Path, tmp_path: Path, name: str) -> None:
    example(name).main(str(place / "backbone"), str(place / "book.txt"), str(tmp_path / "out"), steps=3, window=16)
    folder = tmp_path / "out" / ("side-network" if name == "train_with_trainer" else "")
    if name != "adapt_with_peft":
        trained = LongMemForCausalLM.from_pretrained(folder)
        new = LongMemForCausalLM.from_backbone(place / "backbone", segment_length=16)
        assert not torch.equal(trained(IDS).logits, new(IDS).logits)
    else:
        assert (folder / "adapter_model.safetensors").is_file()


def test_the_example_that_generates(place: Path) -> None:
    text = example("generate_with_assistant").main(
        str(place / "saved"), str(place / "backbone"), str(place / "book.txt"), "the cat", new_tokens=4
    )
    assert text.startswith("the cat")


@pytest.mark.slow
def test_the_example_with_trl(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    turns = [
        [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"it is {n}"}] for n in range(12)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": each}) for each in turns))
    example("train_with_trl").main(
        str(place / "backbone"), str(tmp_path / "chats.jsonl"), str(tmp_path / "out"), steps=3, window=64
    )
    trained = LongMemForCausalLM.from_pretrained(tmp_path / "out" / "side-network")
    new = LongMemForCausalLM.from_backbone(place / "backbone", segment_length=64)
    assert not torch.equal(trained(IDS).logits, new(IDS).logits)
    assert LongMemForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-3").tokenizer.chat_template == CHAT


def test_examples_are_short() -> None:
    for path in EXAMPLES.glob("*_with_*.py"):
        assert len(path.read_text().splitlines()) <= 40, path.name
