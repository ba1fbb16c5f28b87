"""What each system sees when a window is scored: tokens in its own window, and what it reads beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from longmem.evaluation.perplexity.memories import DOCUMENT, GrowingMemory
from longmem.evaluation.perplexity.windows import Cut, Window
from longmem.evaluation.systems import Question, RetrievalSystem
from longmem.evaluation.systems.names import context_size
from longmem.evaluation.systems.retrieval import RANKERS
from longmem.evaluation.systems.system import LocalModel
from longmem.memory import MemoryBank
from longmem.memory.protocols import Memory
from longmem.model.modeling import LongMemForCausalLM

PASSAGE_TOKENS = 128
Readable = Memory | GrowingMemory | None


class Passages:
    """Passages of a text, instead of the oldest half of what a window has before its scored tokens.

    They stand before the rest, from the last `memory_tokens` before the window (None: from all), and are ranked by "bm25" or
    "hidden" for the end of what stands before the scored tokens: once for all of them.
    """

    def __init__(
        self,
        name: Any,
        model: LongMemForCausalLM,
        token_ids: Int[Tensor, " tokens"],
        cut: Cut,
        memory_tokens: int | None,
    ) -> None:
        self.token_ids, self.cut, self.memory_tokens = token_ids, cut, memory_tokens
        replaced = cut.lead // 2
        sizes = {"local_tokens": cut.lead - replaced, "passage_tokens": max(1, min(PASSAGE_TOKENS, replaced))}
        # Nothing is pasted but what the replaced tokens leave free.
        self.system = RetrievalSystem(name, model, window=cut.window, pasted_share=0.0, **sizes)

    def before(self, window: Window) -> Int[Tensor, " tokens"]:
        """Return passages, and the newer half of what stands before the scored tokens of a window."""
        first = 0 if self.memory_tokens is None else max(0, window.start - self.memory_tokens)
        first -= first % self.system.passage_tokens  # the same passages for every window
        self.system.read([self.token_ids[first : window.first_scored].tolist()])
        _, ids = self.system.context([], self.cut.stride, [Question([], [[0]])])
        return torch.tensor(ids)


@dataclasses.dataclass(frozen=True)
class View:
    """What a system sees of the windows of a text, to be asked for in order.

    Args:
        model: of which the backbone alone runs where `is_plain`.
        token_ids: the text that windows are counted in.
        memory: what is read; a `GrowingMemory` is asked for what stands before each window.
        context: tokens up to the end of a window that are seen, or as many as there are; default: the window's.
        passages: seen before the scored tokens, but in windows at the start of the text.
        leaving: so many tokens at the start of a window go into `DOCUMENT` of the memory, a bank, when it was read. With
            windows as far apart a token is in the window or in memory, never in both.
    """

    model: LongMemForCausalLM
    token_ids: Int[Tensor, " tokens"]
    memory: Readable = None
    is_plain: bool = False
    context: int | None = None
    passages: Passages | None = None
    leaving: int = 0

    def __post_init__(self) -> None:
        if self.leaving and not isinstance(self.memory, MemoryBank):
            raise ValueError(f"`leaving` needs a MemoryBank as `memory`, got {type(self.memory).__name__}.")

    def of(self, window: Window) -> tuple[LocalModel, Int[Tensor, "1 tokens"]]:
        """Return what runs with what it reads, and its input, which ends with the tokens that are scored."""
        if window.end > len(self.token_ids):
            raise ValueError(f"`window` must end in a text of {len(self.token_ids)} tokens, got {window}; score fewer.")
        memory = self.memory.before(window.start) if isinstance(self.memory, GrowingMemory) else self.memory
        start = window.start if self.context is None else max(0, window.end - self.context)
        ids = self.token_ids[start : window.end]
        if self.passages is not None and window.start:
            ids = torch.cat([self.passages.before(window), self.token_ids[window.first_scored : window.end]])
        model = self.model.backbone if self.is_plain else self.model
        return LocalModel(model, memory), ids[None].to(self.model.input_device)

    def leave(self, window: Window, output: Any) -> None:
        """Write what leaves a window, from what the model returned for it, to a memory that grows so."""
        if self.leaving:
            parts = (output.memory_keys, output.memory_values)
            keys, values = ([layer[0, :, : self.leaving] for layer in part] for part in parts)
            ids = self.token_ids[window.start : window.start + self.leaving]
            self.memory.append(DOCUMENT, keys, values, token_ids=ids)  # type: ignore[union-attr]


def make_views(
    systems: Sequence[str],
    model: LongMemForCausalLM,
    token_ids: Int[Tensor, " tokens"],
    cut: Cut,
    memories: Mapping[str, Readable],
    *,
    memory_tokens: int | None = None,
    is_growing: bool = False,
) -> dict[str, View]:
    """Return what each system sees of the windows of a text; all are scored on the same tokens.

    backbone, off: the window. on, wrong: the window and one of `memories`; with `is_growing`, what leaves the window goes into
    that of "on". context-N: the last N tokens up to the window's end. bm25, hidden: see `Passages`.
    """
    views = {}
    for name in systems:
        options: dict[str, Any] = {"is_plain": name not in ("off", "on", "wrong"), "memory": memories.get(name)}
        if name in RANKERS:
            options["passages"] = Passages(name, model, token_ids, cut, memory_tokens)
        if name.startswith("context-"):
            options["context"] = context_size(name)
        if name == "on" and is_growing:
            options["leaving"] = cut.stride
        views[name] = View(model, token_ids, **options)
    return views
