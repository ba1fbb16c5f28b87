"""Every architecture of the table passes every column, and what can't be supported says why."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model import architectures
from model.architectures import ARCHITECTURES, FORMS, REFUSED, build
from model.conftest import SETTINGS
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from longmem import LongMemForCausalLM, MemoryBank
from longmem.backbone.cache_names import cache_of
from longmem.backbone.capture import Backbone
from longmem.backbone.structure import UnsupportedBackboneError
from longmem.evaluation.systems import Question, answer_questions


@dataclasses.dataclass
class Case:
    """A model with a filled bank, and its logits."""

    model_type: str
    backbone: PreTrainedModel
    model: LongMemForCausalLM
    bank: MemoryBank
    document: torch.Tensor
    input_ids: torch.Tensor
    logits: torch.Tensor


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def case(request: pytest.FixtureRequest) -> Case:
    backbone = build(request.param)
    model = LongMemForCausalLM.from_backbone(backbone, **SETTINGS, **FORMS.get(request.param, {})).eval()
    tokens = torch.randint(0, 97, (200,), generator=torch.Generator().manual_seed(5))
    bank = MemoryBank.for_model(model, storage_dtype="float32")
    model.memorize(bank, tokens[:152], document_id="a")
    input_ids = tokens[152:].view(2, 24)
    with torch.no_grad():
        logits = model(input_ids, memory=bank).logits
        return Case(request.param, backbone, model, bank, tokens[:152], input_ids, logits)


@torch.no_grad()
def test_with_an_empty_memory_it_is_the_backbone_and_memory_changes_it(case):
    plain = case.backbone(case.input_ids).logits
    for memory in (None, case.bank.empty_like()):
        torch.testing.assert_close(case.model(case.input_ids, memory=memory).logits, plain, rtol=0, atol=1e-5)
    assert (case.logits - plain).abs().max() > 1e-3


@torch.no_grad()
def test_no_logit_depends_on_later_tokens(case):
    changed = case.input_ids.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 97
    logits = case.model(changed, memory=case.bank).logits
    torch.testing.assert_close(logits[:, :12], case.logits[:, :12], rtol=1e-5, atol=1e-5)
    assert (logits[:, 12] - case.logits[:, 12]).abs().max() > 1e-3


@torch.no_grad()
def test_decoding_with_a_cache_equals_the_full_forward(case):
    cache, logits = None, []
    for part in (case.input_ids[:, :10], *case.input_ids[:, 10:].split(1, dim=1)):
        output = case.model(part, memory=case.bank, cache=cache, use_cache=True)
        cache = cache_of(output)
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), case.logits, rtol=1e-4, atol=1e-4)


def test_generation_without_memory_is_the_backbones(case):
    """Every architecture prepares the inputs of its own steps; both start from the same mask with padding on the left."""
    mask = torch.ones_like(case.input_ids)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "output_logits": True}
    plain, found = (
        each.generate(case.input_ids, return_dict_in_generate=True, **options) for each in (case.backbone, case.model)
    )
    assert torch.equal(found.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_text_stored_from_another_position_is_read_the_same(case):
    """Rotary models are encoded at other positions; others have their keys stored as the model makes them."""
    structure = case.model._backbone.structure.layers[case.model.config.memory_layers[0]]
    if structure.rotation is None:
        assert structure.rotary is None
        return
    few = case.document[None, :16]  # four chunks, all of them read: no ranking that rounding could turn
    logits = []
    for shift in (0, 11):
        bank = case.bank.empty_like()
        keys, values = case.model.encode(few, position_ids=torch.arange(16)[None] + shift)
        bank.add("a", [k[0] for k in keys], [v[0] for v in values])
        logits.append(case.model(case.input_ids, memory=bank).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-4)


def test_only_the_side_network_gets_gradients(case):
    case.model.train()
    case.model(case.input_ids, memory=case.bank, labels=case.input_ids).loss.backward()
    case.model.eval()
    trained = {name for name, parameter in case.model.named_parameters() if parameter.grad is not None}
    assert any(name.endswith("memory_bias") for name in trained)
    assert all(name.startswith("side_network.") for name in trained)


@torch.no_grad()
def test_a_saved_model_comes_back_the_same(case, tmp_path):
    biases = [layer.memory_bias for layer in case.model.side_network.layers if layer.memory_bias is not None]
    for bias in biases:
        bias += 1
    case.model.save_pretrained(tmp_path)
    loaded = LongMemForCausalLM.from_pretrained(tmp_path, backbone=case.backbone)
    logits = loaded(case.input_ids, memory=case.bank).logits
    torch.testing.assert_close(logits, case.model(case.input_ids, memory=case.bank).logits, rtol=0, atol=1e-6)
    assert (logits - case.logits).abs().max() > 1e-4
    for bias in biases:
        bias -= 1


@torch.no_grad()
def test_the_language_model_inside_a_multimodal_one_is_found():
    """Its layers are told from those of the vision tower, which has as many."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    text = architectures.tiny_config("gemma3_text", {}).to_dict()
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config={**sizes, "image_size": 28, "patch_size": 14}
    )
    backbone = AutoModelForCausalLM.from_config(config).eval()
    assert type(backbone).__name__ == "Gemma3ForConditionalGeneration"
    model = LongMemForCausalLM.from_backbone(backbone, **SETTINGS).eval()
    bank = MemoryBank.for_model(model)
    tokens = torch.randint(0, 97, (1, 60), generator=torch.Generator().manual_seed(5))
    model.memorize(bank, tokens[0, :36], document_id="a")
    plain = backbone(tokens[:, 36:]).logits
    torch.testing.assert_close(model(tokens[:, 36:]).logits, plain, rtol=0, atol=1e-5)
    assert (model(tokens[:, 36:], memory=bank).logits - plain).abs().max() > 1e-4


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_what_cannot_be_supported_is_refused_at_construction(model_type):
    options, missing = REFUSED[model_type]
    with pytest.raises(UnsupportedBackboneError, match=missing):
        Backbone(build(model_type, options))


