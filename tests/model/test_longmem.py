"""The whole model: identity start, reading, decoding, isolation, gradients."""

import pytest
import torch
from model.conftest import SETTINGS, build_backbone

from longmem import LongMemForCausalLM, MemoryBank
from longmem.backbone.cache_names import cache_of

FORMS = [
    dict(),
    dict(layer_reduction_factor=2),
    dict(memory_layers=[1, 2, 3]),
    dict(fusion="gated"),
    dict(residual="paper", init="identity"),
    dict(residual="paper", init="identity", layer_reduction_factor=2, fusion="gated"),
    dict(
        residual="paper",
        init="identity",
        layer_reduction_factor=2,
        side_layer_offset=1,
        final_norm="side",
        memory_layers=[3],
    ),
]
by_form = pytest.mark.parametrize("form", FORMS, ids=str)


def make(backbone, document=None, **form):
    model = LongMemForCausalLM.from_backbone(backbone, **{**SETTINGS, **form}).eval()
    bank = MemoryBank.for_model(model)
    if document is not None:
        model.memorize(bank, document, document_id="a")
    return model, bank


@by_form
@torch.no_grad()
def test_with_nothing_in_memory_the_model_is_the_backbone(backbone, input_ids, document, form):
    expected = backbone(input_ids).logits
    model, bank = make(backbone, **form)
    for memory in (None, bank, [bank, bank]):
        torch.testing.assert_close(model(input_ids, memory=memory).logits, expected, rtol=0, atol=1e-5)
    model.memorize(bank, document, document_id="a")
    change = (model(input_ids, memory=bank).logits - expected).abs().max()
    if form.get("init") == "identity":
        assert change <= 1e-5  # its scales start at zero
        for layer in model.side_network.layers:
            layer.output_scale.fill_(0.5)
        change = (model(input_ids, memory=bank).logits - expected).abs().max()
    assert change > 1e-3


@torch.no_grad()
def test_at_factor_one_reading_all_is_attending_to_more_context(llama):
    """What is read is what the backbone itself would attend to: same keys, same values, zero bias, exact distance.

    One layer, one chunk per token, everything retrieved: a query at distance d from the stored token must get the logits
    of the plain model over both parts, for the last memory token and the first local one.
    """
    llama = build_backbone("llama", num_hidden_layers=1)
    text = torch.randint(0, 97, (1, 2))
    form = dict(chunk_size=1, num_retrieved_tokens=1, memory_distance=1, memory_bias_init=0.0, memory_layers=[0])
    model, _ = make(llama, **form)
    bank = MemoryBank.for_model(model, storage_dtype="float32")
    model.memorize(bank, text[0, :1], document_id="a")
    torch.testing.assert_close(
        model(text[:, 1:], memory=bank).logits[:, 0], llama(text).logits[:, 1], rtol=1e-4, atol=1e-5
    )
    assert (model(text[:, 1:]).logits[:, 0] - llama(text).logits[:, 1]).abs().max() > 1e-3


