"""Real text with a stale memory: who reads what, what it costs, and the arithmetic of the table."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from tiny_models import save_tiny_backbone, some_text

from experiments.staleness.figures import plot_stale_texts
from experiments.staleness.text_tables import summarize_stale_texts, text_markdown
from experiments.staleness.texts import StaleTextSettings, evaluate_stale_texts, recall_of
from experiments.staleness.tuning import tuned_backbone
from longmem.evaluation.settings import open_evaluated

POLICIES = ("eager", "bounded:max_lag=0,on_violation=mask", "bounded:max_lag=0,budget_tokens=16")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stale-texts")
    save_tiny_backbone(folder / "backbone")
    (folder / "texts").mkdir()
    for number in range(3):
        (folder / "texts" / f"{number}.txt").write_text(some_text(60 if number < 2 else 5, seed=number))
    return StaleTextSettings(
        output=str(folder / "run"),
        model=str(folder / "backbone"),
        config={"segment_length": 16, "chunk_size": 2, "num_retrieved_tokens": 8, "memory_layers": [2, 3]},
        data=str(folder / "texts"),
        tuning_data=str(folder / "texts"),
        learning_rates=(1e-2,),
        tuning_steps=2,
        seeds=(0,),
        texts=2,
        memory_tokens=64,
        window=16,
        windows=3,
        policies=POLICIES,
    )


@pytest.fixture(scope="module")
def run(settings):
    return evaluate_stale_texts(settings, open_evaluated(settings), Console(quiet=True))


def by_system(run):
    return {record["system"]: record for record in run.records if record["text"] == "text 1"}


def test_a_bank_encoded_again_is_one_written_anew(run):
    found = by_system(run)
    assert found["eager"]["losses"] == found["oracle"]["losses"]
    assert found["eager"]["recalls"] == [1.0] * 3
    assert found["never"]["losses"] != found["oracle"]["losses"]
    assert min(found["never"]["recalls"]) < 1


def test_what_is_masked_is_as_no_memory_and_a_budget_is_spent_window_by_window(run):
    found = by_system(run)
    assert found[POLICIES[1]]["losses"] == pytest.approx(found["off"]["losses"], abs=1e-5)
    assert {name: record["tokens"] for name, record in found.items()} == {
        "off": 0,
        "oracle": 64,
        "never": 0,
        **dict(zip(POLICIES, (64, 0, 3 * 16), strict=True)),
    }
    assert found["never"]["gap"] > 0


def test_a_run_goes_on_where_it_was(run, settings, monkeypatch):
    monkeypatch.setattr("experiments.staleness.texts.read_text", lambda *_: pytest.fail("asked again"))
    again = evaluate_stale_texts(settings, open_evaluated(settings), Console(quiet=True))
    assert again.records == run.records


def test_too_few_long_texts_are_refused(settings, tmp_path):
    changed = StaleTextSettings(**{**vars(settings), "texts": 3, "output": str(tmp_path)})
    with pytest.raises(ValueError, match=r"3 texts of 112 tokens, got 2"):
        evaluate_stale_texts(changed, open_evaluated(changed), Console(quiet=True))


def test_unknown_policies_are_refused_before_anything_runs(settings):
    with pytest.raises(ValueError, match="`refresh` must be one of the known kinds"):
        StaleTextSettings(**{**vars(settings), "policies": ("eagre",)})


def test_the_table_compares_the_same_windows():
    def record(system, losses, **others):
        common = {
            "learning_rate": 1e-3,
            "seed": 0,
            "text": "a",
            "recalls": None,
            "tokens": 0,
            "seconds": 1.0,
            "gap": 0.1,
        }
        return {**common, "system": system, "losses": losses, **others}

    records = [record("off", [4.0, 2.0]), record("oracle", [3.0, 1.0]), record("never", [3.5, 1.0], recalls=[0.5, 1.0])]
    metrics = summarize_stale_texts(records)
    never = metrics["changes"]["0.001"]["systems"]["never"]
    assert (never["value"], never["gain"][0], never["against_fresh"][0], never["recall"]) == (2.25, 0.75, 0.25, 0.75)
    assert "| old bank, read as it is | 2.250 | +0.750" in text_markdown(metrics)


def test_missing_chunks_do_not_count_as_found():
    rows, wanted = torch.tensor([[-1, 2]]), torch.tensor([[-1, 2]])
    assert recall_of(rows, wanted) == 1.0
    assert recall_of(torch.tensor([[-1, 3]]), wanted) == 0.0


def test_the_figure_is_drawn(run, tmp_path):
    plot_stale_texts(tmp_path / "figure.png", summarize_stale_texts(run.records), title="t")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_tuning_changes_a_copy_and_is_read_back(settings, tmp_path):
    backbone = open_evaluated(settings).backbone
    before = backbone.model.layers[0].mlp.up_proj.weight.clone()
    options = dict(steps=1, learning_rate=1e-2, window=16, seed=0, keep_in=tmp_path / "tuned.safetensors")
    tuned, again = (tuned_backbone(backbone, torch.arange(40), **options) for _ in range(2))
    assert torch.equal(backbone.model.layers[0].mlp.up_proj.weight, before)
    assert not torch.equal(tuned.model.layers[0].mlp.up_proj.weight, before)
    assert all(torch.equal(one, other) for one, other in zip(tuned.parameters(), again.parameters(), strict=True))
