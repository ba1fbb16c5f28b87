"""What each system sees when a window is scored: tokens in its own window, and what it reads beside them."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from longmem.evaluation.documents.growing import GrowingMemory
from longmem.evaluation.documents.settings import PerplexitySettings
from longmem.evaluation.documents.texts import ScoredText
from longmem.evaluation.documents.windows import Window
from longmem.evaluation.systems import Question, RetrievalSystem
from longmem.evaluation.systems.making import context_size
from longmem.evaluation.systems.retrieval import RANKERS
from longmem.evaluation.systems.system import LocalModel
from longmem.model.modeling import LongMemForCausalLM

PASSAGE_TOKENS = 128


class Views:
    """What systems see of the windows of one document, to be asked for in order.

    - backbone, off: the window.
    - on: the window, and in memory the tokens of the document before it.
    - wrong: the window, and in memory as many tokens of the other document, or as many as that has.
    - context-N: the last N tokens up to the end of the window, or as many as there are.
    - bm25, hidden: instead of the oldest half of what a window has before its scored tokens, passages of the document that
      stand before the rest. The query is the end of what stands before the scored tokens: one for all of them.

    What does not stand in the window is read from the last `memory_tokens` before it by all systems that look back so far.

    Args:
        model: runs.
        text: the document, and the other one.
        settings: of the evaluation.
    """

    def __init__(self, model: LongMemForCausalLM, text: ScoredText, settings: PerplexitySettings) -> None:
        self.model = model
        self.token_ids = text.text.token_ids
        self.settings = settings
        options: dict[str, Any] = {
            "capacity_tokens": settings.memory_tokens,
            "index": settings.index,
            "batch_size": settings.batch_size,
        }
        self.memories = {
            "on": GrowingMemory(model, self.token_ids, **options),
            "wrong": GrowingMemory(model, text.wrong.token_ids, **options),
        }
        replaced = settings.lead // 2
        retrieval: dict[str, Any] = {
            "window": settings.window,
            "local_tokens": settings.lead - replaced,
            "passage_tokens": max(1, min(PASSAGE_TOKENS, replaced)),
            "pasted_share": 0.0,  # nothing but what the replaced tokens leave free
        }
        self.retrieval = {
            name: RetrievalSystem(name, model, **retrieval)  # type: ignore[arg-type]
            for name in RANKERS
            if name in settings.systems
        }

    def of(self, system: str, window: Window) -> tuple[LocalModel, Int[Tensor, "1 tokens"]]:
        """Return what runs, and its input, which ends with the tokens that are scored."""
        start, end = window.start, window.end
        if system in self.memories:
            local = LocalModel(self.model, self.memories[system].before(start))
        else:
            local = LocalModel(self.model if system == "off" else self.model.backbone)
        if system.startswith("context-"):
            start = max(0, end - context_size(system))
        ids = self.token_ids[start:end]
        if system in self.retrieval and start:
            ids = torch.cat([self._with_passages(system, window), self.token_ids[window.first_scored : end]])
        return local, ids[None].to(self.model.input_device)

    def _with_passages(self, name: str, window: Window) -> Int[Tensor, " tokens"]:
        """Return passages, and the newer half of what stands before the scored tokens."""
        system = self.retrieval[name]
        most = self.settings.memory_tokens
        first = 0 if most is None else max(0, window.start - most)
        first -= first % system.passage_tokens  # the same passages for every window
        system.read([self.token_ids[first : window.first_scored].tolist()])
        _, ids = system.context([], self.settings.stride, [Question([], [[0]])])
        return torch.tensor(ids)
