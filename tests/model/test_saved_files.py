"""What is saved is the one model or the other, whatever interrupts it, and what is not as it was saved is not opened."""

from __future__ import annotations

import copy
import json
import os
import shutil
import stat
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from killing import kill_at_any_time, kill_at_every_change
from model.conftest import SETTINGS, build_backbone
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_backbone

from longmem import LongMemForCausalLM
from longmem.files import PENDING, seal_tensors
from longmem.model.names import look_up
from longmem.model.saving import load_side_network, weight_files


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A model, and the folder in which it was saved beside the folder of its backbone."""
    place = tmp_path_factory.mktemp("saved")
    build_backbone("llama").save_pretrained(place / "backbone")
    model = LongMemForCausalLM.from_backbone(str(place / "backbone"), **SETTINGS, memory_layers=[1, 2])
    model.save_pretrained(place / "model")
    return model.eval(), place / "model"


@pytest.fixture
def saved(original, tmp_path):
    """A copy of the folder."""
    return Path(shutil.copytree(original[1], tmp_path / "model"))


def change(file: Path, edit: Callable[[bytearray], object]) -> None:
    content = bytearray(file.read_bytes())
    edit(content)
    file.write_bytes(content)


def flip(place: float) -> Callable[[bytearray], object]:
    def edit(content: bytearray) -> None:
        content[int(place * (len(content) - 1))] ^= 4

    return edit


@pytest.mark.parametrize("place", [0, 0.002, 0.3, 1])
def test_a_flipped_bit_of_the_weights_is_refused_by_name(saved, original, place):
    """Every bit of such a file is tried in `tests/test_files.py`."""
    change(saved / "model.safetensors", flip(place))
    with pytest.raises(ValueError, match=r"model\.safetensors can't be read, it is damaged"):
        load_side_network(copy.deepcopy(original[0].side_network), saved)


def test_a_changed_configuration_is_told(saved, original):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(
        json.dumps({**config, "num_retrieved_tokens": 2 * config["num_retrieved_tokens"]})
    )
    with pytest.warns(UserWarning, match=r"config\.json is not as `save_pretrained` wrote it"):
        load_side_network(copy.deepcopy(original[0].side_network), saved)


def test_weights_that_are_no_numbers_are_refused_by_name(saved, original):
    """Of another tool's files as well, which have no digest."""
    weights, side_network = load_file(saved / "model.safetensors"), copy.deepcopy(original[0].side_network)
    name = sorted(name for name, each in weights.items() if each.ndim == 2)[0]
    save_file(weights, saved / "model.safetensors")
    load_side_network(side_network, saved)
    for number in (torch.nan, torch.inf):
        weights[name][0, 0] = number
        save_file(weights, saved / "model.safetensors")
        with pytest.raises(ValueError, match=f"`{name}` in .* must be finite"):
            load_side_network(side_network, saved)


