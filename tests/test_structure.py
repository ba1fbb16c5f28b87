"""The house as a whole: no circle of imports, a short front door, a registration that holds however the package is entered."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import grimp
import networkx
import pytest
from kept_fast import fast

import longmem

PACKAGE = Path(longmem.__file__).parent


def test_no_circle_of_imports_those_for_type_checkers_counted() -> None:
    graph = grimp.build_graph("longmem", exclude_type_checking_imports=False)
    # The front door fetches names from the modules below it when they are asked for, and they never import it.
    arrows = networkx.DiGraph(
        (module, imported)
        for module in graph.modules
        for imported in graph.find_modules_directly_imported_by(module)
        if "longmem" not in (module, imported)
    )
    circles = [sorted(part) for part in networkx.strongly_connected_components(arrows) if len(part) > 1]
    assert circles == []


def test_the_front_door_is_short() -> None:
    modules = sorted(path.name for path in PACKAGE.glob("*.py"))
    assert modules == ["__init__.py", "configuration.py", "console.py", "errors.py", "files.py", "plugins.py"]


ENTRANCES = ("longmem", "longmem.memory", "longmem.cli.demo", "longmem.training")
# What takes longest to import is there before the children part; of transformers and longmem nothing is.
ENTER = """
import importlib, os, sys
import faiss, torch._dynamo, torch.distributed.checkpoint, torch.distributed.tensor, torch.export
assert not {"transformers", "longmem"} & set(sys.modules)
for entrance in sys.argv[1:]:
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    importlib.import_module(entrance)
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as known
    print(entrance, *sorted(kind.__name__ for kind in known._extra_content), flush=True)
    os._exit(0)
"""


@pytest.mark.parametrize("entrances", fast(1, [[ENTRANCES[1]], [*ENTRANCES]]), ids=len)
def test_auto_classes_know_our_models_however_the_package_is_entered(entrances: Sequence[str]) -> None:
    done = subprocess.run([sys.executable, "-c", ENTER, *entrances], capture_output=True, text=True, check=False)
    expected = [f"{entrance} LongMemConfig NewGPTConfig" for entrance in entrances]
    assert done.stdout.splitlines() == expected, done.stderr


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    program = "import sys, longmem; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
