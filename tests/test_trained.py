"""The trained side network that comes with the package: found by its backbone's packaged name, and part of the wheel."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_trained import NAME, save_tiny_trained

import longmem
from longmem import LongMemForCausalLM, MemoryBank
from longmem.backbone import packaged
from longmem.model import names
from longmem.model.names import look_up
from longmem.model.opening import open_model

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def model(tmp_path, monkeypatch):
    return save_tiny_trained(tmp_path, monkeypatch)


@torch.no_grad()
def test_a_packaged_name_opens_the_trained_side_network(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained = LongMemForCausalLM.from_pretrained(NAME)
    assert trained.config.lora == model.config.lora
    assert trained.config.backbone_name_or_path == NAME
    # Not where the backbone was opened from on the machine that saved it.
    assert str(tmp_path) not in (tmp_path / "trained" / NAME / "config.json").read_text()
    bank = MemoryBank.for_model(model)
    ids = torch.randint(0, 256, (1, 40))
    model.memorize(bank, ids[0], document_id="a")
    expected = model(ids[:, :16], memory=bank).logits
    found = trained(ids[:, :16], memory=bank).logits
    new = LongMemForCausalLM.from_backbone(NAME, segment_length=16, num_retrieved_tokens=8)
    distance = (new(ids[:, :16], memory=bank).logits - expected).abs().mean()
    assert 0 < (found - expected).abs().mean() < 0.05 * distance  # all that is left is the rounding to bfloat16
    new.save_pretrained(NAME)  # a folder of that name is another thing
    assert LongMemForCausalLM.from_pretrained(NAME).config.lora is not None
    assert LongMemForCausalLM.from_pretrained(f"./{NAME}").config.lora is None


def test_settings_or_a_folder_of_that_name_open_another_side_network(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new = open_model(NAME, num_retrieved_tokens=4, segment_length=16)
    assert (new.config.num_retrieved_tokens, new.config.lora) == (4, None)
    new.save_pretrained(NAME)
    found = {name: look_up(name).origin for name in (NAME, f"./{NAME}", "backbone")}
    assert found == {NAME: "packaged", f"./{NAME}": "saved", "backbone": "new"}
    assert open_model(NAME).config.num_retrieved_tokens == 8
    assert open_model(f"./{NAME}").config.num_retrieved_tokens == 4
    for name, dtype in ((NAME, None), (NAME, "bfloat16"), (f"./{NAME}", None)):  # no weight has to do with it
        kept = open_model(name, dtype=dtype, num_neighbours=3)
        assert kept.config.num_neighbours == 3
        assert kept.config.lora == open_model(name).config.lora
    with pytest.raises(ValueError, match="has its settings"):
        open_model(f"./{NAME}", chunk_size=2)


def test_a_packaged_name_without_a_trained_side_network(model, monkeypatch):
    monkeypatch.setitem(packaged.PACKAGED_BACKBONES, "other", packaged.PACKAGED_BACKBONES[NAME])
    with pytest.raises(ValueError) as caught:
        LongMemForCausalLM.from_pretrained("other")
    for words in ("for `other`", f"there is one for: {NAME}", 'from_backbone("other")', "./other"):
        assert words in str(caught.value)


def test_the_place_is_inside_the_installed_package():
    assert names.TRAINED_FOLDER.parent == Path(longmem.__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="setuptools is not installed")
def test_the_wheel_holds_it_and_the_settings(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(REPOSITORY / "longmem", source / "longmem", ignore=shutil.ignore_patterns("__pycache__", "trained"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    files = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    (source / "longmem" / "trained" / NAME).mkdir(parents=True)
    for name in files:
        (source / "longmem" / "trained" / NAME / name).write_bytes(b"content")
    build = "import setuptools.build_meta, sys; print(setuptools.build_meta.build_wheel(sys.argv[1]))"
    command = [sys.executable, "-c", build, str(tmp_path)]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(tmp_path / built.stdout.split()[-1]) as wheel:
        packed = set(wheel.namelist())
        wheel.extractall(tmp_path / "site")
    assert {name for name in packed if "/trained/" in name} == {f"longmem/trained/{NAME}/{name}" for name in files}
    for ending in (".py", ".yaml"):
        files = {path.relative_to(source).as_posix() for path in (source / "longmem").rglob(f"*{ending}")}
        assert {name for name in packed if name.endswith(ending)} == files

    def installed(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
        command = [sys.executable, "-m", "longmem.cli.main", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    for command in ("train", "eval"):
        assert str(tmp_path / "site" / "longmem") in installed(command, "--help").stdout
    # The files were read: what is wrong is the setting behind them.
    for words, meant in (
        (("train", "python-manual", "data.lane=4"), "data.lanes"),
        (("eval", "recall", "items_=1"), "items"),
    ):
        assert f"Did you mean `{meant}`?" in installed(*words).stderr