def test_a_memory_layer_whose_keys_cannot_be_stored_is_refused():
    with pytest.raises(UnsupportedBackboneError, match=r"`memory_layers` must be .* \[3\]"):
        LongMemForCausalLM.from_backbone(build("llama4_text"), **SETTINGS)


SUPPORTED = Path(__file__).parents[2] / "docs" / "supported-models.md"


def refuse_another_transformers() -> None:
    """Skip where the docs list what another version has."""
    constraints = (SUPPORTED.parents[1] / "constraints.txt").read_text(encoding="utf-8")
    if f"transformers=={transformers.__version__}\n" not in constraints:
        pytest.skip("the docs list what the tested transformers has, and this is another")


def test_the_docs_describe_this_architecture(case):
    refuse_another_transformers()
    row = architectures.describe(case.model_type, case.model._backbone)
    assert row in SUPPORTED.read_text(encoding="utf-8").splitlines(), "run `make docs`"


def test_the_docs_list_these_architectures_and_no_others():
    refuse_another_transformers()
    text = SUPPORTED.read_text(encoding="utf-8")
    rows = [line for line in text.partition("## Refused")[0].splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == sorted(ARCHITECTURES)
    assert text == architectures.document(rows), "run `make docs`"


@torch.no_grad()
def test_continuations_that_share_a_context_have_the_likelihoods_of_full_passes(case):
    context, rest = case.input_ids[0, :12].tolist(), case.input_ids[1].tolist()
    questions = [Question(rest[:2], [rest[2:4], rest[4:8]]), Question([], [rest[8:13]])]

    def forward(tokens: torch.Tensor, **options: Any) -> Any:
        return case.model(tokens, memory=case.bank, **options)

    for question, answer in zip(questions, answer_questions(forward, context, questions), strict=True):
        for ids, found in zip(question.candidates, answer.candidates, strict=True):
            before = [*context, *question.token_ids]
            logits = forward(torch.tensor([[*before, *ids]])).logits[0, len(before) - 1 : -1].float()
            expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(found.logprobs), expected, rtol=1e-4, atol=1e-4)
