"""Start tokens: every text that a model reads begins with what its tokenizer puts before texts, and none of it is stored."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_models import save_tiny_backbone, some_text
from tiny_runs import make_files, make_trainer
from tokenizers import Tokenizer, processors
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from longmem import LongMemForCausalLM, MemoryBank, calibrate_heads
from longmem.backbone.cache_names import CACHE_NAMES
from longmem.backbone.loading import start_of
from longmem.backbone.structure import probe_ids
from longmem.encoder.stamp import NO_START
from longmem.evaluation.perplexity import PerplexitySettings
from longmem.evaluation.perplexity.scoring import Cut, make_views, score_windows
from longmem.evaluation.registry import run_task
from longmem.evaluation.systems import MemorySystem, Question, make_systems
from longmem.memory import BankShards
from longmem.serving.engine import Engine, Request, prompt_ids
from longmem.streaming.stream import one_token_config
from longmem.training.fewer_heads import CostSettings, head_costs
from longmem.training.heads import HeadSettings

OPTIONS = {"segment_length": 32, "num_retrieved_tokens": 8, "memory_distance": 8}


def beginning(folder: Path) -> list[int]:
    """Let the tokenizer in a folder put two tokens before a text, and return them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = tokenizer.convert_ids_to_tokens([0, 1])
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single=f"{names[0]} {names[1]} $A", special_tokens=list(zip(names, (0, 1), strict=True))
    )
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    return [0, 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_tiny_backbone(tmp_path_factory.mktemp("begun") / "backbone")
    beginning(made)
    return made


@pytest.fixture
def model(folder: Path) -> Any:
    return LongMemForCausalLM.from_backbone(folder, **OPTIONS).eval()


def random_ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 256, (count,), generator=torch.Generator().manual_seed(seed))


