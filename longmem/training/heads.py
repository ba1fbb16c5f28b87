"""Memory heads: which key-value heads of a backbone look back far, learned in minutes on any text.

Retrieval is a circuit of several heads, so they are chosen together: memory biases, null slots and the distances at which
what is found seems to stand are trained on answers that only memory knows, on the text that is in memory and on texts that are
not, while every bias is pulled down at a constant rate. Heads whose gradient does not hold against the pull help nothing and
are left out; what remains is trained without it. (DuoAttention, arXiv 2410.10819, finds heads by gates with a penalty in a like
way.)
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from longmem.backbone.structure import UnsupportedBackboneError
from longmem.configuration import MOST_NEIGHBOURS
from longmem.data.recall import CHARACTERS_BETWEEN_FACTS, Question, with_facts
from longmem.data.sources import find_source
from longmem.memory.bank import MemoryBank
from longmem.memory.checks import checked, got
from longmem.model.modeling import LongMemForCausalLM
from longmem.settings import Above, From, UpTo, read_section
from longmem.settings.environment import chosen_device
from longmem.training.fewer_heads import with_heads
from longmem.training.setup import reading_layers, select_trained

RATE = 0.2  # of all gates; it falls to 0
RATE_AFTER_CHOICE = 0.1
WARMUP = 3  # steps
START_BIAS, START_NULL = -1.0, 4.0
START_DISTANCE = 512  # tokens; heads go to 150 and to 2,000 from there
FIRST_SHARE = 2 / 15  # of the stack: layers below look at their neighbours
QUESTIONS = 12  # of one step
ITEMS = 12  # facts of a kind that stand together
TOKENS_OF_ANSWER = 8
WINDOWS_BEHIND = 3  # of a text, behind what is in memory
CHARACTERS_PER_TOKEN = 10  # at most, to cut a long text before it is looked at


@dataclasses.dataclass(frozen=True)
class HeadSettings:
    """How memory heads are looked for.

    Args:
        steps: optimizer steps in which all candidates read; half as many follow in which the chosen ones do.
        pull: constant rate at which biases fall, as a share of the learning rate; more of it leaves fewer heads.
        allowed_fall: a head stays whose bias has fallen by no more, in nats, against the pull.
        answer_weight: weight of a nat of answers beside one of text; more of it finds more facts and spares texts less.
        memory_tokens: tokens of a text in memory, some hundred at least, so that facts fit.
        window: tokens that are read beside them, in this search; their second half is scored.
        num_texts: texts that are looked at, the first that are long enough.
        segment_length: tokens of one window of text, in which the model that is returned encodes.
        chunk_size: tokens that are read together; a chunk is found by the best of them.
        choice_per: whether each query head chooses what it reads, or those of a key-value head choose together.
        num_retrieved_tokens: tokens that each head reads.
        num_neighbours: tokens of memory that predict beside the networks in the model that is returned, by what came behind
            them (`LongMemConfig.num_neighbours`); labels of demonstrations need them.
        lora_rank: of the adapters of the model that is returned, which start without effect.
        dtype: of the backbone while it is looked at and afterwards.
        seed: of places, facts and questions.
    """

    steps: Annotated[int, From(1)] = 36
    pull: Annotated[float, Above(0)] = 0.1
    allowed_fall: Annotated[float, From(0)] = 0.2
    answer_weight: Annotated[float, Above(0)] = 0.1
    memory_tokens: Annotated[int, From(512)] = 4096
    window: Annotated[int, From(2)] = 1024
    num_texts: Annotated[int, From(2)] = 8
    segment_length: Annotated[int, From(1)] = 1024
    chunk_size: Annotated[int, From(1)] = 1
    choice_per: Literal["head", "group"] = "head"
    num_retrieved_tokens: Annotated[int, From(1)] = 32
    num_neighbours: Annotated[int, From(0), UpTo(MOST_NEIGHBOURS)] = 64
    lora_rank: Annotated[int, From(1)] = 16
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 0


class Studied(NamedTuple):
    """A text whose first part is in memory: what can be asked about it, and the tokens behind it."""

    bank: MemoryBank
    asked: list[tuple[list[int], list[int]]]  # tokens of a question and how its answer begins, and of the answer
    rest: Tensor  # [tokens]


def validate_call(texts: object, settings: object, console: object) -> None:
    """Raise ValueError for arguments of `calibrate_heads` with which it could not begin."""
    are_texts = isinstance(texts, str | Path) or (
        isinstance(texts, Sequence) and len(texts) > 1 and all(isinstance(each, str) and each.strip() for each in texts)
    )
    if not are_texts or not str(texts).strip():
        raise ValueError(
            f"`texts` must be the name of a source of texts, or a list of at least two, none of them blank, got {got(texts)}; "
            "documents of several thousand tokens are best."
        )
    if not isinstance(settings, HeadSettings):
        raise ValueError(f"`settings` must be a HeadSettings, got {got(settings)}; leave it out for the defaults.")
    try:
        read_section(HeadSettings, dataclasses.asdict(settings))  # types and ranges
    except ValueError as error:
        raise ValueError(f"`settings` must keep the ranges of HeadSettings: {error}") from error
    if not isinstance(console, Console | None):
        raise ValueError(f"`console` must be a Console of rich, got {got(console)}; leave it out to hear nothing.")


@checked
def calibrate_heads(
    backbone: str,
    texts: str | Path | Sequence[str],
    *,
    settings: HeadSettings | None = None,
    console: Console | None = None,
) -> LongMemForCausalLM:
    """Return a model with a new side network whose memory heads, biases, null slots and distances fit its backbone.

    Chunks are found by their best token. All that was trained are three numbers per query head, so it computes exactly what
    the backbone does where nothing is in memory.

    Args:
        backbone: name of a model (`longmem.model.names`), of which the backbone alone is opened.
        texts: at least two texts, or where `longmem train` would find some; documents of several thousand tokens are best.
        settings: how to look; the defaults take some minutes on two cores for a model of 135M parameters.
        console: told how training goes; None: silent.

    Raises:
        ValueError: fewer than two texts that are long enough, or no head that helps.
    """
    settings = HeadSettings() if settings is None else settings
    validate_call(texts, settings, console)
    model = open_candidates(backbone, settings)
    train_gates(model, texts, settings, settings.steps, RATE, settings.pull, console)
    model = with_heads(model, chosen_heads(model, settings.allowed_fall))
    train_gates(model, texts, settings, max(settings.steps // 2, 1), RATE_AFTER_CHOICE, 0.0, console)
    model.config.num_neighbours = settings.num_neighbours
    model.requires_grad_(True)  # of what is trained in a new model, and of nothing else
    return model


def open_candidates(backbone: str, settings: HeadSettings) -> LongMemForCausalLM:
    """Return a new model in which all heads of the upper layers read."""
    options = {"dtype": getattr(torch, settings.dtype)}
    probe = LongMemForCausalLM.from_backbone(backbone, backbone_options=options, lora={"rank": 1})
    first = int(FIRST_SHARE * probe.config.num_backbone_layers)
    storable = probe.backbone_view.structure.storable_layers
    fields: dict[str, Any] = {
        "memory_layers": [layer for layer in storable if layer >= first] or storable[-1:],
        "segment_length": settings.segment_length,
        "forget_sinks": True,
        "start_reads": False,
        "memory_distance": START_DISTANCE,
        "distance_per": "head",
        "search": "token",
        "choice_per": settings.choice_per,
        "chunk_size": settings.chunk_size,
        "num_retrieved_tokens": settings.num_retrieved_tokens,
        "memory_bias_init": START_BIAS,
        "memory_null_init": START_NULL,
        "lora": {"rank": settings.lora_rank},
    }
    model = LongMemForCausalLM.from_backbone(probe.backbone, tokenizer=probe.tokenizer, **fields)
    return model.to(chosen_device()).eval()  # type: ignore[arg-type]  # transformers' decorator hides the signature


def train_gates(
    model: LongMemForCausalLM,
    texts: str | Path | Sequence[str],
    settings: HeadSettings,
    steps: int,
    rate: float,
    pull: float,
    console: Console | None,
) -> None:
    """Train memory biases, null slots and distances; a step sees one text, with its own memory and with another's."""
    generator = random.Random(settings.seed)
    studied = study(model, texts, settings)
    gates = list(select_trained(model, "gates", reads_memory=True).values())
    optimizer = torch.optim.Adam(gates, lr=rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * (1 - step / steps)
    )
    for step in range(steps):
        own = step % len(studied)
        other = (own + generator.randrange(1, len(studied))) % len(studied)
        asked = generator.sample(studied[own].asked, min(QUESTIONS, len(studied[own].asked)))
        start = generator.randrange(len(studied[own].rest) - settings.window + 1)
        window, *_ = model.encoder.with_start(studied[own].rest[None, start : start + settings.window])
        labels = window.clone()
        # With little text before it, every token gains by memory.
        labels[:, : settings.window // 2 - settings.window] = -100
        optimizer.zero_grad()
        answers = answer_loss(model, studied[own].bank, asked)
        (settings.answer_weight * answers).backward()
        is_own = (step + step // len(studied)) % 2 == 0  # each text comes with both, a round later
        text = model(window, labels=labels, memory=studied[own if is_own else other].bank).loss
        text.backward()
        optimizer.step()
        with torch.no_grad():
            for layer in reading_layers(model):
                assert layer.memory_bias is not None
                layer.memory_bias.sub_(pull * schedule.get_last_lr()[0])
        schedule.step()
        if console is not None and not console.quiet:
            with torch.no_grad():
                without = model(window, labels=labels).loss
            whose = "its own" if is_own else "another's"
            console.print(
                f"step {step + 1} of {steps}: loss of answers {answers.item():.2f}; of a text beside {whose} memory "
                f"{text.item() - without.item():+.3f} above that without memory",
                highlight=False,
            )


def answer_loss(model: LongMemForCausalLM, bank: MemoryBank, asked: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """Return the mean loss of the answers' tokens, each behind its question alone."""
    ids = pad_sequence([torch.tensor(question + answer) for question, answer in asked], batch_first=True)
    scored = [torch.tensor([-100] * len(question) + answer) for question, answer in asked]
    labels = pad_sequence(scored, batch_first=True, padding_value=-100)
    device = model.input_device
    return model(ids.to(device), labels=labels.to(device), memory=bank).loss


@torch.no_grad()
def study(model: LongMemForCausalLM, texts: str | Path | Sequence[str], settings: HeadSettings) -> list[Studied]:
    """Memorize the first part of each text with facts hidden in it, and draw questions about them.

    Raises ValueError if fewer than two texts are long enough.
    """
    if isinstance(texts, str | Path):
        source = find_source(texts, text_column="text", split="train", is_bounded=True)
        contents: Iterable[str] = (text for _, text in source.documents())
    else:
        contents = texts
    studied: list[Studied] = []
    looked_at = 0
    for text in contents:
        looked_at += 1
        made = study_one(model, text, settings, random.Random(f"{settings.seed} {looked_at}"))
        studied += [] if made is None else [made]
        if len(studied) == settings.num_texts or looked_at == 8 * settings.num_texts:
            break
    if len(studied) < 2:
        raise ValueError(
            f"`texts` must be at least two of {settings.memory_tokens + settings.window} tokens or more, got "
            f"{len(studied)} among the first {looked_at}; ask for fewer `memory_tokens`, or a smaller `window`."
        )
    return studied


def study_one(model: LongMemForCausalLM, text: str, settings: HeadSettings, generator: random.Random) -> Studied | None:
    """Return what is studied of one text; None if it is too short."""
    wanted_behind = WINDOWS_BEHIND * settings.window
    size = CHARACTERS_PER_TOKEN * (settings.memory_tokens + wanted_behind) + 2 * CHARACTERS_BETWEEN_FACTS
    start = generator.randrange(max(len(text) - size, 0) + 1)

    def tokens(piece: str) -> list[int]:
        return model.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]

    told = behind = ""
    questions: list[Question] = []
    num_told = num_behind = 0
    for piece, askable in with_facts(text[start : start + size], generator, ITEMS):
        if num_told < settings.memory_tokens:
            told += piece
            num_told += len(tokens(piece))
            questions += askable if num_told <= settings.memory_tokens else []
        elif num_behind < wanted_behind and not askable:
            behind += piece
            num_behind += len(tokens(piece))
    kept, rest = tokens(told)[: settings.memory_tokens], tokens(behind)
    if len(kept) < settings.memory_tokens or len(rest) < settings.window or not questions:
        return None
    bank = MemoryBank.for_model(model, capacity_tokens=None, index="flat")
    model.memorize(bank, torch.tensor(kept), "text")
    begin = model.config.start_token_ids or []
    asked = [
        ([*begin, *tokens(each.beginning(generator))], tokens(f" {each.answer}")[:TOKENS_OF_ANSWER])
        for each in questions
    ]
    return Studied(bank, asked, torch.tensor(rest, device=model.input_device))


def chosen_heads(model: LongMemForCausalLM, allowed_fall: float) -> list[tuple[int, int]]:
    """Return the key-value heads, as (layer, head), of which a query head held its bias.

    Raises ValueError if there is none.
    """
    chosen = []
    for layer in reading_layers(model):
        assert layer.memory_bias is not None
        assert layer.memory_layer is not None
        held = (
            layer.memory_bias.detach().unflatten(0, (layer.num_kv_heads, -1)).amax(dim=1) >= START_BIAS - allowed_fall
        )
        chosen += [(layer.memory_layer, head) for head in held.nonzero().flatten().tolist()]
    if not chosen:
        raise UnsupportedBackboneError(
            "no head of the backbone held its memory bias, so none would read; train for more `steps`, with less `pull`, or on "
            "texts that are longer."
        )
    return chosen
