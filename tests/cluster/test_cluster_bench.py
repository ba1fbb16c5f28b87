"""Benchmarks of a cluster, and of an encoder of its own, go on where they were stopped."""

from __future__ import annotations

import importlib.util
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.slow


def opened(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # for what one takes from another
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    bench = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, bench)
    spec.loader.exec_module(bench)
    monkeypatch.setattr(bench.torch, "set_num_threads", lambda count: None)
    return bench


def test_it_runs_without_ray_and_goes_on(tmp_path, monkeypatch, capsys):
    bench = opened("bench_cluster", monkeypatch)
    path = tmp_path / "results.json"

    def run(*shards: str) -> list[dict]:
        options = ["--without-ray", "--tokens", "512", "--shards", *shards, "--output", str(path)]
        monkeypatch.setattr(sys, "argv", ["bench_cluster.py", *options])
        bench.main()
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    (first,) = run("1")
    done = run("1", "2")  # as after an interruption: what the file has is not measured again
    assert [each["shards"] for each in done] == [2]
    assert json.loads(path.read_text())["reading"] == [first, *done]
    for each in (first, *done):
        assert each["64_tokens_in_1_trips"]["ratio"] == pytest.approx(1, abs=0.2)
        assert each["64_tokens_in_2_trips"]["ratio"] == pytest.approx(1, abs=0.2)
        assert each["64_tokens_in_1_trips"]["same_rows"] > 0.95
    assert run("1", "2") == []


def test_rounds_of_an_encoder_of_its_own_are_kept_and_go_on(tmp_path, monkeypatch, capsys):
    bench = opened("bench_encode_ahead", monkeypatch)
    trained, path = [], tmp_path / "results.json"
    trainer = SimpleNamespace(frozen=None, step=0)
    monkeypatch.setattr(bench, "Trainer", lambda settings: trainer)
    monkeypatch.setattr(bench, "Elsewhere", lambda *given: SimpleNamespace(process=ThreadPoolExecutor(1)))
    monkeypatch.setattr(bench, "block", lambda *given: trained.append(given[1:3]))

    def run(rounds: int, *more: str) -> dict:
        options = ["--rounds", str(rounds), "--steps", "7", "--output", str(path), *more]
        monkeypatch.setattr(sys, "argv", ["bench_encode_ahead.py", *options])
        monkeypatch.chdir(BENCHMARKS.parent)
        trained.clear()
        bench.main()
        return json.loads(path.read_text())["result"]["seconds_per_block"]

    first = run(1)
    warm, block = [(1, 0), (1, 2), (1, 2)], [(7, 0), (7, 2), (7, 2)]  # steps, and batches ahead, of the three kinds
    assert trained == [*warm, *block]
    later = run(2)
    assert trained == [*warm, *block]
    assert {name: kept[:1] for name, kept in later.items()} == first
    assert run(2) == later
    assert not trained
    with pytest.raises(SystemExit):
        run(3, "--window", "128")
    assert "must be a new file or that of the same command" in capsys.readouterr().err
