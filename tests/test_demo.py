"""The whole demonstration, with a tiny random model: nothing to admire, but every step runs and every number fits."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny_backbone, some_text

from longmem.cli import main
from longmem.sample_texts import docstrings_of, python_manual, split_texts, standard_library_docstrings

pytest.importorskip("matplotlib")
QUICK = ["--memory-tokens", "128", "--windows", "2", "--window", "32", "--steps", "2"]


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory):
    return str(save_tiny_backbone(tmp_path_factory.mktemp("backbone")))


def test_the_demo_writes_what_it_says(backbone_folder, tmp_path, capsys):
    output = tmp_path / "demo"
    assert main(["demo", "--backbone", backbone_folder, "--output", str(output), *QUICK]) == 0
    told = capsys.readouterr().out
    for word in ("memory on", "wrong memory", "share", "with memory:", "largest difference of 31 losses 0.0e+00"):
        assert word in told
    for name in ("demo.png", "table.md", "config.json", "environment.json", "bank/catalogue.sqlite"):
        assert (output / name).stat().st_size > 0
    metrics = json.loads((output / "metrics.json").read_text())
    losses = load_file(output / "losses.safetensors")
    assert losses.keys() == {f"Python's reference manual/{system}" for system in ("backbone", "off", "on", "wrong")}
    for system, values in metrics["systems"].items():
        mean = losses[f"Python's reference manual/{system}"].double().mean().item()
        assert values["loss"] == pytest.approx(mean)
        assert values["perplexity"] == pytest.approx(math.exp(mean))
        assert values["scored_tokens"] == 62
    assert len((output / "adaptation.jsonl").read_text().splitlines()) == 2
    assert json.loads((output / "config.json").read_text())["demo"]["memory_tokens"] == 128
    assert metrics["continuations"]["the text itself"]


def test_the_demo_reads_a_file_and_answers_a_program(backbone_folder, tmp_path, capsys):
    file = tmp_path / "story.txt"
    file.write_text(some_text(200))
    arguments = ["--backbone", backbone_folder, "--file", str(file), "--output", str(tmp_path / "demo"), "--json"]
    assert main(["demo", *arguments, *QUICK]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["systems"].keys() == {"backbone", "off", "on", "wrong"}
    assert "story.txt" in captured.err
    assert "Python's reference manual as a wrong memory" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory-tokens", "40"], "at least two windows, 64 tokens, got 40"),
        (["--windows", "0"], "`windows` must be at least 1"),
        (["--steps", "0"], "`steps` must be at least 1"),
        (["--memory-tokens", "100000000"], "must have 100,000,064 tokens"),
    ],
)
def test_impossible_settings_are_explained(arguments, message, backbone_folder, tmp_path, capsys):
    given = ["demo", "--backbone", backbone_folder, "--output", str(tmp_path), *QUICK, *arguments]
    assert main(given) == 2
    assert message in capsys.readouterr().err


def test_sample_texts_are_long_and_have_no_repeats(tmp_path):
    manual = python_manual()
    assert len(manual) > 300_000
    paragraphs = [" ".join(paragraph.split()) for paragraph in manual.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    library = standard_library_docstrings(50_000)
    assert 50_000 <= len(library) < 200_000
    assert not set(library.split("\n\n")) & set(manual.split("\n\n"))
    (tmp_path / "broken.py").write_text('"""Text."""\nif:')
    assert list(docstrings_of(tmp_path / "broken.py")) == []


def test_texts_are_split_without_a_gap(backbone_folder, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(backbone_folder)
    (tmp_path / "a.txt").write_text("abcdefgh" * 4)
    texts = split_texts(tokenizer, tmp_path / "a.txt", 10, 6)
    assert tokenizer.decode(torch.cat([texts.past, texts.rest])) == "abcdefghabcdefgh"
    assert [len(part) for part in texts[:3]] == [10, 6, 10]
    assert python_manual().startswith(tokenizer.decode(texts.wrong))