def losses_behind(model: Any, context: list[int], ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Return the losses of `ids` behind a context that is written out."""
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *ids.tolist()]]), **options).logits[0, len(context) - 1 : -1]
    return cross_entropy(logits.float(), ids, reduction="none")


# What is read begins so ------------------------------------------------------------------------------------------------


@pytest.fixture
def texts_read(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The token ids of every text that any backbone begins to read from here on, but for probes."""
    read: list[list[int]] = []
    forward = LlamaForCausalLM.forward

    @functools.wraps(forward)
    def recording(self: Any, input_ids: Any = None, **options: Any) -> Any:
        is_text = input_ids is not None and input_ids[0, :4].tolist() != probe_ids(self)[0, :4].tolist()
        if is_text and not any(cache.get_seq_length() for name in CACHE_NAMES if (cache := options.get(name))):
            read.extend(input_ids.tolist())
        return forward(self, input_ids, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", recording)
    return read


def memorizes(folder: Path, tmp_path: Path) -> None:
    model = LongMemForCausalLM.from_backbone(folder, **OPTIONS)
    bank = MemoryBank.for_model(model, refresh="eager")
    model.memorize(bank, some_text(30), "a", batch_size=2)
    model.memorize(bank, some_text(9), "a", append=True)
    with torch.no_grad():
        model.backbone.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
    bank.ready_for(model)  # encodes everything again
    model.find(bank, some_text(5))


def streams(folder: Path, tmp_path: Path) -> None:
    model = LongMemForCausalLM.from_backbone(folder, **OPTIONS).eval()
    stream = model.stream(MemoryBank.for_model(model), document_id="a", window=16)
    stream.score(some_text(12))
    list(stream.generate(20))


def calibrates(folder: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"memory_tokens": 512, "window": 32, "segment_length": 32, "num_retrieved_tokens": 8}
    settings = HeadSettings(steps=2, chunk_size=4, lora_rank=2, **sizes)
    calibrate_heads(str(folder), [some_text(2000, seed) for seed in range(2)], settings=settings)


def trains(folder: Path, tmp_path: Path) -> None:
    options = {"model__backbone": folder, "optimization__steps": 3, "loss__long_context_weight": 1.0}
    make_trainer(make_files(tmp_path), **options).run()


def evaluates(name: str, *overrides: str) -> Any:
    def run(folder: Path, tmp_path: Path) -> None:
        (tmp_path / "texts").mkdir()
        for number in range(2):
            (tmp_path / "texts" / f"{number}.txt").write_text(some_text(100, number))
        own = [each.format(texts=tmp_path / "texts") for each in overrides]
        fields = [f"config.{field}={value}" for field, value in OPTIONS.items()]
        run_task(name, [f"model={folder}", *fields, f"output={tmp_path / 'run'}", *own], Console(quiet=True))

    return run


WITH_CONTEXT, SYSTEMS = "systems=[backbone,context-32,bm25,off,on,wrong]", "systems=[backbone,bm25,off,on,wrong]"
ASKED = ("window=128", "haystack=filler", "max_new_tokens=2")
WAYS_TO_READ = {
    "memorize": memorizes,
    "stream": streams,
    "calibrate_heads": calibrates,
    "train": trains,
    "books": evaluates("perplexity-books", "data={texts}", WITH_CONTEXT, "window=16", "stride=8", "memory_tokens=32"),
    "documents": evaluates("perplexity", "data={texts}", WITH_CONTEXT, "window=16", "stride=8", "memory_tokens=32"),
    "recall": evaluates("recall", SYSTEMS, "sizes=[256]", "items=1", "pairs=2", "config.segment_length=128", *ASKED),
    "notes": evaluates("notes", SYSTEMS, "sizes=[64]", "limit=2", *ASKED),
}


@pytest.mark.parametrize("way", WAYS_TO_READ)
def test_every_text_that_is_read_begins_with_them(way, folder, tmp_path, texts_read):
    WAYS_TO_READ[way](folder, tmp_path)
    assert texts_read
    without = [
        ids for ids in texts_read if ids[:2] != [0, 1][: len(ids)]
    ]  # a context may be cut, and go on from its cache
    assert not without, f"{len(without)} of {len(texts_read)}, such as {without[0][:8]}"
    assert not any(ids[2:4] == [0, 1] for ids in texts_read)


# What is computed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forget_sinks", [False, True])
def test_what_is_stored_is_the_text_as_it_stands_behind_them(folder, forget_sinks):
    model = LongMemForCausalLM.from_backbone(folder, forget_sinks=forget_sinks, **OPTIONS)
    ids, layers = random_ids(24), model.config.memory_layers
    keys, values = model.encode(ids[None])
    all_keys, all_values = model.backbone_view.encode(torch.tensor([[0, 1, *ids.tolist()]]), layers)
    bare, _ = model.backbone_view.encode(ids[None], layers)
    for own, whole, without in zip((*keys, *values), (*all_keys, *all_values), (*bare, *bare), strict=True):
        assert own.shape[2] == 24
        torch.testing.assert_close(own, whole[:, :, 2:])
        assert not torch.allclose(own, without, atol=1e-3)
    mask = torch.ones(1, 24, dtype=torch.int64)
    for inputs in ({"attention_mask": mask}, {"position_ids": torch.arange(24)[None] + 7}):
        for own, again in zip(keys, model.encode(ids[None], **inputs)[0], strict=True):
            torch.testing.assert_close(own, again, rtol=1e-3, atol=1e-4)


def test_a_document_is_the_same_at_once_in_pieces_and_in_batches(model):
    ids = random_ids(90)
    whole, pieces, batches = (MemoryBank.for_model(model) for _ in range(3))
    model.memorize(whole, ids, "a")
    model.memorize(pieces, ids[:41], "a")
    model.memorize(pieces, ids[41:], "a", append=True)
    model.memorize(batches, ids, "a", batch_size=3)
    question = random_ids(12, seed=1)[None]
    with torch.no_grad():
        expected = model(question, memory=whole).logits
        for bank in (pieces, batches):
            assert bank.num_tokens == 90
            torch.testing.assert_close(model(question, memory=bank).logits, expected, rtol=1e-3, atol=1e-3)


def test_a_stream_computes_what_a_window_behind_them_does(model):
    ids, bank = random_ids(50), MemoryBank.for_model(model)
    stream = model.stream(bank, document_id="a", window=16, keep=8)
    losses = torch.cat([stream.score(ids[:11]), stream.score(ids[11:16])])
    assert losses[0].isnan()
    assert len(losses) == 16
    torch.testing.assert_close(losses[1:], losses_behind(model, [0, 1], ids[:16])[1:], rtol=1e-4, atol=1e-4)
    later = stream.score(ids[16:20])  # the first eight have left
    assert (stream.num_tokens, bank.num_tokens, len(stream.local_ids)) == (20, 8, 12)
    expected = losses_behind(model, [0, 1], ids[8:20], memory=bank)[9:]
    torch.testing.assert_close(later[1:], expected, rtol=1e-4, atol=1e-4)  # the first was predicted before they left
    begun = torch.tensor([[0, 1, *ids[8:20].tolist()]])
    written = list(stream.generate(3))
    options = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(begun)}
    assert written == model.generate(begun, memory=bank, **options)[0, 14:].tolist()


def test_a_stream_that_begins_with_them_has_them_once(model):
    ids, bank = random_ids(10), MemoryBank.for_model(model)
    stream = model.stream(bank, document_id="a", window=16)
    losses = stream.score([0, 1, *ids.tolist()])
    torch.testing.assert_close(losses[2:], losses_behind(model, [0, 1], ids), rtol=1e-4, atol=1e-4)


def test_tokens_that_come_later_do_not_change_what_a_window_began_with(model):
    stream = model.stream(MemoryBank.for_model(model), document_id="a", window=16)
    stream.read([0])  # half of them
    chooser = copy.copy(model)
    chooser.generation_config = one_token_config(model.generation_config, {"do_sample": False})
    stream._next_token(chooser)
    stream.read([1])  # now both stand there, but the cache was computed behind others
    begun = torch.tensor([[0, 1, 0, 1]])
    options = {"max_new_tokens": 2, "do_sample": False, "attention_mask": torch.ones_like(begun)}
    assert list(stream.generate(2)) == model.generate(begun, **options)[0, 4:].tolist()


def test_text_that_begins_with_them_is_encoded_as_it_is(model):
    ids = random_ids(30)
    begun = torch.tensor([[0, 1, *ids.tolist()]])
    keys, _ = model.encode(begun)
    for own, whole in zip(keys, model.backbone_view.encode(begun, model.config.memory_layers)[0], strict=True):
        torch.testing.assert_close(own, whole)
    both, _ = model.encode(torch.cat([begun, random_ids(32, seed=1)[None]]))  # beside one that does not
    other, _ = model.encode(random_ids(32, seed=1)[None])
    for own, first, second in zip(both, keys, other, strict=True):
        torch.testing.assert_close(own, torch.cat([first, second]))


def test_padding_on_the_left_changes_nothing(model):
    ids = random_ids(6)
    keys, _ = model.encode(ids[None])
    padded, mask = torch.tensor([[9, 9, *ids.tolist()]]), torch.tensor([[0, 0, *[1] * 6]])
    positions = torch.tensor([[1, 1, *range(6)]])  # as `generate` makes them
    for inputs in ({"attention_mask": mask}, {"attention_mask": mask, "position_ids": positions}):
        for own, behind in zip(keys, model.encode(padded, **inputs)[0], strict=True):
            torch.testing.assert_close(own, behind[:, :, 2:], rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="`position_ids` must have the axes"):
        model.encode(ids[None], position_ids=torch.arange(6).expand(3, 1, 6))


def test_heads_are_weighed_behind_them(folder, tmp_path, texts_read):
    (tmp_path / "a.txt").write_text(some_text(200))
    options = {"memory_layers": [1, 2], "lora": {"rank": 2}, **OPTIONS}
    model = LongMemForCausalLM.from_backbone(folder, **options).eval()
    head_costs(model, tmp_path, CostSettings(memory_tokens=64, num_texts=1))
    assert texts_read
    assert all(ids[:2] == [0, 1] for ids in texts_read)


def test_a_long_conversation_is_cut_where_windows_begin(model):
    prompt = prompt_ids(model.tokenizer, some_text(30))
    assert prompt[:2] == [0, 1]
    said = [{"role": "user", "content": "hello"}]
    assert prompt_ids(model.tokenizer, said)[:2] == [0, 1]  # without a chat format, a text
    request = Request(prompt)
    ids, memory = Engine(model, {}).place(request)  # type: ignore[arg-type]
    assert ids[:2] == [0, 1] != ids[2:4]
    stored = memory.token_ids("earlier in this conversation").tolist()
    assert [*stored, *ids[2:]] == prompt


def test_windows_of_texts_are_scored_behind_them(model):
    ids, cut = random_ids(48), Cut(16, 8)
    windows = [*cut.cover(48)][:3]
    for system in ("backbone", "off"):
        view = make_views([system], model, ids, cut, {})[system]
        scores = score_windows(view, windows)
        for window, losses in zip(windows, scores.losses, strict=True):
            own = losses_behind(model.backbone, [0, 1], ids[window.start : window.end])[-window.num_scored :]
            torch.testing.assert_close(losses, own, rtol=1e-3, atol=1e-3)


def test_what_leaves_a_window_is_written_without_them(model):
    ids, cut, bank = random_ids(48), Cut(16, 8), MemoryBank.for_model(model)
    model.memorize(bank, ids[:8], "document")
    view = make_views(["on"], model, ids, cut, {"on": bank}, is_growing=True)["on"]
    score_windows(view, cut.row(8, 2))
    assert bank.token_ids("document").tolist() == ids[:24].tolist()
    written = MemoryBank.for_model(model)
    for start in (8, 16):  # in windows of 16 of which the first half left
        keys, values = model.encode(ids[None, start : start + 16])
        parts = ([layer[0, :, :8] for layer in part] for part in (keys, values))
        written.add(str(start), *parts, ids[start : start + 8], segment="new")
    question = random_ids(6, seed=1)[None]
    with torch.no_grad():
        both = MemoryBank.for_model(model)
        model.memorize(both, ids[:8], "document")
        expected = model(question, memory=BankShards([both, written])).logits
        torch.testing.assert_close(model(question, memory=bank).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("written", [[], [0, 1]])
def test_questions_are_asked_behind_them_and_never_twice(model, written):
    asked, value = random_ids(6).tolist(), random_ids(3, seed=1).tolist()
    system = MemorySystem("off", model, window=64)
    (answer,) = system.score([Question([*written, *asked], [value])])
    expected = -losses_behind(model, [0, 1, *asked], torch.tensor(value))
    torch.testing.assert_close(torch.tensor(answer.candidates[0].logprobs), expected, rtol=1e-3, atol=1e-3)


def test_training_predicts_what_it_did_before_and_writes_the_text_alone(folder, tmp_path):
    path = make_files(tmp_path)
    trainer = make_trainer(path, model__backbone=folder)
    batch = trainer._batch(0)
    record = trainer.train_step()
    windows = [row[:length] for row, length in zip(batch.input_ids, batch.lengths, strict=True)]
    own = [losses_behind(trainer.model.backbone, [0, 1], window)[1:] for window in windows]
    assert record.backbone_loss == pytest.approx(float(torch.cat(own).mean()), rel=1e-4)
    assert record.loss == pytest.approx(record.backbone_loss, rel=1e-3)  # nothing is trained, and memory is empty
    for lane, bank in enumerate(trainer.memories.banks):
        assert bank.token_ids(batch.document_ids[lane]).tolist() == windows[lane].tolist()
        fresh = MemoryBank.for_model(trainer.model, storage_dtype="float16")
        trainer.model.memorize(fresh, windows[lane], "a")
        question = random_ids(12, seed=1)[None]
        with torch.no_grad():
            found = [trainer.model.eval()(question, memory=each).logits for each in (bank, fresh)]
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_kept_features_are_what_is_computed(folder, tmp_path):
    path = make_files(tmp_path)
    kept = {"features__folder": tmp_path / "features", "features__dtype": "float32", "optimization__steps": 3}
    losses = []
    for name, options in (("a", {}), ("b", kept), ("c", kept)):  # the third reads what the second wrote
        trainer = make_trainer(path, model__backbone=folder, output=tmp_path / name, **options)
        losses.append([trainer.train_step().loss for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[1] == losses[2]


# Where they come from --------------------------------------------------------------------------------------------------


def test_they_are_what_the_tokenizer_puts_before_a_text(folder, tmp_path):
    bare = save_tiny_backbone(tmp_path / "bare")
    assert LongMemForCausalLM.from_backbone(bare).config.start_token_ids is None
    assert LongMemForCausalLM.from_backbone(folder).config.start_token_ids == [0, 1]
    assert LongMemForCausalLM.from_backbone(folder, start_token_ids=None).config.start_token_ids is None
    assert LongMemForCausalLM.from_backbone(folder, start_token_ids=[5]).config.start_token_ids == [5]
    loaded = LlamaForCausalLM.from_pretrained(folder)
    assert LongMemForCausalLM.from_backbone(loaded).config.start_token_ids == [0, 1]
    loaded.config.name_or_path = ""
    assert LongMemForCausalLM.from_backbone(loaded).config.start_token_ids is None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert LongMemForCausalLM.from_backbone(loaded, tokenizer=tokenizer).config.start_token_ids == [0, 1]


@pytest.mark.parametrize(
    ("single", "expected"),
    [("$A", None), ("<s> $A", [10]), ("<s> $A </s>", [10]), ("$A </s>", None), ("</s> <s> $A", [11, 10])],
)
def test_only_what_stands_before_a_text_counts(tmp_path, single, expected):
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_backbone(tmp_path))
    names = dict(zip(("<s>", "</s>"), tokenizer.convert_ids_to_tokens([10, 11]), strict=True))
    for written, name in names.items():
        single = single.replace(written, name)
    backend = tokenizer.backend_tokenizer
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in names.values()]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    assert start_of(PreTrainedTokenizerFast(tokenizer_object=backend)) == expected


def test_a_saved_model_keeps_them_and_banks_are_told_apart(model, folder, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    reopened = LongMemForCausalLM.from_pretrained(tmp_path / "saved")
    assert reopened.config.start_token_ids == [0, 1]
    assert reopened.encoder_fingerprint() == model.encoder_fingerprint()
    without = LongMemForCausalLM.from_backbone(folder, start_token_ids=None, **OPTIONS)
    assert without.encoder_fingerprint() != model.encoder_fingerprint()
    assert without.encoder_stamp().recipe["start_token_ids"] == NO_START
    assert without.encoder_stamp().diff(model.encoder_stamp()) == ["start_token_ids"]


def test_a_tokenizer_that_knows_more_tokens_than_the_backbone_gives_none(tmp_path):
    made = save_tiny_backbone(tmp_path / "small", vocab_size=256)
    tokenizer = AutoTokenizer.from_pretrained(made)
    tokenizer.add_special_tokens({"bos_token": "<new>"})
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="<new> $A", special_tokens=[("<new>", 256)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert start_of(tokenizer) == [256]
    assert LongMemForCausalLM.from_backbone(made, tokenizer=tokenizer).config.start_token_ids is None


def test_no_window_of_an_evaluation_is_longer_than_the_backbone_with_them(tmp_path):
    sizes = {"vocab_size": 256, "n_positions": 64, "n_embd": 32, "n_layer": 4, "n_head": 2}
    backbone = GPT2LMHeadModel(GPT2Config(**sizes))
    model = LongMemForCausalLM.from_backbone(backbone, start_token_ids=[0], **OPTIONS).eval()
    with pytest.raises(ValueError, match="`window` must leave 1 of the backbone's 64 positions"):
        make_systems(["backbone"], model, window=64)
    settings = PerplexitySettings(data="none", output="none", window=64, stride=32, systems=("backbone", "off"))
    with pytest.raises(ValueError, match="got 64; 63 would do"):
        settings.validate_for(model)
    with pytest.raises(ValueError, match="`context` must be at most 63 tokens"):
        make_systems(["context-64"], model, window=32)
    ids, cut = random_ids(130), Cut(63, 31)
    view = make_views(["off"], model, ids, cut, {})["off"]
    assert len(score_windows(view, cut.row(0, 2)).losses) == 2


def test_a_window_leaves_room_for_them(tmp_path):
    made = save_tiny_backbone(tmp_path / "small", max_position_embeddings=64)
    beginning(made)
    with pytest.warns(UserWarning, match="`segment_length` is 60"):
        assert LongMemForCausalLM.from_backbone(made).config.segment_length == 60  # whole chunks
    with pytest.raises(ValueError, match="behind 2 `start_token_ids`, got 63"):
        LongMemForCausalLM.from_backbone(made, segment_length=63)
    with pytest.raises(ValueError, match="`start_token_ids` must be ids of the backbone's vocabulary, 0 to 255"):
        LongMemForCausalLM.from_backbone(made, segment_length=32, start_token_ids=[256])


def test_requests_of_the_harness_that_overflow_a_window_begin_with_them(folder, tmp_path, texts_read):
    from lm_eval.api.instance import Instance

    from longmem.evaluation.harness import LongMemLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "~"
    model = LongMemForCausalLM.from_backbone(folder, tokenizer=tokenizer, start_token_ids=[0, 1], **OPTIONS).eval()
    lm = LongMemLM(model, window=16, add_bos_token=True)
    long = some_text(20)
    (found,) = lm.loglikelihood_rolling([Instance("rolling", {}, (long,), 0)])
    lm.loglikelihood([Instance("loglikelihood", {}, (long, " cat"), 0)])
    lm.generate_until([Instance("generate_until", {}, (long, {"until": ["~"], "max_gen_toks": 2}), 0)])
    assert found < 0
    own = [ids for ids in texts_read if ids[0] != tokenizer.eos_token_id]  # `hf` itself begins a text so
    assert own
    assert all(ids[:2] == [0, 1][: len(ids)] for ids in own)
