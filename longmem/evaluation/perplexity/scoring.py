"""Windows of a text, what each system sees of them, and the loss of every token that is scored."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from longmem.evaluation.intervals import Estimate, bootstrap_interval
from longmem.evaluation.systems import Question, RetrievalSystem
from longmem.evaluation.systems.making import context_size
from longmem.evaluation.systems.retrieval import RANKERS
from longmem.evaluation.systems.system import LocalModel
from longmem.memory import MemoryBank
from longmem.memory.protocols import Memory
from longmem.model.modeling import LongMemForCausalLM


@dataclasses.dataclass(frozen=True)
class Window:
    """The tokens from `start` to `end` of a text, of which those from `first_scored` on are scored."""

    start: int
    first_scored: int
    end: int

    @property
    def num_scored(self) -> int:
        """Return the number of tokens that are scored."""
        return self.end - self.first_scored


@dataclasses.dataclass(frozen=True)
class Cut:
    """A way of cutting texts into windows: `window` tokens each, their starts `stride` tokens apart.

    >>> Cut.parse("1024/512")
    Cut(window=1024, stride=512)
    """

    window: int
    stride: int

    def __post_init__(self) -> None:
        if self.window < 2 or not 1 <= self.stride <= self.window:
            raise ValueError(
                f"a cut must have a `window` of at least 2 tokens and a `stride` from 1 to that, got {self}; 1024/512 is usual."
            )

    @classmethod
    def parse(cls, text: str) -> "Cut":
        """Return the cut written as window/stride."""
        window, _, stride = text.partition("/")
        if not (window.isdecimal() and stride.isdecimal()):
            raise ValueError(f"a cut must be written as window/stride, such as 1024/512, got {text!r}.")
        return cls(int(window), int(stride))

    def __str__(self) -> str:
        """Return it as it is parsed."""
        return f"{self.window}/{self.stride}"

    @property
    def lead(self) -> int:
        """Return the tokens at the start of each window that are context only."""
        return self.window - self.stride

    @property
    def scored(self) -> int:
        """Return the tokens scored in a window of a row; the first token of a window has no prediction."""
        return min(self.stride, self.window - 1)

    def row(self, start: int, count: int) -> list[Window]:
        """Return `count` whole windows, the first of which begins with token `start`; each scores its last tokens.

        >>> Cut(4, 2).row(6, 2)
        [Window(start=6, first_scored=8, end=10), Window(start=8, first_scored=10, end=12)]
        """
        starts = [start + number * self.stride for number in range(count)]
        return [Window(each, each + self.window - self.scored, each + self.window) for each in starts]

    def cover(self, num_tokens: int, limit: int | None = None) -> list[Window]:
        """Return windows of a text of at least two tokens that, all together, score each but the first once; they must overlap.

        The first window scores all that it has but the first token, the last one ends with the text and may be shorter. `limit`
        windows at most are the middles of as many equal parts of the text, so that its start, where memory is empty, weighs no
        more than in the whole text.

        >>> Cut(4, 2).cover(9)  # doctest: +NORMALIZE_WHITESPACE
        [Window(start=0, first_scored=1, end=4), Window(start=2, first_scored=4, end=6),
         Window(start=4, first_scored=6, end=8), Window(start=6, first_scored=8, end=9)]
        """
        count = 1 + -(-max(0, num_tokens - self.window) // self.stride)
        parts = min(count, limit or count)
        starts = [(2 * number + 1) * count // (2 * parts) * self.stride for number in range(parts)]
        return [Window(each, each + self.lead if each else 1, min(each + self.window, num_tokens)) for each in starts]


DOCUMENT = "document"  # the only one of a bank


@dataclasses.dataclass(eq=False)
class GrowingMemory:
    """A bank of the tokens of a text before a place that only moves forward, the latest ones if there are more than fit.

    Tokens are encoded as `memorize` does, in windows of `segment_length` counted from the text's start, `batch_size` at a
    time, and once; those that would be evicted before anything reads them are not encoded. `capacity_tokens` is a multiple of
    the chunk size, at least a `segment_length`; None: no limit.
    """

    model: LongMemForCausalLM
    token_ids: Int[Tensor, " tokens"]
    capacity_tokens: int | None = None
    index: str = "auto"
    batch_size: int = 1
    _bank: MemoryBank | None = dataclasses.field(default=None, init=False)
    _stop: int = dataclasses.field(default=0, init=False)

    def before(self, place: int) -> MemoryBank | None:
        """Return the bank, this object's, of the tokens before `place`, or of as many as there are; None where that is none.

        Raises ValueError if it holds what stands behind `place` already.
        """
        stop = min(place, len(self.token_ids))
        if stop < self._stop:
            raise ValueError(f"`place` must not move back, got {place} after {self._stop}; take a new memory.")
        if stop == self._stop:
            return self._bank
        needed = 0 if self.capacity_tokens is None else max(0, stop - self.capacity_tokens)
        needed -= needed % self.model.config.segment_length  # whole windows, or their tokens would be encoded otherwise
        append = self._bank is not None and needed <= self._stop
        if not append:
            self._bank = MemoryBank.for_model(self.model, capacity_tokens=self.capacity_tokens, index=self.index)
            self._stop = needed
        ids, self._stop = self.token_ids[self._stop : stop], stop
        self.model.memorize(self._bank, ids, DOCUMENT, append=append, batch_size=self.batch_size)  # type: ignore[arg-type]
        return self._bank


class Starts:
    """Banks of the starts of texts, of at most `num_tokens`; `options` are those of `GrowingMemory`.

    Each text is encoded once; what is handed out is a copy, which may grow. The last two texts are kept: the wrong memory of
    one is the right memory of the next.
    """

    def __init__(self, model: LongMemForCausalLM, num_tokens: int, **options: Any) -> None:
        self.model, self.num_tokens, self.options = model, num_tokens, options
        self._encoded: dict[bytes, tuple[MemoryBank, float]] = {}

    def bank(self, token_ids: Int[Tensor, " tokens"], stop: int) -> tuple[MemoryBank, float]:
        """Return a new bank of the first `stop` tokens of a text, and the seconds that it takes to encode them."""
        start = token_ids[: self.num_tokens]
        key = start.numpy().tobytes()
        if key not in self._encoded:
            began = time.perf_counter()
            bank = GrowingMemory(self.model, start, **self.options).before(len(start))
            assert bank is not None  # a text has tokens
            kept = list(self._encoded.items())[-1:]
            self._encoded = dict([*kept, (key, (bank, (time.perf_counter() - began) / len(start)))])
        original, seconds = self._encoded[key]
        bank = original.empty_like()
        self.model.memorize(bank, start[:stop], DOCUMENT, reuse=(original, DOCUMENT))
        return bank, seconds * stop


PASSAGE_TOKENS = 128
Readable = Memory | GrowingMemory | None


@dataclasses.dataclass(frozen=True)
class View:
    """What a system sees of the windows of a text, to be asked for in order.

    Args:
        model: of which the backbone alone runs where `is_plain`.
        token_ids: the text that windows are counted in.
        memory: what is read; a `GrowingMemory` is asked for what stands before each window.
        context: tokens up to the end of a window that are seen, or as many as there are; default: the window's.
        passages: the system whose passages take the place of the oldest half of what a window has before its scored tokens, but
            at the start of the text. They are ranked for the end of that half, once for all scored tokens.
        memory_tokens: of the last so many before the window are passages; None: of all.
        leaving: so many tokens at the start of a window go into `DOCUMENT` of the memory, a bank, when it was read. With
            windows as far apart a token is in the window or in memory, never in both.
    """

    model: LongMemForCausalLM
    token_ids: Int[Tensor, " tokens"]
    memory: Readable = None
    is_plain: bool = False
    context: int | None = None
    passages: RetrievalSystem | None = None
    memory_tokens: int | None = None
    leaving: int = 0

    def __post_init__(self) -> None:
        if self.leaving and not isinstance(self.memory, MemoryBank):
            raise ValueError(f"`leaving` needs a MemoryBank as `memory`, got {type(self.memory).__name__}.")

    def of(self, window: Window) -> tuple[LocalModel, Int[Tensor, "1 tokens"]]:
        """Return what runs with what it reads, and its input, which begins as texts do and ends with the scored tokens."""
        if window.end > len(self.token_ids):
            raise ValueError(f"`window` must end in a text of {len(self.token_ids)} tokens, got {window}; score fewer.")
        memory = self.memory.before(window.start) if isinstance(self.memory, GrowingMemory) else self.memory
        start = window.start if self.context is None else max(0, window.end - self.context)
        ids = self.token_ids[start : window.end]
        if self.passages is not None and window.start:
            first = 0 if self.memory_tokens is None else max(0, window.start - self.memory_tokens)
            first -= first % self.passages.passage_tokens  # the same passages for every window
            self.passages.read([self.token_ids[first : window.first_scored].tolist()])
            room = self.passages.window - (window.first_scored - window.start)  # also of a last window that is shorter
            _, before = self.passages.context([], room, [Question([], [[0]])])
            ids = torch.cat([torch.tensor(before), self.token_ids[window.first_scored : window.end]])
        ids = torch.cat([torch.tensor(self.model.config.missing_start(ids.tolist()), dtype=ids.dtype), ids])
        model = self.model.backbone if self.is_plain else self.model
        return LocalModel(model, memory), ids[None].to(self.model.input_device)

    def leave(self, window: Window, output: Any) -> None:
        """Write what leaves a window, from what the model returned for it, to a memory that grows so."""
        if self.leaving:
            states, size = (output.memory_keys, output.memory_values), window.end - window.start
            keys, values = ([layer[0, :, -size:][:, : self.leaving] for layer in part] for part in states)
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
    that of "on". context-N: the last N tokens up to the window's end. bm25, hidden: `View.passages`.
    """
    views = {}
    for name in systems:
        options: dict[str, Any] = {"is_plain": name not in ("off", "on", "wrong"), "memory": memories.get(name)}
        if name in RANKERS:
            replaced = cut.lead // 2
            sizes = {"local_tokens": cut.lead - replaced, "passage_tokens": max(1, min(PASSAGE_TOKENS, replaced))}
            # Nothing is pasted but what the replaced tokens leave free.
            passages = RetrievalSystem(name, model, window=cut.window, pasted_share=0.0, **sizes)  # type: ignore[arg-type]
            options |= {"passages": passages, "memory_tokens": memory_tokens}
        if name.startswith("context-"):
            options["context"] = context_size(name)
        if name == "on" and is_growing:
            options["leaving"] = cut.stride
        views[name] = View(model, token_ids, **options)
    return views


