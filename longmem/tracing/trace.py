"""A trace: for each token of a prompt and its answer, what was read of a memory to predict it, and what that changed."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from longmem.files import write_file
from longmem.memory import ChunkPlace
from longmem.memory.checks import INTEGERS, MOST, got, is_integer, validate_text
from longmem.memory.finding import FindableMemory, span_around
from longmem.model.attention import MemoryRead
from longmem.model.memory_attention import refuse_other_encoder
from longmem.model.modeling import LongMemForCausalLM
from longmem.model.reads import Reads, in_pieces, of_one_state, table_of_reads
from longmem.tracing.page import trace_frame, trace_page
from longmem.tracing.words import pieces_of_text

Documents = tuple[
    dict[str, int], dict[str, tuple[int, Tensor]]
]  # sizes; first resident token and ids of those that have them
NOT_OF_ONE = {"num_return_sequences", "return_dict_in_generate", "output_memory_reads"}  # options of other results
CONTEXT_TOKENS = 8  # shown before and after a passage


class TraceRead(NamedTuple):
    """What one token's prediction read of one chunk.

    `weight` is the part of attention that went to the chunk (0 to 1), the mean over reading layers and heads; `layer` and
    `head` are where it was largest.
    """

    document_id: str
    start: int
    stop: int
    weight: float
    layer: int
    head: int


class TracePassage(NamedTuple):
    """Consecutive tokens of a document, around chunks that were read, and the part of attention that went to them.

    `pieces`: their text and that of some tokens before and after, cut where chunks begin and end: pairs of a chunk's place in
    `Trace.places`, -1 for what nobody read, and text. Without token ids in the bank there is no text.
    """

    document_id: str
    start: int
    stop: int
    weight: float
    pieces: list[tuple[int, str]]

    @property
    def text(self) -> str:
        """Return the text of the passage."""
        return "".join(text for _, text in self.pieces)


@dataclasses.dataclass(frozen=True)
class Trace:
    """Who read what while a model wrote, or scored, an answer. Made by `explain`.

    A token's reads are those of the position before it, where it was predicted; the first token has none. The weights of a
    token sum to its share of memory, `memory_shares`: the part of attention that went to memory, the mean over reading layers
    and heads.

    Attributes:
        words: text of each token; joined, they are the text of prompt and answer.
        num_prompt_tokens: so many are the prompt.
        memory_shares: for each token, 0 to 1.
        losses: nats, of each token with memory; NaN for the first.
        losses_without: the same without memory.
        answer_without_memory: what the model writes without it; None where the answer was given.
        places: chunks that were read, each once.
        documents: (id, tokens) of each document that was read, in the order of the memory.
    """

    words: list[str]
    num_prompt_tokens: int
    memory_shares: Float[Tensor, " tokens"]
    losses: Float[Tensor, " tokens"]
    losses_without: Float[Tensor, " tokens"]
    answer_without_memory: str | None
    places: list[ChunkPlace]
    documents: dict[str, int]
    _reads: Reads  # by position: those of token t are those of position t - 1
    _tokenizer: PreTrainedTokenizerBase
    _sources: dict[str, tuple[int, Tensor]]  # first resident token and ids of each document that has them

    def __len__(self) -> int:
        return len(self.words)

    @property
    def answer(self) -> str:
        """Return the answer that was written, or given."""
        return "".join(self.words[self.num_prompt_tokens :])

    @property
    def answer_tokens(self) -> range:
        """Return the numbers of the answer's tokens."""
        return range(self.num_prompt_tokens, len(self))

    def reads(self, token: int) -> list[TraceRead]:
        """Return what was read to predict a token, the largest weight first."""
        own, reads = self._reads_of(token), self._reads
        order = own.start + np.argsort(-reads.weights[own], kind="stable")
        found = []
        for entry in order:
            place, (layer, head) = self.places[reads.chunks[entry]], reads.strongest[entry].tolist()
            weight = float(reads.weights[entry])
            found.append(TraceRead(place.document_id, place.start, place.stop, weight, layer, head))
        return found

    def weights(self, token: int) -> list[tuple[int, float]]:
        """Return the chunks that were read to predict a token, by their places in `places`, and their weights."""
        own = self._reads_of(token)
        return list(zip(self._reads.chunks[own].tolist(), self._reads.weights[own].tolist(), strict=True))

    def passages(self, tokens: Sequence[int] | None = None, count: int = 10) -> list[TracePassage]:
        """Return the passages that were read most to predict these tokens, the largest mean weight first.

        Args:
            tokens: their numbers; None: those of the answer, or of the prompt where there is no answer.
            count: passages at most.
        """
        tokens = self.answer_tokens or range(len(self)) if tokens is None else tokens
        weights = np.zeros(len(self.places))
        for chunk, weight in (read for token in tokens for read in self.weights(token)):
            weights[chunk] += weight
        found = [
            TracePassage(*span, float(weights[chunks].sum()) / max(len(tokens), 1), self.pieces(*span, chunks))
            for span, chunks in self.spans().items()
            if weights[chunks].any()
        ]
        return sorted(found, key=lambda passage: -passage.weight)[:count]

    def to_dict(self, reads_per_token: int = 12) -> dict[str, Any]:
        """Return what the page shows, as plain lists and dictionaries; of each token the `reads_per_token` passages read most.

        `tokens`: text, share of memory, loss with and without it (null where there is none). `reads` and `chunks`: for each
        token pairs of a passage, or a chunk, and its weight. `passages`: number of the document, first token, token after the
        last, and pairs of a chunk, -1 for none, and its text. `documents`: name and tokens. `special`: tokens that are no text.
        """
        spans = self.spans()
        passage_of = {chunk: number for number, chunks in enumerate(spans.values()) for chunk in chunks}
        reads, chunk_reads = [], []
        kept: set[int] = set()
        for token in range(len(self)):
            by_passage: dict[int, float] = defaultdict(float)
            chunks: dict[int, list[tuple[int, float]]] = defaultdict(list)
            for chunk, weight in self.weights(token):
                by_passage[passage_of[chunk]] += weight
                chunks[passage_of[chunk]].append((chunk, weight))
            best = sorted(by_passage.items(), key=lambda each: -each[1])[:reads_per_token]
            kept.update(passage for passage, _ in best)
            reads.append([[passage, round(weight, 6)] for passage, weight in best])
            chunk_reads.append([[chunk, round(weight, 6)] for passage, _ in best for chunk, weight in chunks[passage]])
        documents, special = list(self.documents), set(self._tokenizer.all_special_tokens)
        passages: dict[int, Any] = {}
        for number, ((document_id, start, stop), chunks_of) in enumerate(spans.items()):
            if number in kept:
                pieces = [list(piece) for piece in self.pieces(document_id, start, stop, chunks_of)]
                passages[number] = [documents.index(document_id), start, stop, pieces]
        return {
            "tokens": [
                [word, round(float(share), 5), _rounded(loss), _rounded(without)]
                for word, share, loss, without in zip(
                    self.words, self.memory_shares, self.losses.tolist(), self.losses_without.tolist(), strict=True
                )
            ],
            "prompt": self.num_prompt_tokens,
            "without": self.answer_without_memory,
            "reads": reads,
            "chunks": chunk_reads,
            "passages": passages,
            "documents": [[name, size] for name, size in self.documents.items()],
            "special": [number for number, word in enumerate(self.words) if word in special],
        }

    def to_html(self, path: str | Path | None = None, title: str = "Who read what") -> str:
        """Return a page that shows the trace, in one file without anything from elsewhere; `path`: also write it there."""
        page = trace_page(self.to_dict(), title)
        if path is not None:
            write_file(path, page)
        return page

    def _repr_html_(self) -> str:
        return trace_frame(self.to_dict())

    def __repr__(self) -> str:
        share = float(self.memory_shares[1:].mean()) if len(self) > 1 else 0.0
        return (
            f"Trace({len(self)} tokens, {len(self.answer_tokens)} of them the answer; {len(self.places)} chunks of "
            f"{len(self.documents)} documents read, {share:.1%} of attention)"
        )

    def _reads_of(self, token: int) -> slice:
        if not 0 <= token < len(self):
            raise ValueError(f"`token` must be from 0 to {len(self) - 1}, got {token}.")
        return self._reads.of(token - 1) if token else slice(0, 0)

    def spans(self) -> dict[tuple[str, int, int], list[int]]:
        """Return the spans of passages, with the chunks that begin in each, in the order of the text."""
        spans: dict[tuple[str, int, int], list[int]] = {}
        order = sorted(range(len(self.places)), key=lambda chunk: self.places[chunk][:2])
        for chunk in order:
            document_id, start = self.places[chunk][:2]
            span = document_id, *span_around(start, self.documents[document_id])
            spans.setdefault(span, []).append(chunk)
        return spans

    def pieces(self, document_id: str, start: int, stop: int, chunks: Sequence[int]) -> list[tuple[int, str]]:
        if document_id not in self._sources:
            return [(chunk, self.places[chunk].text or "") for chunk in chunks]
        first, ids = self._sources[document_id]
        # A sentence that passages have cut in two can still be read.
        start, stop = max(start - CONTEXT_TOKENS, first), stop + CONTEXT_TOKENS
        words = pieces_of_text(self._tokenizer, ids[start - first : stop - first].tolist())

        def text(low: int, high: int) -> str:
            return "".join(words[low - start : high - start])

        pieces, at = [], start
        for chunk in chunks:
            low, high = self.places[chunk][1:3]
            pieces += [(-1, text(at, low)), (chunk, text(max(at, low), high))]
            at = max(at, high)
        return [(chunk, part) for chunk, part in [*pieces, (-1, text(at, stop))] if part]