@by_form
@pytest.mark.parametrize("with_keys", [True, False])
@torch.no_grad()
def test_a_cached_step_equals_the_full_forward(backbone, input_ids, document, form, with_keys):
    model, bank = make(backbone, document, **form)
    full = model(input_ids, memory=bank).logits
    cache, logits = None, []
    for part in (input_ids[:, :10], input_ids[:, 10:11], input_ids[:, 11:15], *input_ids[:, 15:].split(1, dim=1)):
        output = model(part, memory=bank, cache=cache, use_cache=True, output_memory_keys=with_keys)
        cache = cache_of(output)
        logits.append(output.logits)
        if with_keys:
            assert output.memory_keys[0].shape[2] == part.shape[1]  # only the new tokens' keys
    torch.testing.assert_close(torch.cat(logits, dim=1), full, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_keys_cannot_be_asked_for_behind_tokens_for_which_their_layers_did_not_run(llama, input_ids, document):
    model, _ = make(llama, document)
    cache = cache_of(model(input_ids[:, :10], use_cache=True))
    with pytest.raises(
        ValueError, match="`output_memory_keys` or `config.num_neighbours` must be set from the first call"
    ):
        model(input_ids[:, 10:], cache=cache, output_memory_keys=True)


@torch.no_grad()
def test_only_layers_run_whose_output_is_needed(llama, input_ids, document):
    model, bank = make(llama, document)
    ran = []
    for number, layer in enumerate(model.backbone.model.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    model(input_ids, memory=bank)
    assert ran == list(range(model.side_network.entry))
    ran.clear()
    model(input_ids, memory=bank, output_memory_keys=True)
    assert ran == list(range(max(model.config.memory_layers) + 1))


@torch.no_grad()
def test_the_cache_may_be_given_under_its_old_name(llama, input_ids, document):
    model, bank = make(llama, document)
    start, rest = input_ids[:, :10], input_ids[:, 10:]
    expected = model(rest, memory=bank, cache=cache_of(model(start, memory=bank, use_cache=True))).logits
    found = model(rest, memory=bank, past_key_values=cache_of(model(start, memory=bank, use_cache=True))).logits
    assert torch.equal(found, expected)
    assert (found - model(rest, memory=bank).logits).abs().max() > 1e-3


@torch.no_grad()
def test_it_is_causal_with_memory(backbone, input_ids, document):
    model, bank = make(backbone, document)
    changed = input_ids.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 97
    one, other = model(input_ids, memory=bank).logits, model(changed, memory=bank).logits
    torch.testing.assert_close(one[:, :12], other[:, :12], rtol=1e-5, atol=1e-5)
    assert (one[:, 12] - other[:, 12]).abs().max() > 1e-3


def test_greedy_generation_equals_recomputing_every_step(backbone, input_ids, document):
    model, bank = make(backbone, document)
    prompt = input_ids[:1, :6]
    generated = model.generate(prompt, memory=bank, max_new_tokens=12, do_sample=False)
    expected = prompt
    with torch.no_grad():
        for _ in range(12):
            best = model(expected, memory=bank).logits[:, -1:].argmax(-1)
            expected = torch.cat([expected, best], dim=1)
    assert generated.tolist() == expected.tolist()


def test_sampling_and_beams_use_the_memory(llama, input_ids, document):
    model, bank = make(llama, document)
    for options in (dict(do_sample=True, top_k=5), dict(num_beams=3, do_sample=False)):
        torch.manual_seed(0)
        first = model.generate(input_ids, memory=bank, max_new_tokens=16, **options)
        torch.manual_seed(0)
        assert torch.equal(first, model.generate(input_ids, memory=bank, max_new_tokens=16, **options))
        torch.manual_seed(0)
        assert not torch.equal(first, model.generate(input_ids, max_new_tokens=16, **options))


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("shared", [False, True], ids=["own banks", "shared bank"])
@torch.no_grad()
def test_left_padded_rows_generate_as_they_would_alone(backbone, input_ids, document, num_beams, shared):
    model, bank = make(backbone, document)
    other = bank if shared else bank.empty_like()
    model.memorize(other, document.flip(0), document_id="b")
    prompts = [input_ids[0, :9], input_ids[1, :14]]
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[0, :5] = 0
    padded = torch.stack([torch.cat([torch.zeros(5, dtype=torch.long), prompts[0]]), prompts[1]])
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, num_beams=num_beams)
    together = model.generate(padded, attention_mask=mask, memory=bank if shared else [bank, other], **options)
    for row, (prompt, own) in enumerate(zip(prompts, [bank, other], strict=True)):
        alone = model.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)).long(), memory=own, **options)
        assert together[row, -6:].tolist() == alone[0, -6:].tolist()


