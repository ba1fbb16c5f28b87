"""Settings of a training run: what is read, what is refused and with which words, what comes back from a file."""

from __future__ import annotations

import ast
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser

from longmem.cli.train import CONFIGS
from longmem.settings import save_settings
from longmem.training import settings as sections
from longmem.training.settings import (
    DataSettings,
    OptimizationSettings,
    TrainingSettings,
    load_settings,
    validate_settings,
)

ACCELERATE = Path(__file__).parents[2] / "configs" / "accelerate"
SMALLEST = """
output: run
data: {train: books}
optimization: {steps: 1000}
"""


@pytest.fixture
def load(tmp_path):
    def load_text(text=SMALLEST, *overrides):
        file = tmp_path / "settings.yaml"
        file.write_text(text, encoding="utf-8")
        return load_settings(file, overrides)

    return load_text


def refusal(load, *arguments) -> str:
    with pytest.raises(ValueError) as caught:
        load(*arguments)
    return str(caught.value)


def test_what_a_file_leaves_out_has_its_default(load):
    expected = TrainingSettings("run", DataSettings("books"), OptimizationSettings(steps=1000))
    assert load() == expected
    assert load(SMALLEST, "seed=3") == dataclasses.replace(expected, seed=3)


def test_the_defaults_are_those_of_the_paper(load):
    settings = load()
    assert (settings.data.window, settings.memory.tokens) == (1024, 65_536)
    optimizer = settings.optimization
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.98, 0.01)
    assert (optimizer.learning_rate, optimizer.schedule) == (2e-4, "linear")


def test_saved_settings_are_complete_and_load_as_equal(load, tmp_path):
    settings = load(
        SMALLEST,
        "model.config.chunk_size=8",
        "optimization.mixed_precision=no",
        "optimization.learning_rate=1e-05",
        "memory.index='ivf:probed_share=0.06'",
        "output='2024'",
    )
    save_settings(settings, tmp_path / "saved.yaml")
    assert load_settings(tmp_path / "saved.yaml") == settings
    saved = yaml.safe_load((tmp_path / "saved.yaml").read_text())
    assert saved == dataclasses.asdict(settings)
    other = load(SMALLEST, "model.config.chunk_size=4")
    assert load_settings(tmp_path / "saved.yaml") != other


@pytest.mark.parametrize("name", ["1e4", "12", "no", "null", "a: b", "# c", "2026-01-01", "Bücher/Faust 'I'"])
def test_names_that_look_like_something_else_come_back(load, tmp_path, name):
    settings = dataclasses.replace(load(), output=name)
    save_settings(settings, tmp_path / "saved.yaml")
    assert load_settings(tmp_path / "saved.yaml") == settings


def test_an_override_says_the_same_as_the_file(load):
    written = load(
        "output: run\nseed: 7\nmodel: {config: {chunk_size: 8, memory_layers: [2, 3]}}\n"
        "data: {train: books, shuffle: false}\noptimization: {epochs: 2, learning_rate: 1.0e-4, max_minutes: 3}\n"
    )
    overridden = load(
        "output: elsewhere\nmodel:\noptimization: {epochs: 1}\n",  # `model:` has nothing below it
        "output=run",
        "seed=7",
        "model.config.chunk_size=8",
        "model.config.memory_layers=[2, 3]",
        "data.train=books",
        "data.shuffle=false",
        "optimization.epochs=1",
        "optimization.epochs=2",  # the last counts
        "optimization.learning_rate=1e-4",
        "optimization.max_minutes=3",
    )
    assert overridden == written
    assert isinstance(overridden.optimization.epochs, float)


@pytest.mark.parametrize(("text", "number"), [("1e-4", 1e-4), ("2E3", 2000.0), ("1", 1.0), (".5e-1", 0.05)])
def test_numbers_as_people_write_them(load, text, number):
    settings = load(SMALLEST, f"optimization.learning_rate={text}")
    assert settings.optimization.learning_rate == number
    bias = load(SMALLEST, f"model.config.memory_bias_init={text}").model.config["memory_bias_init"]
    assert bias == number
    assert not isinstance(bias, str)


