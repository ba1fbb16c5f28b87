"""Memory heads: which are stored, searched and read; the null slot beside what was found, and the distance of each."""

import math
from types import SimpleNamespace

import pytest
import torch
from model.conftest import SETTINGS, build_backbone
from safetensors.torch import save_file

from longmem import LongMemConfig, LongMemForCausalLM, MemoryBank
from longmem.backbone.cache_names import cache_of
from longmem.backbone.structure import reach_of
from longmem.model.attention import sees_itself_alone

LAYERS = [1, 3]


def make(document, **fields):
    torch.manual_seed(0)
    settings = {**SETTINGS, "memory_layers": LAYERS, "layer_reduction_factor": 1, **fields}
    model = LongMemForCausalLM.from_backbone(build_backbone("llama"), **settings).eval()
    bank = MemoryBank.for_model(model)
    model.memorize(bank, document, document_id="a")
    return model, bank


@torch.no_grad()
def test_all_heads_named_are_all_heads(input_ids, document):
    plain, bank = make(document)
    named, other = make(document, memory_heads=[[0, 1], [0, 1]])
    assert torch.equal(named(input_ids, memory=other).logits, plain(input_ids, memory=bank).logits)


@torch.no_grad()
def test_heads_that_are_left_out_are_neither_stored_nor_read(input_ids, document):
    few, small = make(document, memory_heads=[[1], [0]])
    every, bank = make(document)
    for layer, closed in zip(every.side_network.layers, (slice(0, 2), None, slice(2, 4)), strict=True):
        if layer.memory_bias is not None:
            layer.memory_bias[closed] = -1e9
    output = few(input_ids, memory=small, output_memory_reads=True, output_memory_keys=True)
    torch.testing.assert_close(output.logits, every(input_ids, memory=bank).logits, rtol=1e-5, atol=1e-5)
    assert [tensor.shape[1] for tensor in (*output.memory_keys, *output.memory_values)] == [1, 1, 1, 1]
    assert [tuple(place.rows.shape[:2]) for place in output.memory_reads] == [(2, 4), (2, 4)]
    assert (output.memory_reads[0].rows[:, :2] == -1).all()
    assert (output.memory_reads[0].rows[:, 2:] >= 0).any()
    assert small.nbytes < 0.6 * bank.nbytes


def test_other_heads_are_another_encoder(document):
    few, small = make(document, memory_heads=[[1], [0]])
    every, bank = make(document)
    assert few.encoder_fingerprint() != every.encoder_fingerprint()
    with pytest.raises(ValueError, match="memory_heads"):
        MemoryBank.for_model(every).ready_for(few)


def test_heads_and_null_slot_are_saved_and_trained(input_ids, document, tmp_path):
    backbone = build_backbone("llama")
    backbone.save_pretrained(tmp_path / "backbone")
    settings = {**SETTINGS, "memory_layers": LAYERS, "layer_reduction_factor": 1}
    model = LongMemForCausalLM.from_backbone(
        str(tmp_path / "backbone"), **settings, memory_heads=[[1], [0]], memory_null_init=0.5, lora={"rank": 2}
    )
    bank = MemoryBank.for_model(model)
    model.memorize(bank, document, document_id="a")
    model(input_ids, memory=bank, labels=input_ids).loss.backward()
    first = model.side_network.layers[0]
    reads = torch.tensor([False, False, True, True])
    assert torch.equal(first.memory_null.grad != 0, reads)
    assert torch.equal(first.memory_bias.grad != 0, reads)
    with torch.no_grad():
        first.memory_null.fill_(-0.25)
    model.save_pretrained(tmp_path / "saved")
    again = LongMemForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.config.memory_heads == [[1], [0]]
    assert torch.equal(again.eval()(input_ids, memory=bank).logits, model.eval()(input_ids, memory=bank).logits)


@torch.no_grad()
def test_a_null_slot_far_below_changes_nothing_and_one_far_above_closes_memory(input_ids, document):
    plain, bank = make(document)
    expected, off = plain(input_ids, memory=bank).logits, plain(input_ids).logits
    for start, logits in ((-1e4, expected), (1e4, off)):
        model, other = make(document, memory_null_init=start)
        torch.testing.assert_close(model(input_ids, memory=other).logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"memory_heads": [[0]]}, "a list for each of the 2 `memory_layers`"),
        ({"memory_heads": [[0], []]}, "none of them empty"),
        ({"memory_heads": [[0], [2]]}, "from 0 to 1"),
        ({"memory_heads": [[1, 0], [0]]}, "ascending"),
        ({"memory_null_init": 0.0, "fusion": "gated"}, '`memory_null_init` must come with `fusion="joint"`'),
    ],
)
def test_settings_that_break_a_rule(fields, words):
    backbone = build_backbone("llama")
    with pytest.raises(ValueError, match=words):
        LongMemConfig(
            backbone_config=backbone.config,
            **{**SETTINGS, "memory_layers": LAYERS, "layer_reduction_factor": 1, **fields},
        )