@torch.no_grad()
def test_what_one_row_stores_is_invisible_to_the_other(llama, input_ids, document):
    model, bank = make(llama, document)
    before = model(input_ids, memory=[bank, bank.empty_like()]).logits
    bank.delete("a")
    model.memorize(bank, document.flip(0), document_id="a")
    after = model(input_ids, memory=[bank, bank.empty_like()]).logits
    torch.testing.assert_close(before[1], after[1], rtol=0, atol=0)
    assert (before[0] - after[0]).abs().max() > 1e-3


@torch.no_grad()
def test_a_selection_of_documents_reads_as_a_bank_of_these_alone(llama, input_ids, document):
    model, bank = make(llama, document)
    alone = model(input_ids, memory=bank).logits
    model.memorize(bank, document.flip(0), document_id="b")
    torch.testing.assert_close(model(input_ids, memory=bank.select(["a"])).logits, alone, rtol=1e-5, atol=1e-5)
    assert (model(input_ids, memory=bank).logits - alone).abs().max() > 1e-3


@torch.no_grad()
def test_forward_reads_and_never_writes(llama, input_ids, document):
    model, bank = make(llama, document)
    before = bank.documents()
    output = model(input_ids, memory=bank, labels=input_ids, output_memory_reads=True, output_memory_keys=True)
    assert bank.documents() == before
    keys, values = model.encode(input_ids)
    for returned, encoded in zip([*output.memory_keys, *output.memory_values], [*keys, *values], strict=True):
        torch.testing.assert_close(returned, encoded, rtol=0, atol=0)
    (read,) = output.memory_reads
    assert read.rows.shape == (2, 4, 24, 4)
    assert {place.document_id for place in bank.locate(read.rows)} == {"a"}
    assert ((read.memory_share > 0) & (read.memory_share < 1)).all()
    logits = output.logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, input_ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


@by_form
def test_only_the_side_network_is_trained(backbone, input_ids, document, form):
    model, bank = make(backbone, document, **form)
    model.train()
    model(input_ids, memory=bank, labels=input_ids).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained
    assert all(name.startswith("side_network.") for name in trained)
    biases = [layer.memory_bias for layer in model.side_network.layers if layer.memory_bias is not None]
    if form.get("init") != "identity":  # there the scale is zero, so only the scale itself learns at first
        assert all(bias.grad.abs().max() > 0 for bias in biases)
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert not model.backbone.training


def test_the_gradient_of_the_whole_model_is_right(llama, input_ids, document):
    """Against finite differences, for a memory bias and for an output projection of the reading layer."""
    model, _ = make(llama, memory_layers=[2])
    bank = MemoryBank.for_model(model, storage_dtype="float32")
    model.memorize(bank, document, document_id="a")
    layer = next(layer for layer in model.side_network.layers if layer.memory_bias is not None)
    weight = layer.layer.self_attn.o_proj.weight
    loss = model(input_ids, memory=bank, labels=input_ids).loss
    gradients = torch.autograd.grad(loss, [layer.memory_bias, weight])
    for parameter, gradient, entry in [(layer.memory_bias, gradients[0], (1,)), (weight, gradients[1], (3, 5))]:
        losses, step = [], 0.03
        for sign in (1, -1):
            with torch.no_grad():
                parameter[entry] += sign * step
                losses.append(model(input_ids, memory=bank, labels=input_ids).loss)
                parameter[entry] -= sign * step
        numeric = (losses[0] - losses[1]) / (2 * step)
        torch.testing.assert_close(gradient[entry].double(), numeric.double(), rtol=3e-2, atol=3e-5)


