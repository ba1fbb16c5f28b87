"""What the systems are called, and systems by their names."""

from collections.abc import Mapping, Sequence
from typing import Any

from longmem.errors import did_you_mean
from longmem.evaluation.systems.retrieval import RANKERS, RetrievalSystem
from longmem.evaluation.systems.system import BackboneSystem, Banks, LongBackbone, MemorySystem, System
from longmem.model.modeling import LongMemForCausalLM
from longmem.plugins import PLUGINS, find, import_plugins_of_packages

TITLES = {
    "backbone": "backbone, same window",
    "bm25": "backbone, passages by BM25",
    "hidden": "backbone, passages by hidden states",
    "off": "LongMem, memory off",
    "on": "LongMem, memory on",
    "wrong": "LongMem, wrong memory",
}
SYSTEM_NAMES = (*TITLES, "context-N")


def title_of_system(name: str) -> str:
    """Return what a system is called in tables and figures; one that is not known is called by its name.

    >>> title_of_system("context-8192")
    'backbone, window 8,192'
    """
    kind, _, size = name.partition("-")
    return f"backbone, window {int(size):,}" if kind == "context" and size.isdecimal() else TITLES.get(name, name)


def is_longer_window(name: str) -> bool:
    """Return whether a system is the backbone with a window of its own."""
    return name.startswith("context-")


def context_size(name: str) -> int:
    """Return the N of "context-N". Raises ValueError if it is no number."""
    size = name.partition("-")[2]
    if not size.isdecimal() or not int(size):
        raise ValueError(f"`systems` must write a longer window as context-N, such as context-4096, got {name!r}.")
    return int(size)


def validate_systems(names: Sequence[str]) -> None:
    """Raise ValueError unless these are names of different systems, at least one."""
    if not names or len(set(names)) < len(names):
        raise ValueError(f"`systems` must be at least one, and none twice, got {list(names)}.")
    for name in names:
        if is_longer_window(name):
            context_size(name)
        elif name not in TITLES:
            import_plugins_of_packages()
            known = (*SYSTEM_NAMES, *PLUGINS["system"])
            if name not in PLUGINS["system"]:
                close = did_you_mean(name, known)
                raise ValueError(f"`systems` must be among {', '.join(known)}, got {name!r}.{close}")


def make_systems(
    names: Sequence[str],
    model: LongMemForCausalLM,
    *,
    window: int,
    local_tokens: int = 0,
    batch_size: int = 16,
    banks: Banks | None = None,
    retrieval: Mapping[str, Any] | None = None,
) -> list[System]:
    """Return the systems with these names, in their order; those that read memory share banks, by default new ones.

    Names: "backbone", "context-N" for the backbone with N tokens in its window, "bm25" and "hidden" for passages pasted into
    the backbone's window, "off", "on" and "wrong" for LongMem, or a "system" of `longmem.plugins`. All but "context-N" see
    `window` tokens at once; for the other options see `System` and, for those in `retrieval`, `RetrievalSystem`. Raises
    ValueError if a name is unknown or given twice, or a longer window does not fit the backbone.
    """
    validate_systems(names)
    validate_window(model, window)
    banks = Banks(model) if banks is None else banks
    common: dict[str, Any] = {"window": window, "local_tokens": local_tokens, "batch_size": batch_size}
    systems: list[System] = []
    for name in names:
        if name == "backbone":
            systems.append(BackboneSystem(name, model, **common))
        elif name in RANKERS:
            systems.append(RetrievalSystem(name, model, **common, **(retrieval or {})))  # type: ignore[arg-type]
        elif name.startswith("context-"):
            size = context_size(name)
            validate_context(model, size, window)
            systems.append(LongBackbone(name, model, window=size, batch_size=batch_size))
        elif name in TITLES:
            systems.append(MemorySystem(name, model, banks=banks, **common))
        else:
            systems.append(find("system", name)(name, model, **common))
    return systems


def validate_window(model: LongMemForCausalLM, window: int) -> None:
    """Raise ValueError unless the backbone has positions for a window and the start tokens before it."""
    start, limit = model.config.start_token_ids or (), model.backbone_view.position_limit
    if limit is not None and window + len(start) > limit:
        raise ValueError(
            f"`window` must leave {len(start)} of the backbone's {limit} positions for the model's `start_token_ids`, got "
            f"{window}; {limit - len(start)} would do."
            if start
            else f"`window` must be at most the backbone's {limit} positions, got {window}."
        )


def validate_context(model: LongMemForCausalLM, context: int, window: int) -> None:
    """Raise ValueError unless `context` tokens are more than a window and fit the backbone's positions."""
    if context <= window:
        raise ValueError(f"`context` must be longer than the window of {window} tokens, got {context}; leave it out.")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    most = None if limit is None else limit - len(model.config.start_token_ids or ())
    if most is not None and context > most:
        beside = "" if most == limit else " less the model's `start_token_ids`"
        raise ValueError(
            f"`context` must be at most {most} tokens, the backbone's `max_position_embeddings`{beside}, got {context}: beyond "
            "it the backbone meets positions that it was never trained on; choose a shorter one."
        )