@torch.no_grad()
def explain(
    model: LongMemForCausalLM,
    prompt: str | Sequence[int] | Tensor,
    *,
    memory: FindableMemory,
    answer: str | Sequence[int] | Tensor | None = None,
    max_new_tokens: int | None = None,
    **options: Any,
) -> Trace:
    """Return which passages of a memory are read for each token of a prompt and its answer, and what that changes.

    Args:
        model: answers.
        prompt: text, or token ids, flat or a row of one.
        memory: a bank, a selection of one, or shards. Passages have text where it holds token ids or texts.
        answer: text, or token ids, scored instead of written, right behind the prompt.
        max_new_tokens: of the answer that the model writes, 64 by default; 0: the prompt alone is read.
        options: others of `generate`, such as `do_sample`, that leave one answer.

    Raises:
        ValueError: the prompt is empty, `answer` is given with options of `generate`, or the memory is another model's.

    The answer is written with memory and, for comparison, without; then prompt and answer are read once more by both, in
    pieces of `segment_length` tokens. Weights are exact: what the reading heads gave to each chunk, beside the local context.
    """
    tokenizer = model.tokenizer
    ids = _ids(tokenizer, "prompt", prompt)
    if not ids:
        raise ValueError("`prompt` must hold at least one token, got none.")
    new_tokens = 64 if max_new_tokens is None else max_new_tokens
    if not is_integer(new_tokens, 0, MOST):
        raise ValueError(f"`max_new_tokens` must be 0 or more, an integer, got {got(max_new_tokens)}.")
    asked = sorted(options) + ["max_new_tokens"] * (max_new_tokens is not None)
    if answer is not None and asked:
        raise ValueError(f"`answer` is scored and not written, so {asked} would do nothing; leave them out.")
    for name in NOT_OF_ONE & options.keys():
        raise ValueError(f"`{name}` must be left out of `explain`, which shows one answer, got {got(options[name])}.")
    refuse_other_encoder(model, memory)
    start = torch.tensor([ids], device=model.input_device)
    without = None
    if answer is not None:
        new = _ids(tokenizer, "answer", answer, add_special_tokens=False)
    elif new_tokens:
        written = {"attention_mask": torch.ones_like(start), "max_new_tokens": new_tokens, **options}
        new = model.generate(start, memory=memory, **written)[0, len(ids) :].tolist()
        without = str(tokenizer.decode(model.generate(start, **written)[0, len(ids) :], skip_special_tokens=True))
    else:
        new = []
    whole = torch.tensor([[*ids, *new]], device=model.input_device)
    losses, reads, places, (sizes, sources) = of_one_state(memory, lambda: _read_and_located(model, whole, memory))
    losses_without, _ = _read(model, whole, None)
    shares = np.bincount(reads.positions + 1, reads.weights, minlength=whole.shape[1] + 1)[: whole.shape[1]]
    return Trace(
        words=pieces_of_text(tokenizer, whole[0].tolist()),
        num_prompt_tokens=len(ids),
        memory_shares=torch.from_numpy(shares).float(),
        losses=losses,
        losses_without=losses_without,
        answer_without_memory=without,
        places=places,
        documents=sizes,
        _reads=reads,
        _tokenizer=tokenizer,
        _sources=sources,
    )