def test_training_lowers_the_loss_by_memory(llama, document):
    """Text that repeats what is stored: the side network learns to read it, the backbone does not move."""
    model, bank = make(llama, document, memory_layers=[1, 2])
    before = [parameter.clone() for parameter in model.backbone.parameters()]
    window = document[None, 32:64]
    optimizer = torch.optim.AdamW(model.side_network.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model(window, memory=bank, labels=window).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for old, new in zip(before, model.backbone.parameters(), strict=True):
        assert torch.equal(old, new)


@torch.no_grad()
def test_paper_residual_is_the_papers_equation(llama, input_ids):
    """x <- block_i(x) + (h[R(i+1)] - h[R i]), every block a copy of layer R i, the last h before or after the norm."""
    hidden = llama(input_ids, output_hidden_states=True).hidden_states
    tail = {}
    llama.model.layers[3].register_forward_hook(lambda module, args, output: tail.update(raw=output))
    llama(input_ids)
    for states, last in (("pre_norm", tail["raw"]), ("post_norm", hidden[4])):
        model, _ = make(llama, residual="paper", layer_reduction_factor=2, residual_states=states)
        position = llama.model.rotary_emb(hidden[0], torch.arange(24)[None])
        first = llama.model.layers[0](hidden[0], position_embeddings=position) + hidden[2] - hidden[0]
        second = llama.model.layers[2](first, position_embeddings=position) + last - hidden[2]
        expected = llama.lm_head(llama.model.norm(second))
        torch.testing.assert_close(model(input_ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_side_network_may_differ_from_the_backbone_in_some_settings(backbone, input_ids, document):
    """Same shapes: the backbone's weights; another shape: new weights; the backbone itself stays as it was."""
    config = backbone.config
    width = next(name for name in ("intermediate_size", "n_inner") if hasattr(config, name))
    eps = next(name for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon") if hasattr(config, name))
    form = dict(residual="paper", layer_reduction_factor=2, final_norm="side", fusion="gated")
    same, bank = make(backbone, document, **form, side_layer_options={width: getattr(config, width)})
    plain, _ = make(backbone, **form)
    logits = plain(input_ids, memory=bank).logits
    torch.testing.assert_close(same(input_ids, memory=bank).logits, logits, rtol=0, atol=0)
    other, _ = make(backbone, **form, side_layer_options={eps: 0.1})
    for name, weight in other.side_network.state_dict().items():
        assert torch.equal(weight, plain.side_network.state_dict()[name])
    assert (other(input_ids, memory=bank).logits - logits).abs().max() > 1e-3
    wide, _ = make(backbone, **form, side_layer_options={width: 200})
    shapes = [parameter.shape for parameter in wide.side_network.parameters()]
    assert any(200 in shape or 400 in shape for shape in shapes)
    loss = wide.train()(input_ids, memory=bank, labels=input_ids).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in wide.side_network.parameters())
    assert getattr(backbone.config, eps) != 0.1


@torch.no_grad()
def test_fewer_side_layers_than_the_depth_allows(llama, input_ids, document):
    """The paper's form with three of seven layers to a side layer: what lies above the last group is left out."""
    deep = build_backbone("llama", num_hidden_layers=7)
    model, bank = make(deep, document, residual="paper", layer_reduction_factor=3, num_side_layers=2, memory_layers=[5])
    hidden = deep(input_ids, output_hidden_states=True).hidden_states
    position = deep.model.rotary_emb(hidden[0], torch.arange(24)[None])
    first = deep.model.layers[0](hidden[0], position_embeddings=position) + hidden[3] - hidden[0]
    second = deep.model.layers[3](first, position_embeddings=position) + hidden[6] - hidden[3]
    expected = deep.lm_head(deep.model.norm(second))
    torch.testing.assert_close(model(input_ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert (model(input_ids, memory=bank).logits - expected).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_backbones_read_memory(dtype, input_ids, document):
    reference, full_bank = make(build_backbone("llama"), document)
    model, bank = make(build_backbone("llama").to(dtype), document)
    logits = model(input_ids, memory=bank).logits
    assert logits.dtype == dtype
    expected = reference(input_ids, memory=full_bank).logits
    assert (logits.float() - expected).abs().mean() < 0.1 * expected.abs().mean()
