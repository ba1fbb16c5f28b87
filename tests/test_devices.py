"""One rule for where models run: where `--device` says, by default on a GPU where there is one; banks are with their model."""

import argparse
import re
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from tiny_models import save_tiny_backbone, some_text
from tiny_runs import make_files, make_trainer

from longmem import LongMemForCausalLM, MemoryBank
from longmem.cli.eval import run_script
from longmem.cli.main import build_parser, main
from longmem.evaluation.harness.model import LongMemLM
from longmem.settings import environment
from longmem.settings.environment import DEVICE, chosen_device
from longmem.training import loop

# Every command that computes with a model: how it is called.
LINES = {
    "demo": "--model {model} --windows 1 --memory-tokens 64 --window 32 --output {folder}/demo",
    "memorize": "{file} --bank {folder}/new --model {model}",
    "generate": "--bank {bank} --prompt a",
    "chat": "--bank {bank} --model {model}",
    "serve": "--model {model}",
    "bank add": "{file} --bank {bank} --id other",
    "bank append": "{file} --bank {bank} --id one.txt",
    "bank update": "{file} --bank {bank} --id one.txt",
    "bank find": "cat --bank {bank} --model {model}",
    "bank tune": "--bank {bank}",
    "bank staleness": "--bank {bank} --model {model}",
    "bank refresh": "--bank {bank}",
    "heads": "{model} --texts {folder}/texts --output {folder}/heads",
    "train": "{config}",
    "eval": "recall model={model} output={folder}/recall",
}
# Those that compute with none, or replay a recording of a CPU to the last bit.
WITHOUT = {"cluster start", "cluster stop", "report", "official convert", "official compare"} | {
    f"bank {name}"
    for name in ("list", "info", "delete", "tag", "pin", "unpin", "supersede", "restore", "verify", "compact", "export")
}
TRAINED = ("train", "heads")


def commands(parser, words=()):
    """Yield the name of each command, and its parser."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for group in groups:
        for word, command in group.choices.items():
            yield from commands(command, (*words, word))
    if not groups:
        yield " ".join(words), parser


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder with a backbone, a text and a bank that holds it."""
    folder = tmp_path_factory.mktemp("files")
    save_tiny_backbone(folder / "backbone")
    (folder / "one.txt").write_text(some_text(30))
    places = [str(folder / name) for name in ("one.txt", "bank", "backbone")]
    assert main(["memorize", places[0], "--bank", places[1], "--model", places[2], "--quiet"]) == 0
    return folder


@pytest.fixture
def backbone(files):
    return str(files / "backbone")


class Placed(Exception):
    """A model was moved: what comes after that is not looked at."""


@pytest.fixture
def placed(monkeypatch):
    """Return where models are moved; the first move ends the command. `auto` is what was chosen before and after."""
    moved = []

    def to(model, device):
        moved.append(torch.device(device))
        raise Placed

    monkeypatch.setattr(LongMemForCausalLM, "to", to)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "")
    token = DEVICE.set("auto")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield moved
    DEVICE.reset(token)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_every_command_that_computes_takes_a_device():
    has = {name for name, parser in commands(build_parser()) if "--device" in parser._option_string_actions}
    assert has == set(LINES)
    assert {name for name, _ in commands(build_parser())} == has | WITHOUT


@pytest.mark.parametrize("name", LINES)
def test_a_command_computes_where_it_is_told(name, files, placed, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", None)
    config = make_files(tmp_path) if name in TRAINED else None
    places = {"bank": files / "bank", "model": files / "backbone", "file": files / "one.txt"}
    places |= {"folder": tmp_path, "config": config}
    line = LINES[name].format(**places).split()
    run(*name.split(), *line, "--device", "cpu:0")  # another name of the CPU, that nobody chooses by himself
    assert placed == [torch.device("cpu:0")]
    assert DEVICE.get() == "cpu:0"


def test_scripts_of_evaluations_take_it_as_a_setting(backbone, placed, tmp_path):
    with pytest.raises(Placed):
        run_script("recall", [f"model={backbone}", f"output={tmp_path / 'run'}", "device=cpu:0"], None)
    assert placed == [torch.device("cpu:0")]
    with pytest.raises(SystemExit, match="`device` must be a device of this machine, got 'gpu'"):
        run_script("recall", ["device=gpu"], None)


@pytest.mark.parametrize(
    ("has_gpu", "given", "place"),
    [
        (False, None, "cpu"),
        (False, "auto", "cpu"),
        (False, "cuda:0", "cpu"),  # lm-eval says so where nobody said anything
        (False, "cpu:0", "cpu:0"),
        (True, None, "cuda"),
        (True, "auto", "cuda"),
        (True, "cpu", "cpu"),
        (True, "cuda:1", "cuda:1"),
    ],
)
def test_the_harness_follows_the_rule(has_gpu, given, place, backbone, placed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    with pytest.raises(Placed):
        LongMemLM(backbone, device=given)
    assert placed == [torch.device(place)]


@pytest.mark.parametrize(
    ("has_gpu", "chosen", "on_cpu"), [(False, "auto", True), (True, "auto", False), (True, "cpu", True)]
)
def test_training_follows_the_rule(has_gpu, chosen, on_cpu, placed, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    asked = []

    def accelerator(*, cpu, **others):
        asked.append(cpu)
        raise Placed

    monkeypatch.setattr(loop, "Accelerator", accelerator)
    DEVICE.set(chosen)
    with pytest.raises(Placed):
        make_trainer(make_files(tmp_path))
    assert asked == [on_cpu]
    assert chosen_device().type == ("cpu" if on_cpu else "cuda")


def test_nothing_else_looks_for_a_gpu():
    """`torch.cuda.is_available` decides where a model runs in one place; elsewhere it asks what can be measured or restored."""
    others = {"settings/environment.py", "training/checkpoints.py", "evaluation/harness/model.py"}
    package = Path(environment.__file__).parents[1]
    asking = re.compile(r"cuda\.is_available|accelerator\.(is_available|current_accelerator)\(")
    found = {str(path.relative_to(package)) for path in package.rglob("*.py") if asking.search(path.read_text("utf-8"))}
    assert found - others <= {"training/loop.py", "memory/checks.py"}  # refuse fp16, name the devices that are there


def test_a_bank_is_with_its_model(tmp_path, backbone):
    model = LongMemForCausalLM.from_backbone(backbone, segment_length=32)
    MemoryBank.for_model(model, folder=tmp_path / "bank").close()

    class Elsewhere(LongMemForCausalLM):
        input_device = torch.device("meta")

    model.__class__ = Elsewhere
    assert MemoryBank.for_model(model).device.type == "meta"
    assert MemoryBank.for_model(model, device="cpu").device.type == "cpu"
    for opened in (MemoryBank.open, MemoryBank.load):
        assert opened(tmp_path / "bank", model).device.type == "meta"
        assert opened(tmp_path / "bank", model, device="cpu").device.type == "cpu"
        assert opened(tmp_path / "bank").device.type == "cpu"