def _ids(tokenizer: Any, name: str, given: Any, **options: Any) -> list[int]:
    """Return the token ids of a text, or those that were given. Raises ValueError for anything else."""
    if isinstance(given, str):
        validate_text(name, given)
        return list(tokenizer(given, **options)["input_ids"])
    ids = torch.as_tensor(given) if isinstance(given, Sequence | Tensor | np.ndarray) else torch.zeros(())
    ids = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids
    if ids.ndim != 1 or (ids.dtype not in INTEGERS and ids.numel()):
        raise ValueError(f"`{name}` must be text or one flat sequence of token ids, got {got(given)}.")
    return list(ids.tolist())


def _read_and_located(
    model: LongMemForCausalLM, ids: Int[Tensor, "1 tokens"], memory: FindableMemory
) -> tuple[Float[Tensor, " tokens"], Reads, list[ChunkPlace], Documents]:
    """Return losses, reads, the place of each row that was read, and the documents of these places."""
    losses, read = _read(model, ids, memory)
    reads = table_of_reads(read, ids.shape[1])
    places = [place for place in memory.locate(torch.from_numpy(reads.rows)) if place is not None]
    return losses, reads, places, _documents(memory, {place.document_id for place in places})


def _read(
    model: LongMemForCausalLM, ids: Int[Tensor, "1 tokens"], memory: FindableMemory | None
) -> tuple[Float[Tensor, " tokens"], list[tuple[MemoryRead, ...]]]:
    """Return each token's loss, NaN for the first, and what each piece of the text read."""
    losses, reads, targets = [torch.full((1,), math.nan)], [], ids[0, 1:]
    for output in in_pieces(model, ids, model.config.segment_length, memory):
        own, targets = targets.tensor_split([output.logits.shape[1]])
        losses.append(functional.cross_entropy(output.logits[0, : len(own)].float(), own, reduction="none").cpu())
        if output.memory_reads:
            reads.append(output.memory_reads)
    return torch.cat(losses), reads


def _documents(memory: FindableMemory, wanted: set[str]) -> Documents:
    """Return the tokens of each document, and of those with token ids the first resident token and the ids from there on."""
    sizes: dict[str, int] = {}
    sources: dict[str, tuple[int, Tensor]] = {}
    for bank, names in memory.parts():
        for info in (bank.info(name) for name in names if name in wanted and name not in sizes):
            sizes[info.document_id] = info.num_tokens
            if (ids := bank.token_ids(info.document_id)) is not None:
                sources[info.document_id] = info.first_resident_token, ids
    return sizes, sources


def _rounded(loss: float) -> float | None:
    return round(loss, 3) if math.isfinite(loss) else None