@torch.no_grad()
def test_tokens_behind_the_first_that_are_alike_cannot_be_found_either(document):
    """All before a copy of the first token is that token, so its state is the same, and where one is a sink the other is."""
    plain, _ = make(document, chunk_size=1, num_retrieved_tokens=4)
    model, _ = make(document, chunk_size=1, num_retrieved_tokens=4, forget_sinks=True)
    ids = torch.tensor([[5, 5, 5, 9, 5, 7], [5, 6, 6, 9, 5, 7], [8, 8, 8, 8, 8, 8]])
    runs = [3, 1, 6]
    keys, stored = plain.encode(ids)[0], model.encode(ids)[0]
    for lane, run in enumerate(runs):
        for before, after in zip(keys, stored, strict=True):
            torch.testing.assert_close(
                before[lane, :, :run], before[lane, :, :1].expand(-1, run, -1), rtol=1e-4, atol=1e-5
            )
            assert not after[lane, :, :run].any()
            assert torch.equal(after[lane, :, run:], before[lane, :, run:])
            assert after[lane, :, run:].any() or run == 6


@torch.no_grad()
def test_the_first_token_of_a_window_cannot_be_found(input_ids, document):
    plain, bank = make(document, chunk_size=1, num_retrieved_tokens=4)
    model, other = make(document, chunk_size=1, num_retrieved_tokens=4, forget_sinks=True)
    for position, layer in enumerate(LAYERS):
        keys, stored = (each.encode(document[None, :32]) for each in (plain, model))
        assert not stored[0][position][:, :, 0].any()
        assert torch.equal(stored[0][position][:, :, 1:], keys[0][position][:, :, 1:])
        assert torch.equal(stored[1][position], keys[1][position])
        rows = torch.arange(bank.num_chunks).expand(2, -1)
        zero = ~other.gather(layer, rows, other.search(layer, torch.ones(2, 1, 8), 1).generation)[0].any(dim=-1)
        assert zero.nonzero()[:, 1].unique().tolist() == [0, 32, 64, 96, 128]  # `segment_length` is 32
    output = model(input_ids, output_memory_keys=True, use_cache=True)
    assert not output.memory_keys[0][:, :, 0].any()
    after = model(input_ids[:, :3], cache=cache_of(output), output_memory_keys=True)
    assert after.memory_keys[0][:, :, 0].any()  # no window begins here
    assert model.encoder_fingerprint() != plain.encoder_fingerprint()


