"""What every test starts from: no network, fixed seeds, and no more threads than cores.

Import nothing of longmem at the top of this file: pytest's --jaxtyping-packages option, which checks shapes, must see
the package's first import.
"""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on a CPU, from Triton's first import on; 0 compiles them

import numpy as np
import pytest
import torch

# Workers that run side by side (pytest -n) share the cores; tiny models gain nothing from more threads than that.
# Cores this process may use, which can be fewer than the machine has: with more threads than that, small products crawl.
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
share = cores // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", share))))

# It imports Triton, which comes with torch for CUDA.
collect_ignore = [] if importlib.util.find_spec("triton") else ["longmem/model/fused_read.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  for code under test that draws from the global generator


@pytest.fixture
def new_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the plug-ins that a test registers when it is over."""
    from longmem.plugins import PLUGINS  # not at the top, see there

    for kind, known in PLUGINS.items():
        monkeypatch.setitem(PLUGINS, kind, dict(known))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process; return its exit code, and what it wrote to standard output and error."""
    from longmem.cli.main import main  # not at the top, see there

    def run_command(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run_command


def pytest_collection_finish() -> None:
    """Leave what is there before the first test out of garbage collections: modules of a gigabyte, looked through each time."""
    gc.collect()
    gc.freeze()