@dataclasses.dataclass(frozen=True)
class WindowScores:
    """Losses of one system on windows of a text, in nats, one tensor for each window, and what they cost.

    `seconds` are of running the windows, `preparing_seconds` of what went into memory or was indexed for them. `memory_share`
    is the mean weight of memory in the attention of each reading layer and head; None where it was not asked for or read.
    """

    losses: tuple[Float[Tensor, " _scored"], ...]
    seconds: float
    preparing_seconds: float = 0.0
    memory_share: Float[Tensor, "layers heads"] | None = None

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens that were scored."""
        return sum(map(len, self.losses))

    @property
    def loss(self) -> float:
        """Return the mean loss of a token, in nats."""
        return torch.cat(self.losses).double().mean().item()

    def part(self, windows: slice) -> "WindowScores":
        """Return the scores of some windows; as in `last`, the time of a scored token is taken as it was."""
        return self._with(self.losses[windows])

    def last(self, scored: int) -> "WindowScores":
        """Return the scores of the last tokens of every window."""
        return self._with(tuple(window[len(window) - scored :] for window in self.losses))

    def _with(self, losses: tuple[Tensor, ...]) -> "WindowScores":
        share = sum(map(len, losses)) / self.num_tokens
        seconds = {name: getattr(self, name) * share for name in ("seconds", "preparing_seconds")}
        return dataclasses.replace(self, losses=losses, **seconds)


def token_losses(logits: Float[Tensor, "1 kept vocabulary"], ids: Int[Tensor, "1 tokens"]) -> Float[Tensor, " scored"]:
    """Return the loss of the last tokens, as many as logits were kept but one, in float32 on the CPU."""
    targets = ids[0, ids.shape[1] - logits.shape[1] + 1 :]
    return nn.functional.cross_entropy(logits[0, :-1].float(), targets, reduction="none").cpu()


@torch.no_grad()
def score_windows(
    view: View, windows: Sequence[Window], *, with_reads: bool = False, progress: Callable[[int], None] | None = None
) -> WindowScores:
    """Return the losses of a system on the scored tokens of some windows of a text, in its order.

    The mode of the view's model is the caller's business. `with_reads` finds out how much of the attention memory gets;
    `progress` is called after every window, with the number of its scored tokens.
    """
    losses, shares, seconds, preparing = [], [], 0.0, 0.0
    for window in windows:
        start = time.perf_counter()
        local, tokens = view.of(window)
        prepared = time.perf_counter()
        options = {"output_memory_reads": True} if with_reads and local.memory is not None else {}
        options |= {"output_memory_keys": True} if view.leaving else {}
        output = local(tokens, use_cache=False, logits_to_keep=window.num_scored + 1, **options)
        losses.append(token_losses(output.logits, tokens))  # waits for the device
        if with_reads and local.memory is not None and output.memory_reads:
            shares.append(torch.stack([read.memory_share[0].mean(dim=-1) for read in output.memory_reads]).cpu())
        view.leave(window, output)
        preparing += prepared - start
        seconds += time.perf_counter() - prepared
        if progress is not None:
            progress(window.num_scored)
    memory_share = torch.stack(shares).mean(dim=0) if shares else None
    return WindowScores(tuple(losses), seconds, preparing, memory_share)


def loss_difference(scores: WindowScores, baseline: WindowScores, seed: int = 0) -> Estimate:
    """Return by how many nats the loss of `scores` is below that of `baseline`, and its interval over windows."""
    pairs = zip(baseline.losses, scores.losses, strict=True)
    differences = torch.stack([(before - after).mean() for before, after in pairs])
    return differences.double().mean().item(), *bootstrap_interval(differences, seed=seed)