def test_the_word_no_is_not_false(load):
    text = SMALLEST.replace("steps: 1000", "steps: 1000, mixed_precision: no")
    assert load(text).optimization.mixed_precision == "no"
    assert load(text, "optimization.mixed_precision=bf16").optimization.mixed_precision == "bf16"
    assert "must be one of no, bf16, fp16, got 'yes'" in refusal(load, text, "optimization.mixed_precision=yes")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.windows=8", "`data.windows` is not a setting of this run. Did you mean `validation.windows`?"),
        ("data.windwo=8", "Did you mean `data.window`?"),
        ("learning_rate=1", "Did you mean `optimization.learning_rate`?"),
        ("lerning_rate=1", "Did you mean `optimization.learning_rate`?"),
        ("model.config.chunksize=8", "Did you mean `model.config.chunk_size`?"),
        ("model.chunk_size=8", "Did you mean `model.config.chunk_size`?"),
        ("model=8", "`model` is not a setting"),
        ("data.lanes", "must have the form section.key=value, got 'data.lanes'"),
        ("data.lanes=[1", "'data.lanes=[1' must be YAML"),
    ],
)
def test_unknown_overrides_are_explained(load, override, message):
    assert message in refusal(load, SMALLEST, override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "optimisation: {steps: 3}",
            "`optimisation` is not a setting of this run. Did you mean `optimization.steps`?",
        ),
        ("memory: {capacity: 3}", "`memory.capacity` is not a setting"),
        ("model: {config: {chunksize: 3}}", "`model.config.chunksize` is not a field of LongMemConfig. Did you mean"),
        ("model: {config: {backbone_config: {}}}", "`model.backbone` names the backbone"),
        ("memory: 3", "`memory` must be a section of settings, name: value, got 3"),
        ("seed: 1\nseed: 2", "`seed` must be given once, got it again in line 6 of"),
    ],
)
def test_unknown_keys_are_explained(load, text, message):
    assert message in refusal(load, SMALLEST + text)


@pytest.mark.parametrize("text", ["- a\n- b", "plain", "a: [", "{"])
def test_what_is_no_mapping_is_refused_with_the_file_name(load, text):
    assert "settings.yaml" in refusal(load, text)


def test_a_missing_file_and_missing_settings_are_explained(load, tmp_path):
    with pytest.raises(ValueError, match="which is no file"):
        load_settings(tmp_path / "none.yaml")
    assert "`output` must be given" in refusal(load, "")
    assert "`data.train` must be given, it has no default; write it into the file or add data.train=VALUE." in refusal(
        load, "output: run"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.lanes=2.5", "`data.lanes` must be an integer of at least 1, got 2.5; the default is 4."),
        ("data.lanes=true", "must be an integer of at least 1, got True"),
        ("data.lanes=0", "must be an integer of at least 1, got 0"),
        ("data.window=1", "must be an integer of at least 2, got 1"),
        ("data.max_train_tokens=many", "must be an integer of at least 1, or null, got 'many'; the default is null."),
        ("data.train=2024", "`data.train` must be text that is not empty, got 2024; put quotes around"),
        ("data.train=", "must be text that is not empty, got None"),
        ("data.shuffle=1", "`data.shuffle` must be true or false, got 1; the default is True."),
        ("optimization.learning_rate=fast", "must be a number above 0, got 'fast'; the default is 0.0002."),
        ("optimization.learning_rate=.nan", "must be a number above 0, got nan"),
        ("optimization.beta2=1", "must be a number of at least 0 and below 1, got 1; the default is 0.98."),
        ("optimization.schedule=square", "must be one of cosine, linear, constant, got 'square'"),
        ("model.config=8", "`model.config` must be a section, name: value, got 8; leave it out for none."),
        ("seed=4294967296", "must be an integer of at least 0 and at most 4,294,967,295"),
    ],
)
def test_wrong_values_are_explained(load, override, message):
    assert message in refusal(load, SMALLEST, override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimization.epochs=1"], "Exactly one of `optimization.steps` and `optimization.epochs`"),
        (["optimization.steps=null"], "Exactly one of"),
        (["optimization.steps=100"], "`optimization.warmup_steps` must be below `optimization.steps`"),
        (["data.lanes=6", "data.lanes_per_document=4"], "8 would do"),
        (["memory.start_tokens=1024"], "must be given together, got 1024 and 0"),
        (["memory.growth_steps=10"], "must be given together, got None and 10"),
        (["memory.start_tokens=70000", "memory.growth_steps=10"], "must be at most `memory.tokens`"),
        (["memory.foreign_lanes=4"], "a lane has 3 others"),
        (["memory.enabled=false", "memory.foreign_lanes=1"], "nothing is read there"),
        (["memory.index=flatt"], "`memory.index`: `index` must be one of the known kinds"),
        (["loss.long_context_weight=1", "data.window=2048"], "4096 would do"),
        (["validation.every_steps=5"], "`validation.every_steps` needs `data.validation`"),
        (["data.max_validation_tokens=5"], "`data.max_validation_tokens` needs `data.validation`"),
        (["features.max_gigabytes=5"], "needs `features.folder`"),
    ],
)
def test_settings_that_contradict_each_other_are_explained(load, overrides, message):
    assert message in refusal(load, SMALLEST, *overrides)


