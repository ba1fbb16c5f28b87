"""Checks of shapes in the modules of the experiments, as pytest's --jaxtyping-packages option puts them into the package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

# Not in the tests beside them: a module can be loaded in one special way only, and pytest has its own for tests.
HERE = Path(__file__).parent
MODULES = [f"experiments.{path.parent.name}.{path.stem}" for path in HERE.glob("*/*.py") if path.stem[:5] != "test_"]
install_import_hook(
    [name for name in MODULES if not name.endswith(("__init__", "conftest"))], "shape_checks.check_shapes"
)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Products this small gain nothing from a second thread, and crawl where it has to wait for a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
