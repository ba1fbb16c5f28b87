"""Checkpoints in fairseq's layout become folders that open and compute what was recorded."""

import argparse
import shutil

import pytest
import torch
from safetensors.torch import load_file

from longmem import LongMemForCausalLM
from longmem.cli.main import main
from longmem.official.memory import OfficialMemory

SIDE_SETTINGS = {
    "activation_fn": "gelu",
    "layer_reduction_factor": 2,
    "retrieval_layer_index": 3,
    "chunk_size": 4,
    "k": 8,
    "memory_size": 64,
    "tokens_per_sample": 16,
    "use_external_memory": True,
}
BACKBONE_SETTINGS = {"num_attention_heads": 4, "newgpt_mode": "alibi", "use_external_memory": False, "pad": 1}


@pytest.fixture
def checkpoints(recording, tmp_path):
    """Return a function that writes both files, with changed settings, and returns their paths."""
    tensors = load_file(recording)

    def write(settings=None, weights=None):
        own = {name.removeprefix("bb_sd/"): t for name, t in tensors.items() if name.startswith("bb_sd/")}
        side = {name.removeprefix("sd/"): t for name, t in tensors.items() if name.startswith("sd/")}
        side |= {f"decoder.pretrained_model.{name}": tensor for name, tensor in own.items()}
        side["decoder.output_projection.weight"] = own["decoder.model.lm_head.weight"]
        cfg = {**SIDE_SETTINGS, **(settings or {})}
        cfg = {name: value for name, value in cfg.items() if value is not None}
        torch.save({"cfg": {"model": cfg}, "args": None, "model": side}, tmp_path / "side.pt")
        namespace = argparse.Namespace(**BACKBONE_SETTINGS)
        backbone = {"cfg": None, "args": namespace, "model": {**own, **(weights or {})}}
        torch.save(backbone, tmp_path / "backbone.pt")
        return tmp_path / "side.pt", tmp_path / "backbone.pt"

    return write


@torch.no_grad()
def largest_error(folder, recording):
    model, tensors = LongMemForCausalLM.from_pretrained(folder), load_file(recording)
    memory = OfficialMemory(memory_layer=3, chunk_size=4, memory_size=64, storage_dtype="float32")
    errors = []
    for step in range(5):
        output = model(tensors[f"seq_f32/s{step:02d}/input_ids"], memory=memory, output_memory_keys=True)
        memory.write(output.memory_keys, output.memory_values)
        errors.append((output.logits - tensors[f"seq_f32/s{step:02d}/logits"]).abs().max())
    return max(errors)


def test_a_converted_model_gives_the_recorded_logits(checkpoints, recording, tmp_path, capsys):
    assert main(["official", "convert", *map(str, checkpoints()), str(tmp_path / "out")]) == 0
    assert "memory of 64 tokens" in capsys.readouterr().out
    assert largest_error(tmp_path / "out", recording) < 5e-6
    shutil.move(tmp_path / "out", tmp_path / "moved")  # the backbone goes with it
    assert largest_error(tmp_path / "moved", recording) < 5e-6
    LongMemForCausalLM.from_pretrained(tmp_path / "moved").save_pretrained(tmp_path / "again")
    assert largest_error(tmp_path / "again", recording) < 5e-6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"k": None}, "does not tell `k`"),
        ({"retrieval_layer_index": None}, "does not tell `retrieval_layer_index`"),
        ({"retrieval_layer_index": 4}, "read by none (E7)"),
        ({"use_external_memory": False}, "`use_external_memory` False; only True"),
        ({"activation_fn": "prelu"}, "`activation_fn`"),
        ({"k": 10}, "multiple of `chunk_size`"),
    ],
)
def test_settings_that_are_missing_or_have_no_form_here_are_named(checkpoints, tmp_path, capsys, settings, words):
    assert main(["official", "convert", *map(str, checkpoints(settings)), str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_backbone_is_refused(checkpoints, tmp_path, capsys):
    paths = checkpoints(weights={"decoder.model.transformer.ln_f.bias": torch.ones(32)})
    assert main(["official", "convert", *map(str, paths), str(tmp_path / "out")]) == 2
    assert "another backbone than the one given: `transformer.ln_f.bias`" in capsys.readouterr().err


class Surprise:
    def __reduce__(self):
        return print, ("code in a pickle has run",)


def test_no_code_in_a_checkpoint_is_run(checkpoints, tmp_path, capsys):
    _, backbone = checkpoints()
    torch.save({"model": {}, "cfg": Surprise()}, tmp_path / "bad.pt")
    assert main(["official", "convert", str(tmp_path / "bad.pt"), str(backbone), str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert "could run code" in told.err
    assert "has run" not in told.out
