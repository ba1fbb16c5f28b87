from __future__ import annotations

import json

import torch
from safetensors.torch import load_file

from longmem.evaluation.perplexity import WindowScores
from longmem.evaluation.results import summarize, table_rows, verdict, write_results


def scores_of(**losses: float) -> dict[str, WindowScores]:
    noise = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    return {system: WindowScores(noise + loss, seconds=2.0, num_tokens=140) for system, loss in losses.items()}


def test_a_result_folder_holds_all_that_its_numbers_came_from(tmp_path):
    scores = scores_of(backbone=3.0, off=3.0, on=2.5, wrong=3.1)
    summary = summarize(scores)
    folder = write_results(
        tmp_path / "new" / "result",
        config={"window": 8},
        scores={"book one": scores},
        metrics={"systems": summary},
        summary=summary,
        seed=5,
    )
    assert json.loads((folder / "config.json").read_text()) == {"window": 8}
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["seed"] == 5
    assert environment["versions"]["torch"] == torch.__version__
    losses = load_file(folder / "losses.safetensors")
    torch.testing.assert_close(losses["book one/on"], scores["on"].losses, rtol=0, atol=0)
    metrics = json.loads((folder / "metrics.json").read_text())["systems"]
    assert abs(metrics["on"]["gain_over_off"] - 0.5) < 1e-6
    assert metrics["on"]["tokens_per_second"] == 70
    assert "| LongMem, memory on |" in (folder / "table.md").read_text()


def test_the_table_has_a_row_for_each_system():
    rows = table_rows(summarize(scores_of(off=3.0, on=2.5)))
    assert [row[0] for row in rows] == ["", "LongMem, memory off", "LongMem, memory on"]
    assert {len(row) for row in rows} == {5}
    assert rows[2][4].startswith("+0.5000 (")


def test_the_verdict_says_what_is_true():
    assert "lowers the loss by 0.500 nats; " in verdict(scores_of(off=3.0, on=2.5, wrong=3.1))
    assert "may be chance" in verdict(scores_of(off=3.0, on=2.5, wrong=2.5))
    assert "does not help" in verdict(scores_of(off=3.0, on=3.1, wrong=3.2))