@pytest.mark.parametrize(
    "told",
    [
        [],
        3,
        {"files": []},
        {"backbone": 3},
        {"backbone": {}},
        {"backbone": {"sums": [], "recipe": {}}},
        {"files": {"/etc/hostname": "0"}},
        {"files": {"../model/config.json": "0"}},
    ],
    ids=str,
)
def test_what_somebody_else_says_of_weights_is_refused_or_names_nothing_elsewhere(told, saved, original):
    path = saved / "model.safetensors"
    save_file(load_file(path), path, {"format": "pt"})
    seal_tensors(path, told)
    if isinstance(told, dict) and told.get("files"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load_side_network(copy.deepcopy(original[0].side_network), saved) is None
    else:
        with pytest.raises(ValueError, match=r"model\.safetensors can't be read.*what is told of a side network"):
            load_side_network(copy.deepcopy(original[0].side_network), saved)


@pytest.mark.filterwarnings("ignore:.*is not as `save_pretrained` wrote it")
@pytest.mark.parametrize(
    ("name", "said", "message"),
    [
        ("config.json", {"backbone_name_or_path": ["x"]}, "config.json can't be read.*names the backbone"),
        ("config.json", {"lora": {"rank": 10**9}}, "`rank` of `lora` must be at most 32"),
        ("generation_config.json", [], "generation_config.json can't be read.*hold an object"),
        ("generation_config.json", "{", "generation_config.json can't be read"),
    ],
)
def test_what_somebody_else_says_in_settings_is_refused_in_one_sentence(name, said, message, saved):
    before = json.loads((saved / name).read_text())
    (saved / name).write_text(said if isinstance(said, str) else json.dumps(before | said if said else said))
    with pytest.raises(ValueError, match=message):
        LongMemForCausalLM.from_pretrained(saved)


CODE = {"auto_map": {"AutoTokenizer": ["code.Mine", None]}, "tokenizer_class": "Mine"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", json.dumps(CODE)),
        ("tokenizer.json", None),
    ],
)
def test_a_tokenizer_is_data_and_nobody_is_asked_to_run_its_code(name, content, original, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    save_tiny_backbone(folder)
    (folder / "code.py").write_text("raise RuntimeError('it ran')")
    (folder / name).unlink()
    if content is None:
        os.mkfifo(folder / name)  # at which whoever opens it waits
    else:
        (folder / name).write_text(content)
    for file in original[1].iterdir():
        shutil.copy(file, folder)
    monkeypatch.setattr("builtins.input", None)
    with pytest.raises(
        ValueError, match=f"the tokenizer of `{folder}` can't be opened|{name} can't be read.*no regular file"
    ):
        _ = LongMemForCausalLM.from_pretrained(folder, backbone=original[0].backbone).tokenizer


def test_only_the_files_that_count_are_read(saved, original):
    model, _ = original
    other = {name: torch.zeros_like(each) for name, each in load_file(saved / "model.safetensors").items()}
    for name in ("model_before_tuning.safetensors", "model-00001-of-00001.safetensors", "modelx.safetensors"):
        save_file(other, saved / name)
    side_network = copy.deepcopy(model.side_network)
    load_side_network(side_network, saved)
    found = side_network.state_dict()
    assert all(torch.equal(each, found[name]) for name, each in model.side_network.state_dict().items())
    (saved / "model.safetensors").unlink()
    for file in ("../elsewhere.safetensors", "/etc/passwd", "model_before_tuning.safetensors", 3):
        (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
        with pytest.raises(ValueError, match=r"index\.json can't be read"):
            weight_files(saved)


def test_shards_are_read_and_those_of_before_go(original, tmp_path):
    model, _ = original
    model.save_pretrained(tmp_path, max_shard_size=20_000)
    shards = sorted(path.name for path in tmp_path.glob("model-*"))
    assert len(shards) > 2
    (tmp_path / "model_before_tuning.safetensors").write_text("mine")
    reloaded = LongMemForCausalLM.from_pretrained(tmp_path).side_network.state_dict()
    assert all(torch.equal(each, reloaded[name]) for name, each in model.side_network.state_dict().items())
    model.save_pretrained(tmp_path)
    names = {path.name for path in original[1].iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {*names, "model_before_tuning.safetensors"}


@pytest.mark.parametrize("action", ["strict", "warn"])
@pytest.mark.parametrize("difference", ["weights", "rope_parameters"])
def test_a_backbone_of_the_same_sizes_that_it_was_not_trained_beside(saved, difference, action):
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    other = build_backbone("llama", **({"rope_parameters": scaling} if difference == "rope_parameters" else {}))
    if difference == "weights":
        other.lm_head.weight.data[-1, -1] += 0.1
    if action == "strict":
        with pytest.raises(ValueError, match=f"differs from this one in .*{difference}.*strict_backbone=False"):
            LongMemForCausalLM.from_pretrained(saved, backbone=other)
    else:
        with pytest.warns(UserWarning, match=f"differs from this one in .*{difference}"):
            LongMemForCausalLM.from_pretrained(saved, backbone=other, strict_backbone=False)
        LongMemForCausalLM.from_pretrained(saved, backbone=build_backbone("llama").to(torch.bfloat16))


@pytest.mark.parametrize(("access", "mode"), [("private", 0o600), ("group", 0o640)])
def test_all_files_have_one_mode(original, tmp_path, monkeypatch, access, mode):
    monkeypatch.setenv("LONGMEM_ACCESS", access)
    model = LongMemForCausalLM.from_backbone(build_backbone("llama"), **SETTINGS)
    model.save_pretrained(tmp_path / "model", save_backbone=True)
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert set(found.values()) == {mode}
    assert len(found) >= 7
    opened = LongMemForCausalLM.from_pretrained(tmp_path / "model")
    assert opened.config.backbone_name_or_path == str(tmp_path / "model" / "backbone")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_access_denied_is_not_called_damage(saved):
    (saved / "model.safetensors").chmod(0)
    with pytest.raises(ValueError, match="Permission denied. It is not damaged"):
        LongMemForCausalLM.from_pretrained(saved)


def test_access_denied_is_not_called_damage_for_root_either(saved, original, monkeypatch):
    def denied(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("longmem.files.open_regular", denied)
    with pytest.raises(ValueError, match=r"model\.safetensors can't be opened: Permission denied\. It is not damaged"):
        load_side_network(original[0].side_network, saved)


def saves_over(original, folder):
    """Return what saves another model over one, and what checks that the folder holds the one or the other."""
    model, place = original
    shutil.copytree(place, folder)
    old = load_file(folder / "model.safetensors")
    new = {name: each + 1 for name, each in model.state_dict().items() if name.startswith("side_network.")}
    side_network = copy.deepcopy(model.side_network)
    seen = []

    def check() -> None:
        load_side_network(side_network, look_up(folder).require_side_network())
        found = {f"side_network.{name}": each for name, each in side_network.state_dict().items()}
        seen.append([all(torch.equal(each, found[name]) for name, each in state.items()) for state in (old, new)])

    return lambda: model.save_pretrained(folder, state_dict=new), check, seen


def test_a_killed_save_leaves_the_one_model_or_the_other(original, tmp_path):
    save, check, seen = saves_over(original, tmp_path / "model")
    assert kill_at_every_change(tmp_path / "model", save, check, every=10) > 4
    assert {tuple(each) for each in seen} == {(True, False), (False, True)}
    save()
    assert not (tmp_path / "model" / PENDING).exists()
    assert len(list((tmp_path / "model").iterdir())) == len(list(original[1].iterdir()))


@pytest.mark.slow
def test_sixty_kills_lose_no_model(original, tmp_path):
    save, check, seen = saves_over(original, tmp_path / "model")
    kill_at_any_time(save, check, kills=60, seconds=0.5)
    assert all(any(each) for each in seen)
    kill_at_every_change(tmp_path / "model", save, check)
    assert all(any(each) for each in seen)


def test_a_full_disk_leaves_the_model_of_before(original, tmp_path, monkeypatch):
    save, check, seen = saves_over(original, tmp_path / "model")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for place in ("longmem.files.seal_tensors", "longmem.files.sync_all"):
        with monkeypatch.context() as patched:
            patched.setattr(place, full)
            with pytest.raises(OSError, match="No space left"):
                save()
        check()
    assert seen == [[True, False]] * 2
    assert len(list((tmp_path / "model").iterdir())) == len(list(original[1].iterdir()))