@pytest.mark.parametrize("kind", [{}, {"fusion": "gated"}, {"search": "token"}], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_the_first_token_of_a_text_reads_where_it_may(input_ids, document, kind, attention):
    backbone = build_backbone("llama")
    backbone.set_attn_implementation(attention)
    models = {
        reads: LongMemForCausalLM.from_backbone(
            backbone, **{**SETTINGS, "memory_layers": LAYERS, "layer_reduction_factor": 1, **kind, "start_reads": reads}
        ).eval()
        for reads in (True, False)
    }
    for reads, model in models.items():
        bank = MemoryBank.for_model(model)
        model.memorize(bank, document, "d")
        off, on = model(input_ids).logits, model(input_ids, memory=bank, output_memory_reads=True)
        assert ((on.logits[:, 0] - off[:, 0]).abs().max() > 1e-4) == reads
        assert (on.logits[:, 1:] - off[:, 1:]).abs().max() > 1e-4
        for read in on.memory_reads:
            assert (read.rows[:, :, 0] >= 0).any() == reads
            assert (read.rows[:, :, 1] >= 0).any()
            assert bool(read.chunk_weights[:, :, 0].any()) == bool(read.memory_share[:, :, 0].any()) == reads
        # Behind padding the first token is as much the first, and behind a cache no token is.
        padding = torch.nn.functional.pad(input_ids, (3, 0))
        mask = torch.nn.functional.pad(torch.ones_like(input_ids), (3, 0))
        padded = model(padding, attention_mask=mask, memory=bank).logits[:, 3:]
        torch.testing.assert_close(padded, on.logits, rtol=1e-4, atol=1e-4)
        start = model(input_ids[:, :1], memory=bank, use_cache=True)
        rest = model(input_ids[:, 1:], memory=bank, cache=cache_of(start)).logits
        torch.testing.assert_close(torch.cat([start.logits, rest], 1), on.logits, rtol=1e-4, atol=1e-4)


def test_who_sees_no_other_token():
    queries, keys = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 3, 8)
    first = [[True, False, False]] * 2
    assert sees_itself_alone(queries, keys, None).tolist() == first
    assert not sees_itself_alone(queries, torch.zeros(2, 2, 5, 8), None).any()
    assert sees_itself_alone(queries[:, :, :1], keys[:, :, :1], None).all()
    # Two axes, and four: the first lane has padding before its tokens.
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    expected = [[True, True, False], [True, False, False]]
    assert sees_itself_alone(queries, keys, mask).tolist() == expected
    flags = torch.ones(3, 3, dtype=torch.bool).tril() & mask.bool()[:, None, None, :]
    assert sees_itself_alone(queries, keys, flags).tolist() == expected
    added = torch.zeros(flags.shape).masked_fill(~flags, torch.finfo(torch.float32).min)
    assert sees_itself_alone(queries, keys, added).tolist() == expected
    # Two texts packed into one row: each has a first token. One mask serves all lanes.
    packed = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1]]).bool()[None, None]
    assert sees_itself_alone(queries, keys, packed).tolist() == [[True, False, True]] * 2


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
# Rotations of all of a head, of its first part, of pairs side by side, scaled, of layers that slide, and none.
DISTANT = [
    ("llama", {}),
    ("llama", {"rope_parameters": YARN, "max_position_embeddings": 256}),
    *(("gpt_neox", {}), ("gemma2", {}), ("qwen3", {}), ("gpt2", {})),
]


@pytest.mark.parametrize("choice_per", ["head", "group"])
@pytest.mark.parametrize(("model_type", "changes"), DISTANT, ids=str)
@torch.no_grad()
def test_each_head_reads_at_its_own_distance(input_ids, document, model_type, changes, choice_per):
    backbone = build_backbone(model_type, **changes)
    settings = {**SETTINGS, "memory_layers": LAYERS, "layer_reduction_factor": 1, "choice_per": choice_per}
    # All of the memory is read, so that what is chosen does not depend on the distance.
    settings |= {"chunk_size": 1, "num_retrieved_tokens": 150}
    of_model, of_heads, far = (
        LongMemForCausalLM.from_backbone(backbone, **{**settings, **fields}).eval()
        for fields in ({}, {"distance_per": "head"}, {"memory_distance": 40})
    )
    bank = MemoryBank.for_model(of_model, index="flat")
    of_model.memorize(bank, document, "d")
    reads = {name: model(input_ids, memory=bank).logits for name, model in (("near", of_model), ("far", far))}
    torch.testing.assert_close(of_heads(input_ids, memory=bank).logits, reads["near"], rtol=1e-4, atol=1e-4)
    learned = [layer.memory_log_distance for layer in of_heads.side_network.layers if layer.memory_bias is not None]
    if model_type == "gpt2":  # no rotary model: a distance means nothing to it
        assert learned == [None, None]
        return
    assert (reads["near"] - reads["far"]).abs().max() > 1e-3
    # At 40 tokens all heads are those of a model at 40; between, one head is moved alone, by fractions of a token.
    for log_distance in learned:
        log_distance.fill_(math.log(40))
    torch.testing.assert_close(of_heads(input_ids, memory=bank).logits, reads["far"], rtol=1e-4, atol=1e-4)
    for log_distance in learned[1:]:
        log_distance[0] = math.log(8.5)
    assert (of_heads(input_ids, memory=bank).logits - reads["far"]).abs().max() > 1e-5


@pytest.mark.parametrize(("model_type", "layer", "window"), [("gemma2", 2, 16), ("gemma2", 1, None), ("gemma2", 0, 16)])
def test_nothing_is_read_from_farther_than_a_layer_sees(input_ids, document, model_type, layer, window):
    backbone = build_backbone(model_type, sliding_window=16)
    settings = {**SETTINGS, "memory_layers": [layer], "layer_reduction_factor": 1, "chunk_size": 1}
    settings |= {"num_retrieved_tokens": 150}
    kinds = {"memory_distance": 15}, {"memory_distance": 40}, {"memory_distance": 40, "distance_per": "head"}
    *models, of_heads = (LongMemForCausalLM.from_backbone(backbone, **{**settings, **kind}).eval() for kind in kinds)
    (log_distance,) = [
        each.memory_log_distance for each in of_heads.side_network.layers if each.memory_log_distance is not None
    ]
    assert log_distance.exp().tolist() == pytest.approx([15.0 if window else 40.0] * len(log_distance))
    bank = MemoryBank.for_model(models[0], index="flat")
    models[0].memorize(bank, document, "d")
    with torch.no_grad():
        near, far = (model(input_ids, memory=bank).logits for model in models)
        assert torch.equal(near, far) == bool(window)
        log_distance.fill_(math.log(40))
    output = of_heads(input_ids, memory=bank, labels=input_ids)
    torch.testing.assert_close(output.logits.detach(), far, rtol=1e-4, atol=1e-4)
    output.loss.backward()
    assert (log_distance.grad != 0).all()  # a head that was driven beyond may come back