def test_settings_made_in_python_are_checked_as_those_of_a_file():
    optimization = OptimizationSettings(steps=200)
    validate_settings(TrainingSettings("run", DataSettings("books"), optimization))
    with pytest.raises(ValueError, match="`data.lanes` must be an integer of at least 1, got 0"):
        validate_settings(TrainingSettings("run", DataSettings("books", lanes=0), optimization))
    with pytest.raises(ValueError, match="must be TrainingSettings, got dict"):
        validate_settings({"output": "run"})


def test_loaded_settings_share_nothing_with_those_they_were_saved_from(load, tmp_path):
    settings = load(SMALLEST, "model.config.chunk_size=8")
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 3
    save_settings(settings, tmp_path / "saved.yaml")
    again = load_settings(tmp_path / "saved.yaml")
    again.model.config["chunk_size"] = 2
    assert settings.model.config["chunk_size"] == 8


def test_every_setting_is_documented_below_it():
    tree = ast.parse(Path(sections.__file__).read_text(encoding="utf-8"))
    undocumented = []
    for section in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for field, after in zip(section.body, [*section.body[1:], None], strict=True):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and not is_text:
                undocumented.append(field.target.id)
    # The sections of `TrainingSettings` have docstrings of their own.
    assert set(undocumented) == {
        field.name for field in dataclasses.fields(TrainingSettings) if field.name not in ("output", "seed")
    }


def test_the_training_files_load():
    manual = load_settings(CONFIGS / "python-manual.yaml")
    assert manual.data.train == "python-manual"
    books = load_settings(CONFIGS / "books.yaml", ["data.train=a", "data.validation=b"])
    assert (books.data.train, books.data.validation) == ("a", "b")
    with pytest.raises(ValueError, match="`data.train` must be given"):
        load_settings(CONFIGS / "books.yaml")


@pytest.mark.parametrize("path", sorted(ACCELERATE.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_knows_every_key_of_its_files(path):
    assert isinstance(load_config_from_file(str(path)), ClusterConfig)  # refuses unknown keys at the top
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    arguments = vars(launch_command_parser().parse_args(["script.py"]))
    inner = {**values.get("fsdp_config", {}), **values.get("deepspeed_config", {})}
    assert set(inner) <= set(arguments)
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("#")
    assert ("UNTESTED ON HARDWARE" in first) == bool(inner)


@pytest.mark.slow
def test_two_processes_on_the_cpu_know_each_other(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(
        "import torch\nfrom accelerate import Accelerator\naccelerator = Accelerator()\n"
        "ranks = accelerator.gather(torch.tensor([accelerator.process_index]))\n"
        "accelerator.print(accelerator.distributed_type.value, ranks.tolist())\n"
    )
    config = ACCELERATE / "cpu-2-processes.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), str(script)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["MULTI_CPU [0, 1]"], done.stderr
