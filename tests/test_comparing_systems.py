"""The comparison: systems that must agree do, what they keep is counted, and a cell goes on where it was."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_backbone

FOLDER = Path(__file__).parents[1] / "benchmarks" / "compare"


@pytest.fixture(scope="module", autouse=True)
def compare() -> Any:
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_backbone(tmp_path_factory.mktemp("backbone"), max_position_embeddings=512))


@pytest.fixture(scope="module")
def model(backbone: str) -> Any:
    from longmem import LongMemForCausalLM

    return LongMemForCausalLM.from_backbone(backbone, segment_length=64, num_retrieved_tokens=8).eval()


@pytest.fixture
def stream() -> list[int]:
    return torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(1)).tolist()


def answers(system: Any, stream: list[int], prefix: tuple[int, ...] = ()) -> torch.Tensor:
    from longmem.evaluation.systems import Question

    system.read([stream])
    found = system.score([Question([5, 6, 7], [[1, 2], [3]]), Question([8], [[4], [9, 9]])], list(prefix))
    return torch.tensor([each for answer in found for one in answer.candidates for each in one.logprobs])


@pytest.mark.parametrize("prefix", [(), (11, 12)])
def test_a_kept_cache_answers_as_the_whole_text_run_anew(model, stream, prefix):
    from systems import FullWindow, KeptCache, Recomputed

    kept = KeptCache("kept", model, window=64)
    expected = answers(Recomputed("all", model, window=64), stream, prefix)
    torch.testing.assert_close(answers(kept, stream, prefix), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(answers(kept, stream, prefix), expected, rtol=1e-4, atol=1e-4)  # it was not changed
    assert kept.kept_bytes == 199 * 4 * 2 * 2 * 8 * 4  # tokens, layers, keys and values, heads, dim, bytes
    assert (answers(FullWindow("window", model, window=64), stream, prefix) - expected).abs().max() > 1e-3


def test_a_cache_of_a_text_that_is_too_long_holds_its_end(model):
    from systems import KeptCache, Recomputed

    long = torch.randint(0, 256, (700,), generator=torch.Generator().manual_seed(2)).tolist()
    expected = answers(Recomputed("all", model, window=64), long)
    torch.testing.assert_close(answers(KeptCache("kept", model, window=64), long), expected, rtol=1e-3, atol=1e-3)


def test_sinks_stand_before_the_end_of_the_text(model, stream):
    from systems import SinksAndWindow

    system = SinksAndWindow("sinks", model, window=64)
    system.read([stream])
    _, ids = system.context([1, 2], 10, [])
    assert ids == [*stream[:4], *stream[-48:], 1, 2]


def test_nearest_states_change_predictions_by_their_share(model, stream):
    import dataclasses

    from systems import FullWindow, KnnLm

    system = KnnLm("knn", model, window=64)
    plain = answers(FullWindow("window", model, window=64), stream)
    assert (answers(system, stream) - plain).abs().max() > 1e-3
    assert system.kept_bytes == 199 * (32 * 4 + 8)
    mixture, ids = system.context([], 10, [])
    output = dataclasses.replace(mixture, share=0.0)(torch.tensor([ids]), use_cache=False, logits_to_keep=3)
    expected = model.backbone(torch.tensor([ids])).logits[:, -3:].log_softmax(dim=-1)
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
    # A state that is in the store finds itself, and what came next.
    system.read([stream[:64]])
    own, _ = system.context([], 10, [])
    sharp = dataclasses.replace(own, share=1.0, temperature=1e-6)
    logits = sharp(torch.tensor([stream[:64]]), use_cache=False, logits_to_keep=64).logits
    assert logits[0, :63].argmax(dim=-1).tolist() == stream[1:64]


@pytest.mark.parametrize("name", ["Pressed", "ExpectedAttention"])
def test_pressed_caches_have_the_size_of_the_window(model, stream, name):
    if importlib.util.find_spec("kvpress") is None:
        pytest.skip("kvpress does not install beside the newest transformers; from a folder of its own it runs")
    import systems

    system = getattr(systems, name)(name, model, window=128)
    found = answers(system, stream)
    assert found.isfinite().all()
    assert system._encoded[1].get_seq_length() == 128
    assert (found - answers(systems.KeptCache("kept", model, window=128), stream)).abs().max() > 1e-3


def test_the_meter_counts_tokens_and_bytes(model, stream):
    from run_compare import Meter
    from systems import FullWindow, KeptCache

    from longmem.evaluation.systems import Banks, MemorySystem

    for system, tokens, kept in (
        (FullWindow("window", model, window=64), None, 64 * 4),
        (KeptCache("kept", model, window=64), 199, 199 * 512),
        (MemorySystem("on", model, banks=Banks(model), window=64), 200, None),
    ):
        meter = Meter(model, system)
        answers(system, stream)
        counted = meter.stop(2)
        assert counted["tokens_run"] >= (tokens or 57)
        assert counted["kept_bytes"] == kept if kept else counted["kept_bytes"] > 200 * 32
        before = counted["tokens_run"]
        answers(system, stream)
        assert meter.tokens == before  # it has stopped


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    import run_compare

    monkeypatch.setattr(sys, "argv", ["run_compare.py", *arguments])
    run_compare.main()


def test_cells_go_on_and_become_a_page(backbone, tmp_path, monkeypatch, capsys):
    import write_comparison

    output = tmp_path / "cells"
    book = tmp_path / "books"
    book.mkdir()
    (book / "2026-01-01-one.txt").write_text("The rain fell on the old house. " * 40)
    (book / "two.txt").write_text("A dog sat in the rain. " * 60)
    common = [str(output), "--model", backbone, "--dtype", "float32", "--size", "256", "--window", "128"]
    cells = [
        "--cells",
        "books",
        "backbone",
        "kept-cache",
        "sinks",
        "knn-lm",
        "released",
        "longmem",
        "--data",
        f"books={book}",
    ]
    run(monkeypatch, *common, "--trials", "1", *cells)
    records = (output / "books" / "longmem" / "predictions.jsonl").read_text()
    assert len(records.splitlines()) == 1
    run(monkeypatch, *common, "--trials", "2", *cells)
    more = (output / "books" / "longmem" / "predictions.jsonl").read_text()
    assert more.startswith(records)
    assert len(more.splitlines()) == 2
    record = json.loads(more.splitlines()[1])
    assert record["fed_tokens"] > 100 and record["tokens_run"] > record["fed_tokens"] and record["kept_bytes"] > 10_000  # noqa: PT018
    assert not {"question", "values", "prediction"} & record.keys()  # texts stay where they are
    assert (output / "books" / "longmem" / "environment.json").exists()
    capsys.readouterr()
    run(monkeypatch, *common, "--trials", "2", *cells)
    assert capsys.readouterr().out.count("0 asked") == 6
    page = tmp_path / "comparison.md"
    monkeypatch.setattr(sys, "argv", ["write_comparison.py", str(output), str(page)])
    write_comparison.main()
    text = page.read_text()
    assert "| LongMem |" in text
    assert "Questions: 2." in text
    assert "decide nothing about quality" in text
    assert text.index("Where LongMem loses") < text.index("## ")
    assert sorted(each.name for each in (tmp_path / "pictures").iterdir()) == [
        "comparison-bytes.png",
        "comparison-time.png",
    ]


def test_names_that_are_not_known_are_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, str(tmp_path), "--cells", "recal")
    assert "got ['recal']" in capsys.readouterr().err
