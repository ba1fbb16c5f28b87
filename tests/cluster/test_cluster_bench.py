"""The benchmark of a cluster runs at small sizes, and goes on where it was stopped."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_cluster.py"


@pytest.mark.slow
def test_it_runs_without_ray_and_goes_on(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("bench_cluster", SCRIPT)
    bench = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_cluster", bench)
    spec.loader.exec_module(bench)
    monkeypatch.setattr(bench.torch, "set_num_threads", lambda count: None)
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
