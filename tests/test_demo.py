"""The whole demonstration, with a tiny random model: nothing to admire, but every step runs and every number fits."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny_backbone, some_text
from tiny_trained import NAME, save_tiny_trained

from longmem import MemoryBank
from longmem.cli import demonstration
from longmem.cli.main import main
from longmem.data.sample_texts import docstrings_of, python_manual, split_texts, standard_library_docstrings
from longmem.evaluation import WindowScores

pytest.importorskip("matplotlib")
MANUAL = "Python's reference manual"
QUICK = ["--memory-tokens", "128", "--windows", "2", "--window", "32"]


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory):
    return str(save_tiny_backbone(tmp_path_factory.mktemp("backbone")))


def test_the_demo_writes_what_it_says(backbone_folder, tmp_path, capsys):
    output = tmp_path / "demo"
    assert main(["demo", "--model", backbone_folder, "--output", str(output), *QUICK]) == 0
    told = capsys.readouterr().out
    for word in (
        "memory on",
        "wrong memory",
        "share",
        "with memory:",
        "of 4 answered as the note says",
        "largest difference of 31 losses 0.0e+00",
        "explain.html (open it",
    ):
        assert word in told
    assert "a new side network" in told
    assert "trained side network" not in told
    for name in ("demo.png", "table.md", "config.json", "environment.json", "bank/catalogue.sqlite", "explain.html"):
        assert (output / name).stat().st_size > 0
    metrics = json.loads((output / "metrics.json").read_text())
    environment = json.loads((output / "environment.json").read_text())
    assert environment["seed"] == 0
    assert environment["versions"]["torch"] == torch.__version__
    assert "| LongMem, memory on |" in (output / "table.md").read_text()
    losses = load_file(output / "losses.safetensors")
    assert losses.keys() == {f"{MANUAL}/{system}" for system in ("backbone", "off", "on", "wrong")}
    for system, values in metrics["systems"].items():
        mean = losses[f"{MANUAL}/{system}"].double().mean().item()
        assert values["loss"] == pytest.approx(mean)
        assert values["perplexity"] == pytest.approx(math.exp(mean))
        assert values["scored_tokens"] == 62
    torch.testing.assert_close(losses[f"{MANUAL}/off"], losses[f"{MANUAL}/backbone"])  # what a new side network is
    assert not torch.allclose(losses[f"{MANUAL}/on"], losses[f"{MANUAL}/off"], atol=1e-3)
    config = json.loads((output / "config.json").read_text())
    assert config["demo"]["memory_tokens"] == 128
    assert config["model"]["segment_length"] == 32
    assert metrics["side_network"] == "new"
    assert metrics["continuations"]["the text itself"]
    assert [answer["expected"] for answer in metrics["answers"]] == [
        "Ilse Tamberg",
        "Kittiwake",
        "48213",
        "the green barrel",
    ]
    assert all(answer["read"] for answer in metrics["answers"])
    with MemoryBank.open(output / "bank", read_only=True) as bank:
        assert [info.document_id for info in bank.documents()] == ["right memory"]


def test_the_demo_opens_the_trained_side_network(tmp_path, monkeypatch, capsys):
    model = save_tiny_trained(tmp_path, monkeypatch, segment_length=64, num_retrieved_tokens=4)
    assert main(["demo", "--output", str(tmp_path / "demo"), *QUICK]) == 0
    told = capsys.readouterr().out
    for word in (f"{NAME}, frozen, and the trained side network", "largest difference of 31 losses 0.0e+00"):
        assert word in told
    config = json.loads((tmp_path / "demo" / "config.json").read_text())["model"]
    assert (config["segment_length"], config["num_retrieved_tokens"]) == (64, 4)  # its own, not the demo's
    losses = load_file(tmp_path / "demo" / "losses.safetensors")
    assert (losses[f"{MANUAL}/off"] - losses[f"{MANUAL}/backbone"]).abs().mean() > 1e-3
    assert json.loads((tmp_path / "demo" / "metrics.json").read_text())["side_network"] == "packaged"
    saved = [str(tmp_path / "demo" / "side-network"), "--output", str(tmp_path / "again")]
    assert main(["demo", "--model", *saved, *QUICK]) == 0
    assert "was saved beside it" in capsys.readouterr().out
    again = load_file(tmp_path / "again" / "losses.safetensors")
    assert torch.equal(again[f"{MANUAL}/on"], losses[f"{MANUAL}/on"])
    assert main(["demo", "--output", str(tmp_path / "long"), "--memory-tokens", "128", "--window", "65"]) == 2
    assert f"at most the model's `segment_length`, {model.config.segment_length}, got 65" in capsys.readouterr().err


def test_the_demo_reads_a_file_and_answers_a_program(backbone_folder, tmp_path, capsys):
    file = tmp_path / "story.txt"
    file.write_text(some_text(200))
    arguments = ["--model", backbone_folder, "--file", str(file), "--output", str(tmp_path / "demo"), "--json"]
    assert main(["demo", *arguments, *QUICK]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["systems"].keys() == {"backbone", "off", "on", "wrong"}
    assert "story.txt" in captured.err
    assert f"{MANUAL} as a wrong memory" in captured.err


def scores_of(**losses: float) -> dict[str, WindowScores]:
    noise = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    return {system: WindowScores(tuple(noise + loss), seconds=2.0) for system, loss in losses.items()}


def test_the_table_has_a_row_for_each_system():
    summary = demonstration.summarize(scores_of(off=3.0, on=2.5), seed=0)
    assert summary["on"]["gain_over_off"] == pytest.approx(0.5)
    assert summary["on"]["tokens_per_second"] == 70
    rows = demonstration.table_rows(summary)
    assert [row[0] for row in rows] == ["", "LongMem, memory off", "LongMem, memory on"]
    assert {len(row) for row in rows} == {5}
    assert rows[2][4].startswith("+0.5000 (")


def test_the_verdict_says_what_is_true():
    assert "lowers the loss by 0.500 nats; " in demonstration.verdict(scores_of(off=3.0, on=2.5, wrong=3.1), seed=0)
    assert "may be chance" in demonstration.verdict(scores_of(off=3.0, on=2.5, wrong=2.5), seed=0)
    assert "does not help" in demonstration.verdict(scores_of(off=3.0, on=3.1, wrong=3.2), seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory-tokens", "31"], "at least `window`, 32, got 31"),
        (["--windows", "0"], "`windows` must be at least 1, got 0"),
        (["--window", "1"], "`window` must be at least 2, got 1"),
        pytest.param(["--memory-tokens", "100000000"], "must have 100,000,064 tokens", marks=pytest.mark.slow),
    ],
)
def test_impossible_settings_are_explained(arguments, message, backbone_folder, tmp_path, capsys):
    given = ["demo", "--model", backbone_folder, "--output", str(tmp_path), *QUICK, *arguments]
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
