"""Two processes do what one does with the same lanes."""

from __future__ import annotations

import pytest
from processes import run
from safetensors.torch import load_file
from tiny_runs import make_files

from longmem.training.records import read_log

SHORT = (4, 6, 9, 13, 5, 22, 30, 7, 11, 18)  # rows of one batch have unequal numbers of targets


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"), SHORT)


def same_runs(folder, other):
    found, expected = read_log(folder).steps, read_log(other).steps
    assert [record.step for record in found] == [record.step for record in expected]
    for record, like in zip(found, expected, strict=True):
        assert record.loss == pytest.approx(like.loss, rel=2e-5)
        assert record.backbone_loss == pytest.approx(like.backbone_loss, rel=2e-5)
        assert record.gradient_norm == pytest.approx(like.gradient_norm, rel=2e-3)
        assert record.memory_tokens == like.memory_tokens
        assert record.tokens == like.tokens
    weights, others = (load_file(each / "side-network" / "model.safetensors") for each in (folder, other))
    for name, weight in weights.items():
        assert (weight - others[name]).abs().max() < 2e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [False, True])
def test_two_processes_equal_one(files, tmp_path, nodes):
    settings = ["data.validation=null", "optimization.gradient_accumulation=2"]
    codes, output = run(files, tmp_path / "two", 2, *settings, nodes=nodes)
    assert codes == [0, 0], output
    assert output.count("step 6/6") == 1  # the first process alone tells
    codes, output = run(files, tmp_path / "one", 1, *settings)
    assert codes == [0], output
    same_runs(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(files, tmp_path, before, after):
    settings = ["data.validation=null", "checkpoints.every_steps=4"]
    codes, output = run(files, tmp_path / "both", before, *settings)
    assert codes == [0] * before, output
    # What a kill in step 6 would leave: the checkpoint of step 4.
    newest = tmp_path / "both" / "checkpoints" / "step-6"
    newest.rename(newest.with_name("later"))
    codes, output = run(files, tmp_path / "both", after, *settings)
    assert codes == [0] * after, output
    codes, output = run(files, tmp_path / "one", 1, *settings)
    assert codes == [0], output
    same_runs(tmp_path / "both", tmp_path / "one")


@pytest.mark.slow
def test_lanes_that_processes_cannot_share(files, tmp_path):
    codes, output = run(files, tmp_path / "run", 2, "data.lanes=3", "data.validation=null")
    assert 0 not in codes
    assert "must be a multiple of the number of processes, got 3 and 2; the next above is 4." in output
