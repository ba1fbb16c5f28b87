"""The benchmark for a GPU runs whole on a CPU at tiny sizes, so that whoever has a GPU needs one command."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from longmem.settings.environment import DEVICE

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bench_gpu.py"


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Return a function that runs the script with some arguments, and returns what it wrote."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # as where a script is run
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_gpu", module)
    spec.loader.exec_module(module)
    token = DEVICE.set("auto")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *arguments, "--output", str(tmp_path)])
        module.main()
        return json.loads((tmp_path / "results.json").read_text()), (tmp_path / "table.md").read_text()

    yield run
    DEVICE.reset(token)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_all_of_it_runs(bench, device):
    results, table = bench("--small", "--device", device)
    assert results["left_out"] == []
    assert torch.device(results["device"]).type == device
    rows = results["results"]
    assert {row["section"] for row in rows} == {
        "correctness",
        "memorizing",
        "reading",
        "decoding",
        "training",
        "search",
    }
    figures = [value for row in rows for name, value in row.items() if name not in ("section", "what")]
    assert all(value == value and abs(value) < 1e15 for value in figures)
    decoding = [row for row in rows if row["section"] == "decoding"]
    assert [row["what"].partition(",")[0] for row in decoding] == ["tiny"] * 2
    assert all(0 < row["of_plain"] < 100 and row["bank_bytes"] > 0 for row in decoding)
    assert decoding[0]["long_cache_bytes"] == 4 * 2 * 2 * 256 * 8 * (4 if device == "cpu" else 2)
    assert len(table.splitlines()) == len(rows) + 2
    assert results["environment"]["versions"]["torch"] == torch.__version__


def test_what_has_no_time_or_no_room_is_named(bench, monkeypatch):
    results, _ = bench("--small", "--device", "cpu", "--minutes", "0", "--only", "reading", "search")
    assert results["results"] == []
    assert results["left_out"] == ["reading, tiny: no time left", "search, tiny: no time left"]

    def refuse(*given, **options):
        raise torch.OutOfMemoryError("no room. And more")

    monkeypatch.setattr(sys.modules["bench_gpu"], "random_bank", refuse)
    results, _ = bench("--small", "--device", "cpu", "--only", "reading")
    assert results["left_out"] == ["reading, tiny, 256: no room", "reading, tiny, 1,024: no room"]


def test_a_device_that_computes_otherwise_is_told(bench, monkeypatch):
    module = sys.modules["bench_gpu"]
    make, made = module.random_model, []

    def other(*given, **options):
        model = make(*given, **options)
        made.append(model)
        if len(made) == 2:
            with torch.no_grad():
                next(iter(model.backbone.parameters())).mul_(1.1)
        return model

    monkeypatch.setattr(module, "random_model", other)
    with pytest.raises(AssertionError, match="cpu and CPU differ"):
        bench("--small", "--device", "cpu", "--only", "correctness")
