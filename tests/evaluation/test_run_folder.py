"""Folders of runs: what is written stays, what is stopped goes on, what is another run's is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from unittest.mock import patch

import pytest
import torch
from killing import kill_at_any_time, kill_at_every_change

from longmem.evaluation.folder import RunFolder, describe
from longmem.evaluation.intervals import bootstrap_interval, clustered_mean, stratified_mean
from longmem.evaluation.settings import EvaluationSettings, load_evaluation, open_evaluated
from longmem.files import current


def test_a_killed_run_keeps_whole_predictions(tmp_path):
    with RunFolder(tmp_path, {"a": 1}) as run:
        run.write([{"id": "one", "text": "süß\u2028"}, {"id": "two"}])
    file = tmp_path / "predictions.jsonl"
    file.write_bytes(file.read_bytes() + b'{"id": "three", "te')  # killed while it wrote
    with RunFolder(tmp_path, {"a": 1}) as run:
        assert [record["id"] for record in run.records] == ["one", "two"]
        assert run.records[0]["text"] == "süß\u2028"
        assert "two" in run
        assert "three" not in run
        run.write([{"id": "three"}])
        with pytest.raises(ValueError, match="new to the run, got 'one' again"):
            run.write([{"id": "one"}])
    assert [json.loads(line)["id"] for line in file.read_text().split("\n")[:-1]] == ["one", "two", "three"]


def test_another_configuration_is_refused_by_name(tmp_path):
    RunFolder(tmp_path, {"settings": {"window": 8, "seed": 0}})
    RunFolder(tmp_path, {"settings": {"window": 8, "seed": 0}})
    with pytest.raises(ValueError, match=r"settings.window = 8 and not 9.*Name another folder"):
        RunFolder(tmp_path, {"settings": {"window": 9, "seed": 0}})


def test_time_is_that_of_all_sessions(tmp_path):
    run = RunFolder(tmp_path, {})
    run.write([{"id": "one"}])
    run.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    sessions = [json.loads(line) for line in (tmp_path / "sessions.jsonl").read_text().splitlines()]
    assert [(each["predictions"], each["stopped"]) for each in sessions] == [(1, True)]
    (tmp_path / "sessions.jsonl").write_text('{"seconds": 100.0, "predictions": 1, "stopped": true}\n')
    with RunFolder(tmp_path, {}) as run:
        run.finish(title="Title", metrics={}, table="", seed=5)
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert 100 <= environment["wall_seconds"] < 110
    assert (environment["title"], environment["seed"]) == ("Title", 5)
    assert {"commit", "versions", "device", "cores", "memory_gigabytes"} <= set(environment)
    (tmp_path / "sessions.jsonl").write_text('{"seconds": 100.0, "predictions": 1, "stopped": true}\n')
    with RunFolder(tmp_path, {}) as run:
        run._start -= 50
    run.finish(title="Title", metrics={}, table="", seed=5)  # after its session is on record, which counts once
    assert 150 <= json.loads((tmp_path / "environment.json").read_text())["wall_seconds"] < 160


def test_the_description_of_a_run_follows_weights_and_settings_but_not_the_batch(backbone_folder):
    fields = {"segment_length": 16, "num_retrieved_tokens": 8}
    settings = EvaluationSettings(output="a", model=backbone_folder, config=fields)
    model = open_evaluated(settings)
    found = describe(settings, model)
    assert describe(dataclasses.replace(settings, output="b", batch_size=1), model) == found
    assert describe(dataclasses.replace(settings, window=8), model) != found
    with torch.no_grad():
        next(model.side_network.parameters()).add_(1)
    assert describe(settings, model) != found


def test_a_run_goes_on_with_the_same_model_in_another_place(backbone_folder, tmp_path):
    moved = tmp_path / "moved" / "backbone"
    shutil.copytree(backbone_folder, moved)
    found = []
    for place in (backbone_folder, moved):
        settings = EvaluationSettings(output="a", model=str(place), config={"segment_length": 16})
        model = open_evaluated(settings)
        model.config.name_or_path = str(place)
        found.append(describe(dataclasses.replace(settings, model="name"), model))
        found[-1]["model"].pop("backbone_name_or_path")  # which somebody has chosen
    assert found[0] == found[1]
    before = {"model": {"_name_or_path": "here", "backbone_config": {"_name_or_path": "here"}, "chunk_size": 4}}
    RunFolder(tmp_path / "run", before)
    RunFolder(tmp_path / "run", {"model": {"chunk_size": 4}})
    with pytest.raises(ValueError, match="model.chunk_size = 4 and not 8"):
        RunFolder(tmp_path / "run", {"model": {"_name_or_path": "here", "chunk_size": 8}})


def test_a_run_goes_on_though_the_configuration_got_a_field(tmp_path):
    RunFolder(tmp_path, {"model": {"chunk_size": 4}})
    RunFolder(tmp_path, {"model": {"chunk_size": 4, "start_reads": True, "num_neighbours": 0}})
    with pytest.raises(ValueError, match="model.start_reads = None and not False"):
        RunFolder(tmp_path, {"model": {"chunk_size": 4, "start_reads": False}})


def test_settings_come_from_a_file_and_changes(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("output: results\nsystems: [backbone, on]\n")
    found = load_evaluation(EvaluationSettings, file, ["limit=3", "systems=[off, context-64]", "config.chunk_size=2"])
    assert found.systems == ("off", "context-64")
    assert (found.limit, found.config) == (3, {"chunk_size": 2})
    for change, message in (
        ("systems=[of]", "Did you mean `off`"),
        ("systems=on", "must be a list"),
        ("systems=[1]", "`systems` must be text"),
        ("limit=0", "at least 1"),
        ("windows=3", "Did you mean `window`"),
        ("config.chunk_siz=2", "Did you mean `config.chunk_size`"),
    ):
        with pytest.raises(ValueError, match=message):
            load_evaluation(EvaluationSettings, file, [change])


def test_the_interval_of_a_mean_is_over_groups():
    values = [1.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    alone = clustered_mean(values, list("abcdef"))
    assert alone[0] == pytest.approx(4 / 6)
    assert alone[1:] == bootstrap_interval(torch.tensor(values))  # a group each: the plain bootstrap
    grouped = clustered_mean(values, list("aaabbb"))
    assert grouped[0] == alone[0]
    assert (grouped[1], grouped[2]) == pytest.approx((1 / 3, 1.0))  # only aa, ab, bb can be drawn
    assert clustered_mean(values, list("aaaaaa")) == alone  # a single group: its items
    unequal = clustered_mean([1.0, 0.0, 0.0, 0.0], list("abbb"))
    assert unequal[0] == 0.25  # items count, not groups


def test_strata_count_the_same_and_are_resampled_by_themselves():
    values, groups, strata = [1.0, 0.0, 1.0, 1.0, 1.0, 0.0], list("abcdef"), list("xxyyyy")
    mean, low, high = stratified_mean(values, groups, strata)
    assert mean == pytest.approx((1 / 2 + 3 / 4) / 2)
    assert low < mean < high
    alone = stratified_mean(values[2:], groups[2:], strata[2:])
    assert alone == pytest.approx(clustered_mean(values[2:], groups[2:]))
    sure, *ends = stratified_mean([1.0, 1.0, 0.0, 0.0], list("abcd"), list("xxyy"))  # no draw changes a stratum
    assert (sure, ends) == (0.5, [0.5, 0.5])


def test_an_empty_configuration_of_a_full_disk_does_not_stop_a_run_that_has_no_answers(tmp_path):
    (tmp_path / "config.json").write_text("")
    with pytest.warns(UserWarning, match=r"config\.json can't be read.*Nothing was answered yet"):
        RunFolder(tmp_path, {"a": 1}).write([{"id": "one"}])
    (tmp_path / "config.json").write_text("")
    with pytest.raises(ValueError, match=r"config\.json can't be read.*name another folder"):
        RunFolder(tmp_path, {"a": 1})


def test_a_damaged_answer_is_named(tmp_path):
    RunFolder(tmp_path, {}).write([{"id": "one"}, {"id": "two"}, {"id": "three"}])
    file = tmp_path / "predictions.jsonl"
    file.write_text(file.read_text().replace('{"id": "two"}', '{"id": "two"'))
    with pytest.raises(ValueError, match=r"line 2 of .*predictions\.jsonl.*delete the line"):
        RunFolder(tmp_path, {})


def test_answers_that_found_no_room_are_not_of_the_run(tmp_path, monkeypatch):
    run = RunFolder(tmp_path, {})
    run.write([{"id": "one"}])

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            run.write([{"id": "two"}])
    assert "two" not in run
    run.write([{"id": "two"}, {"id": "three"}])
    assert [record["id"] for record in RunFolder(tmp_path, {}).records] == ["one", "two", "three"]


def saving(folder):
    """Return what goes on with a run to its end, and what checks that it can go on."""
    RunFolder(folder, {"a": 1}).write([{"id": "0"}])

    def save() -> None:
        with RunFolder(folder, {"a": 1}) as run:
            first = len(run.records)
            for number in range(first, first + 2):
                run.write([{"id": str(number), "text": "ü" * 200}])
            run.finish(title="Title", metrics={"count": len(run.records)}, table=f"{len(run.records)}", seed=1)

    def check() -> None:
        records = RunFolder(folder, {"a": 1}).records
        assert [record["id"] for record in records] == [str(number) for number in range(len(records))]
        place = current(folder)
        if (place / "table.md").exists():
            count = json.loads((place / "metrics.json").read_text())["count"]
            assert (place / "table.md").read_text() == str(count)
            assert count <= len(records)

    return save, check


def test_a_run_goes_on_wherever_it_was_killed(tmp_path):
    save, check = saving(tmp_path / "run")
    save()
    with patch("longmem.evaluation.folder.environment", dict):
        assert kill_at_every_change(tmp_path / "run", save, check, every=8) > 3


@pytest.mark.slow
def test_sixty_kills_lose_no_answer(tmp_path):
    save, check = saving(tmp_path / "run")
    with patch("longmem.evaluation.folder.environment", dict):
        kill_at_any_time(save, check, kills=60, seconds=0.2)
        kill_at_every_change(tmp_path / "run", save, check)