def test_how_far_layers_see_is_what_their_configuration_says():
    assert reach_of(SimpleNamespace(layer_types=None, sliding_window=16), 3) == 15  # as Mistral has it
    assert reach_of(SimpleNamespace(layer_types=None, sliding_window=None), 0) is None
    mixed = ["sliding_attention", "full_attention", "chunked_attention"]
    own = SimpleNamespace(layer_types=mixed, sliding_window=16, attention_chunk_size=8)
    assert [reach_of(own, number) for number in range(3)] == [15, None, 7]


def test_distances_of_heads_are_learned_and_saved(input_ids, document, tmp_path):
    backbone = build_backbone("llama")
    backbone.save_pretrained(tmp_path / "backbone")
    model = LongMemForCausalLM.from_backbone(
        str(tmp_path / "backbone"), **SETTINGS, memory_layers=LAYERS, memory_heads=[[1], [0]], lora={"rank": 2},
        layer_reduction_factor=1, distance_per="head", chunk_size=1,
    )  # fmt: skip
    model.config.num_retrieved_tokens = 150
    bank = MemoryBank.for_model(model, index="flat")
    model.memorize(bank, document, "d")
    log_distance = model.side_network.layers[0].memory_log_distance
    loss = model(input_ids, memory=bank, labels=input_ids).loss
    loss.backward()
    assert torch.equal(log_distance.grad != 0, torch.tensor([False, False, True, True]))  # of the heads that read
    step, losses = 1e-2, []
    with torch.no_grad():
        for _ in range(2):
            log_distance[2] += step
            losses.append(model(input_ids, memory=bank, labels=input_ids).loss.item())
            log_distance[2] -= step
            step = -step
        assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(log_distance.grad[2].item(), rel=0.05)
        log_distance.copy_(torch.tensor([4.0, 4.1, 4.2, 4.3]))
        model.save_pretrained(tmp_path / "model")
        opened = LongMemForCausalLM.from_pretrained(tmp_path / "model")
        assert torch.equal(opened.side_network.layers[0].memory_log_distance, log_distance)
        opened.config.num_retrieved_tokens = 150
        assert torch.equal(opened.eval()(input_ids, memory=bank).logits, model.eval()(input_ids, memory=bank).logits)
    assert "memory_log_distance" in "".join(model.side_network.trained_parameters())


def test_gates_that_a_network_was_saved_without_begin_as_new_ones(tmp_path):
    build_backbone("llama").save_pretrained(tmp_path / "backbone")
    model = LongMemForCausalLM.from_backbone(str(tmp_path / "backbone"), **SETTINGS, memory_layers=LAYERS)
    with torch.no_grad():
        model.side_network.layers[0].memory_bias.fill_(-3)
    model.save_pretrained(tmp_path / "model")
    asked = {"distance_per": "head", "memory_distance": 20, "memory_null_init": 2.0}
    first = LongMemForCausalLM.from_pretrained(tmp_path / "model", **asked).side_network.layers[0]
    assert first.memory_log_distance.exp().tolist() == pytest.approx([20] * 4)
    assert (first.memory_null.tolist(), first.memory_bias.tolist()) == ([2] * 4, [-3] * 4)
    # What some layers have, others may not lack.
    model = LongMemForCausalLM.from_pretrained(tmp_path / "model", **asked)
    state = {name: weight for name, weight in model.state_dict().items() if name != "side_network.layers.0.memory_null"}
    model.save_pretrained(tmp_path / "damaged", state_dict=model.state_dict())
    weights = tmp_path / "damaged" / "model.safetensors"
    save_file(state, weights)
    with pytest.raises(ValueError, match=r"missing \['layers.0.memory_null'\]"):
        LongMemForCausalLM.from_pretrained(tmp_path / "damaged")
