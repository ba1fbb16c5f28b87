"""LongMem: language models with long-term memory (arXiv 2306.07174), for any Hugging Face causal LM."""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longmem.configuration import LongMemConfig
    from longmem.errors import StaleMemoryError
    from longmem.memory import MemoryBank
    from longmem.model.modeling import LongMemForCausalLM, LongMemModel
    from longmem.streaming import MemoryStream
    from longmem.tracing import explain
    from longmem.training.heads import calibrate_heads

__version__ = "0.1.0"
__all__ = [
    "LongMemConfig",
    "LongMemForCausalLM",
    "LongMemModel",
    "MemoryBank",
    "MemoryStream",
    "StaleMemoryError",
    "calibrate_heads",
    "explain",
]

# torch and transformers take seconds to import, so each name is fetched when it is first used: `longmem --help` needs none.
_HOMES = {
    "LongMemConfig": "longmem.configuration",
    "LongMemForCausalLM": "longmem.model.modeling",
    "LongMemModel": "longmem.model.modeling",
    "MemoryBank": "longmem.memory",
    "MemoryStream": "longmem.streaming",
    "StaleMemoryError": "longmem.errors",
    "calibrate_heads": "longmem.training.heads",
    "explain": "longmem.tracing",
}
_AUTO_CLASSES = "transformers.models.auto.modeling_auto"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'longmem' has no attribute {name!r}")
    _register_models()
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


def _register_models() -> None:
    """Import the modules that tell transformers' Auto classes of our model types."""
    importlib.import_module("longmem.model.modeling")
    importlib.import_module("longmem.official.newgpt")


class _RegisterWithAutoClasses(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The promise that `AutoModelForCausalLM` opens our folders after `import longmem`, kept when it is first needed.

    When a program imports the Auto classes, they are loaded as usual, and then our model types are registered with them.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return a spec for the module of the Auto classes that this loads, None for any other module."""
        if fullname != _AUTO_CLASSES:
            return None
        sys.meta_path.remove(self)  # it is needed once
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Return the module that the usual loader makes."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then register."""
        self.loader.exec_module(module)
        _register_models()


if _AUTO_CLASSES in sys.modules:
    _register_models()
else:
    sys.meta_path.insert(0, _RegisterWithAutoClasses())
