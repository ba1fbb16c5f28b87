"""Memory heads that are chosen by learning, and the model that reads by them."""

import dataclasses
import json

import pytest
import torch
from tiny_models import save_tiny_backbone, some_text

from longmem import LongMemForCausalLM, MemoryBank, calibrate_heads
from longmem.cli.main import main
from longmem.training.fewer_heads import CostSettings, head_costs, with_heads
from longmem.training.heads import HeadSettings, answer_loss, chosen_heads, open_candidates, study
from longmem.training.setup import reading_layers

QUICK = HeadSettings(
    steps=3, memory_tokens=512, window=32, segment_length=48, chunk_size=4, num_retrieved_tokens=8, lora_rank=2
)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return str(save_tiny_backbone(tmp_path_factory.mktemp("heads") / "backbone"))


@pytest.fixture(scope="module")
def model(backbone):
    return calibrate_heads(backbone, [some_text(2000, seed) for seed in range(3)], settings=QUICK)


def test_what_comes_back_reads_by_the_chosen_heads_and_is_the_backbone_without_memory(model, monkeypatch):
    config = model.config
    assert (config.search, config.chunk_size, config.segment_length, config.num_neighbours) == ("token", 4, 48, 64)
    assert len(config.memory_heads) == len(config.memory_layers) > 0
    ids = model.tokenizer(some_text(40), return_tensors="pt", add_special_tokens=False)["input_ids"][:, :24]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, model.backbone(ids).logits, rtol=1e-4, atol=1e-4)
        bank = MemoryBank.for_model(model)
        model.memorize(bank, some_text(60, seed=9), document_id="a")
        assert (model(ids, memory=bank).logits - model(ids).logits).abs().max() > 0
        monkeypatch.setattr(config, "num_neighbours", 0)  # the first token reads nothing, but may have neighbours
        torch.testing.assert_close(model(ids, memory=bank).logits[:, 0], model(ids).logits[:, 0], rtol=1e-4, atol=1e-4)


def test_gates_of_memory_moved_and_nothing_else(model, backbone):
    fields = (
        "memory_layers",
        "memory_heads",
        "search",
        "chunk_size",
        "num_retrieved_tokens",
        "lora",
        "memory_null_init",
        "memory_bias_init",
        "memory_distance",
        "distance_per",
    )
    new = LongMemForCausalLM.from_backbone(backbone, **{name: getattr(model.config, name) for name in fields})
    moved = {
        name.rpartition(".")[2]
        for (name, one), other in zip(model.side_network.named_parameters(), new.side_network.parameters(), strict=True)
        if ".lora_A." not in name and not torch.equal(one, other)
    }
    assert moved == {"memory_bias", "memory_null", "memory_log_distance"}


def test_a_text_is_studied_with_what_was_told_in_its_memory(backbone):
    settings = HeadSettings(memory_tokens=512, window=32, segment_length=48, lora_rank=2, num_texts=2)
    model = open_candidates(backbone, settings)
    texts = [some_text(2000, seed) for seed in range(3)]
    made = study(model, ["too short", *texts], settings)
    assert len(made) == 2
    for text, each in zip(texts, made, strict=False):
        assert 480 < each.bank.num_tokens <= 512  # sinks are not kept
        assert model.tokenizer.decode(each.rest) in text
        assert len(each.rest) >= settings.window
        assert each.asked
        assert all(question and 0 < len(answer) <= 8 for question, answer in each.asked)
    again = study(model, ["too short", *texts], settings)
    assert [each.asked for each in again] == [each.asked for each in made]
    with pytest.raises(ValueError, match="at least two of 9032 tokens or more, got 0 among the first 3"):
        study(model, texts, HeadSettings(memory_tokens=9000, window=32, num_texts=2))


def test_more_weight_on_answers_moves_gates_otherwise(backbone):
    texts = [some_text(2000, seed) for seed in range(2)]
    biases = []
    for weight in (0.01, 10.0):
        settings = dataclasses.replace(QUICK, answer_weight=weight, steps=2, pull=0.01)
        made = calibrate_heads(backbone, texts, settings=settings)
        biases.append(torch.cat([layer.memory_bias.detach() for layer in reading_layers(made)]))
    assert biases[0].shape != biases[1].shape or (biases[0] - biases[1]).abs().max() > 0.01


def test_the_loss_of_answers_is_that_of_their_tokens_alone(backbone):
    model = open_candidates(backbone, QUICK)
    made = study(model, [some_text(2000, seed) for seed in range(2)], QUICK)[0]
    short, long = sorted(made.asked, key=lambda each: len(each[0]))[:: len(made.asked) - 1]
    with torch.no_grad():
        together = answer_loss(model, made.bank, [short, long])
        apart = [answer_loss(model, made.bank, [each]) * len(each[1]) for each in (short, long)]
        ids = torch.tensor([long[0] + long[1]])
        logits = model(ids, memory=made.bank).logits[0, len(long[0]) - 1 : -1]
    torch.testing.assert_close(together, sum(apart) / sum(len(each[1]) for each in (short, long)))
    torch.testing.assert_close(
        apart[1], torch.nn.functional.cross_entropy(logits, ids[0, len(long[0]) :]) * len(long[1])
    )


