"""The released code's own numbers, and those of an independent reference at other sizes."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from longmem.cli.main import main as longmem_main
from longmem.official.__main__ import main
from longmem.official.comparison import compare
from longmem.official.recording import Recording


def changed(source, folder, change, **settings):
    """Copy a recording with changed tensors and settings, and return its path."""
    path, tensors = folder / "changed.safetensors", load_file(source)
    change(tensors)
    save_file(tensors, path)
    content = json.loads(source.with_suffix(".json").read_text())
    content["config"].update(settings)
    path.with_suffix(".json").write_text(json.dumps(content))
    return path


def test_the_released_code_is_reproduced(recording, capsys):
    assert main(["compare", str(recording)]) == 0
    told = capsys.readouterr().out
    worst = re.fullmatch(r"worst (\S+) over 11 runs", told.splitlines()[-1])
    assert float(worst[1]) < 5e-6
    found = compare(Recording(recording))
    assert found.skipped == {}
    assert found.largest["gradients", "float32 rows"] < 2e-6
    assert found.largest["logits", "float16 rows"] < 1e-4
    assert found.largest["retrieved indices", "float16 rows"] == 0
    assert found.largest["weights copied at start", "float32 rows"] == 0


def test_so_is_an_independent_reference_at_other_sizes(other_recording):
    found = compare(Recording(other_recording))
    assert found.skipped == {}
    assert len(found.replayed) == 9
    assert found.agrees, found.largest
    assert found.worst < 5e-6
    assert found.largest["rows not bit-equal", "recorded k, v"] == 0
    assert found.largest["retrieved indices", "float32 rows"] == 0
    assert found.largest["gradients", "float32 rows"] < 2e-6
    assert ("not compared", "float32 rows") not in found.largest


@pytest.mark.parametrize(
    "setting", [{"side_ln_eps": 1e-6}, {"side_act": "gelu_new"}, {"backbone_ln_eps": 1e-5}], ids=str
)
def test_a_small_mistake_is_told_by_the_exit_code(recording, tmp_path, setting):
    assert main(["compare", str(changed(recording, tmp_path, lambda tensors: None, **setting))]) == 1


def test_the_command_line_has_it_too(recording, tmp_path, capsys):
    assert longmem_main(["official", "compare", str(recording), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["agrees"]
    assert len(told["replayed"]) == 11

    def nudge(tensors):
        tensors["sd/decoder.layers.0.fc1.weight"][0, 0] += 0.01

    assert longmem_main(["official", "compare", str(changed(recording, tmp_path, nudge))]) == 1


def move_padding(tensors):
    ids = tensors["rightpad_f16/s01/input_ids"]
    tensors["rightpad_f16/s01/input_ids"] = ids.flip(1)


def pad_first(tensors):
    tensors["short_f16/s00/input_ids"][:, -1] = 1


def lengthen(tensors):
    """A batch of sixteen tokens after one of four, in a memory of few chunks."""
    tensors["short_f16/s01/input_ids"] = torch.arange(2, 66)[None]


@pytest.mark.parametrize(
    ("change", "run", "words"),
    [
        (move_padding, "rightpad_f16", "before tokens"),
        (pad_first, "short_f16", "memory is empty"),
        (lengthen, "short_f16", "evict 32 chunks where 1 of 16"),
    ],
    ids=["E4b", "E4", "E3"],
)
def test_what_the_released_code_gets_wrong_is_skipped_with_a_reason(recording, tmp_path, capsys, change, run, words):
    assert main(["compare", str(changed(recording, tmp_path, change))]) == 0
    told = capsys.readouterr().out
    assert re.search(rf"Skipped {run}: .*{words}", told)
    assert told.splitlines()[-1].endswith("over 10 runs")


def test_what_is_missing_is_named(recording, tmp_path, capsys):
    assert main(["compare", str(tmp_path / "none.safetensors")]) == 2
    assert "there is no recording" in capsys.readouterr().err
    alone = shutil.copy(recording, tmp_path / "alone.safetensors")
    assert main(["compare", str(alone)]) == 2
    assert "alone.json" in capsys.readouterr().err
    for name in ("layer_reduction_factor", "retrieval_layer_index", "memory_size"):
        path = changed(recording, tmp_path, lambda tensors: None, **{name: None})
        assert main(["compare", str(path)]) == 2
        assert f"must give `{name}`" in capsys.readouterr().err
    path = changed(recording, tmp_path, lambda tensors: tensors.pop("bb_sd/decoder.model.lm_head.bias"))
    assert main(["compare", str(path)]) == 2
    assert "lm_head.bias" in capsys.readouterr().err
