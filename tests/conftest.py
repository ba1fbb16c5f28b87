"""What every test starts from: no network, fixed seeds, and no more threads than cores.

Import nothing of longmem at the top of this file: pytest's --jaxtyping-packages option, which checks shapes, must see
the package's first import.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch

# Workers that run side by side (pytest -n) share the cores; tiny models gain nothing from more threads than that.
# Cores this process may use, which can be fewer than the machine has: with more threads than that, small products crawl.
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
torch.set_num_threads(max(1, cores // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  for code under test that draws from the global generator