@torch.no_grad()
def test_heads_that_lost_their_bias_are_left_out(backbone):
    model = LongMemForCausalLM.from_backbone(backbone, memory_layers=[1, 2], chunk_size=1, lora={"rank": 1})
    first, second = reading_layers(model)
    group = len(first.memory_bias) // model.backbone_view.structure.layers[1].num_kv_heads
    first.memory_bias.fill_(-9)
    second.memory_bias[1:] = -9
    assert chosen_heads(model, 1.5) == [(2, 0)]
    second.memory_bias[:] = -9
    with pytest.raises(ValueError, match="no head of the backbone held its memory bias"):
        chosen_heads(model, 1.5)
    assert group >= 1


def test_the_command_saves_a_model_that_opens(backbone, tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(3):
        (texts / f"{number}.txt").write_text(some_text(2000, number), encoding="utf-8")
    quick = ["steps=2", "memory_tokens=512", "window=32", "segment_length=48", "num_retrieved_tokens=8", "pull=0.1"]
    command = ["heads", backbone, *quick, "--texts", str(texts), "--json", "--output"]
    assert main([*command, str(tmp_path / "made")]) == 0
    chosen = json.loads(capsys.readouterr().out)["memory_heads"]
    model = LongMemForCausalLM.from_pretrained(tmp_path / "made")
    assert dict(zip(map(str, model.config.memory_layers), model.config.memory_heads, strict=True)) == chosen
    assert main([*command, str(tmp_path / "made")]) == 2
    assert "must be a new folder" in capsys.readouterr().err
    assert main(["heads", backbone, "step=2", *command[2 + len(quick) :], str(tmp_path / "other")]) == 2
    assert "Did you mean `steps`?" in capsys.readouterr().err


@pytest.fixture
def weighed(backbone, tmp_path):
    """A model with four memory heads, of which (1, 1) reads nothing at all, and texts."""
    fields = {"memory_layers": [1, 2], "chunk_size": 4, "segment_length": 48, "search": "token", "lora": {"rank": 1}}
    model = LongMemForCausalLM.from_backbone(backbone, memory_bias_init=2.0, distance_per="head", **fields).eval()
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(3):
        (texts / f"{number}.txt").write_text(some_text(400, number), encoding="utf-8")
    with torch.no_grad():
        reading_layers(model)[0].memory_bias.unflatten(0, (2, -1))[1] = -1e4
        for weight in model.side_network.parameters():
            weight.add_(0.05 * torch.randn(weight.shape)) if weight.requires_grad and weight.ndim > 1 else None
        for layer in reading_layers(model):
            layer.memory_log_distance.add_(torch.randn(layer.memory_log_distance.shape))
    return model, texts


SMALL = CostSettings(memory_tokens=96, num_texts=2)


def test_a_head_costs_what_the_loss_rises_by_without_it(weighed):
    model, texts = weighed
    before = {name: value.clone() for name, value in model.state_dict().items()}
    costs = head_costs(model, texts, SMALL)
    assert {each[:2] for each in costs} == {(1, 0), (1, 1), (2, 0), (2, 1)}
    assert [each.cost for each in costs] == sorted((each.cost for each in costs), reverse=True)
    assert next(each.cost for each in costs if each[:2] == (1, 1)) == 0
    assert all(abs(each.cost) > 1e-6 for each in costs if each[:2] != (1, 1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_a_model_with_fewer_heads_computes_what_the_first_does_without_the_others(weighed):
    model, _ = weighed
    fewer = with_heads(model, [(1, 0), (2, 1)])
    assert (fewer.config.memory_layers, fewer.config.memory_heads) == ([1, 2], [[0], [1]])
    reading_layers(model)[1].memory_bias.unflatten(0, (2, -1))[0] = -1e4
    ids = model.tokenizer(some_text(40), return_tensors="pt", add_special_tokens=False)["input_ids"][:, :24]
    logits = []
    for each in (model, fewer):
        bank = MemoryBank.for_model(each)
        each.memorize(bank, some_text(90, seed=9), document_id="a")
        logits.append(each(ids, memory=bank).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert (logits[1] - fewer(ids).logits).abs().max() > 1e-3
    for wrong in ([], [(1, 2)], [(0, 0)]):
        with pytest.raises(ValueError, match="`heads` must be some of the model's memory heads"):
            with_heads(model, wrong)


def test_a_side_network_begins_where_the_first_kept_head_reads(weighed):
    model, _ = weighed
    assert [layer.source_layer for layer in with_heads(model, [(2, 0)]).side_network.layers][0] == 2


def test_the_command_keeps_the_dearest_heads(weighed, tmp_path, capsys):
    model, texts = weighed
    model.save_pretrained(tmp_path / "model")

    def command(keep, output, memory_tokens=96):
        settings = [f"memory_tokens={memory_tokens}", "num_texts=2"]
        options = ["--texts", str(texts), "--keep", str(keep), "--output", str(tmp_path / output), "--json"]
        return main(["heads", str(tmp_path / "model"), *settings, *options])

    assert command(3, "three") == 0
    chosen = json.loads(capsys.readouterr().out)["memory_heads"]
    assert sum(map(len, chosen.values())) == 3
    assert chosen["1"] == [0]
    assert LongMemForCausalLM.from_pretrained(tmp_path / "three").config.memory_heads == list(chosen.values())
    for wrong, said in (((5, "none"), "`number` must be from 1 to 4"), ((2, "none", 9999), "at least 10047 tokens")):
        assert command(*wrong) != 0
        assert said in "".join(capsys.readouterr())
        assert not (tmp_path / "none").exists()
