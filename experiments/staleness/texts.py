"""Real text with a stale memory: the backbone was fine-tuned since the bank was written, and every policy reads on.

For each text a bank holds the tokens before some windows, written by the original backbone. The windows are then read one
after the other with the tuned backbone, under each refresh policy, each from its own copy of the bank.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Int
from rich.console import Console
from torch import Tensor

import experiments.mapped_refresh  # noqa: F401  registers the policy "mapped"
from experiments.staleness.policies import copy_bank
from experiments.staleness.tuning import tuned_backbone
from longmem.data import load_corpus
from longmem.data.sources import files_of_split
from longmem.evaluation.folder import RunFolder, describe, digest
from longmem.evaluation.perplexity.scoring import token_losses
from longmem.evaluation.perplexity.texts import token_digest
from longmem.evaluation.settings import Count, EvaluationSettings
from longmem.memory import MemoryBank
from longmem.memory.refresh import refresh_name
from longmem.model.modeling import LongMemForCausalLM
from longmem.settings import Above, From

# "off" reads nothing, "oracle" a bank written by the tuned backbone, "never" the old bank as it is.
UNREFRESHED = ("off", "oracle", "never")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaleTextSettings(EvaluationSettings):
    """How the backbone changes, and which texts are read under which policies."""

    data: str
    """Texts that are read: whatever `load_corpus` reads, or a JSON list of objects with `file`, beside it, and `split`."""

    split: str = "validation"
    """Split of a JSON list."""

    tuning_data: str = "python-manual"
    """Text that the backbone is tuned on."""

    learning_rates: tuple[Annotated[float, Above(0)], ...] = (2e-4, 1e-3)
    """One change of the encoder for each: all weights, AdamW, constant rate."""

    tuning_steps: Count = 30
    """Optimizer steps, each on one window of `window` tokens."""

    seeds: tuple[Annotated[int, From(0)], ...] = (0, 1, 2)
    """Of the windows that the backbone is tuned on."""

    texts: Count = 3
    """Texts that are read, the first ones that are long enough."""

    memory_tokens: Count = 8192
    """Tokens before the first window that are in memory."""

    windows: Count = 4
    """Windows of each text, one after the other."""

    policies: tuple[str, ...] = ("eager", "lazy", "mapped")
    """Refresh policies, as a bank names them; beside them memory off, a fresh bank, and the old one as it is."""

    def __post_init__(self) -> None:
        """Check the names of policies."""
        for name in self.policies:
            refresh_name(name)


def evaluate_stale_texts(settings: StaleTextSettings, model: LongMemForCausalLM, console: Console) -> RunFolder:
    """Read every text after every change of the encoder under every policy, and return the folder with the records.

    Raises:
        ValueError: there are fewer long texts than asked for, or the folder holds another run.
    """
    texts = read_long_texts(settings, model)
    tuning = torch.cat(list(token_ids_of(settings.tuning_data, "train", model)))
    data = {"texts": digest([token_digest(each) for each in texts.values()]), "tuning": token_digest(tuning)}
    run = RunFolder(settings.output, describe(settings, model, data))
    with run:
        for seed in settings.seeds:
            for rate in settings.learning_rates:
                waiting = {name: ids for name, ids in texts.items() if not is_read(settings, run, rate, seed, name)}
                if not waiting:
                    continue
                keep_in = run.path / "tuned" / f"{rate:g}-{seed}.safetensors"
                console.print(f"Encoder tuned at {rate:g}, seed {seed}", highlight=False)
                backbone = tuned_backbone(
                    model.backbone,
                    tuning,
                    steps=settings.tuning_steps,
                    learning_rate=rate,
                    window=settings.window,
                    seed=seed,
                    keep_in=keep_in,
                )
                reader = with_backbone(model, backbone)
                for name, ids in waiting.items():
                    common = {"learning_rate": rate, "seed": seed, "text": name}
                    console.print(f"  {name}", highlight=False)
                    read_text(settings, model, reader, ids, common, run)
    return run


def reading_id(rate: float, seed: int, text: str, system: str) -> str:
    """Return the id of a record: one system's reading of a text after one change of the encoder."""
    return f"{rate:g}/{seed}/{text}/{system}"


def is_read(settings: StaleTextSettings, run: RunFolder, rate: float, seed: int, text: str) -> bool:
    """Return whether the folder has the records of all systems for a text after one change of the encoder."""
    return all(reading_id(rate, seed, text, system) in run for system in (*UNREFRESHED, *settings.policies))


def read_text(
    settings: StaleTextSettings,
    writer: LongMemForCausalLM,
    reader: LongMemForCausalLM,
    ids: Int[Tensor, " tokens"],
    common: Mapping[str, Any],
    run: RunFolder,
) -> None:
    """Read one text under every policy that the folder does not have yet."""
    memory, rest = ids[: settings.memory_tokens], ids[settings.memory_tokens :]
    old = written(writer, memory)
    fresh_rows: list[Tensor] = []
    for name in (*UNREFRESHED, *settings.policies):
        record_id = reading_id(common["learning_rate"], common["seed"], common["text"], name)
        if record_id in run and name != "oracle":  # which rows it reads is what the others are compared with
            continue
        start = time.perf_counter()
        if name == "off":
            bank = None
        elif name == "oracle":
            bank = written(reader, memory)
        else:
            bank = copy_bank(old)
            if name == "never":
                bank.freshness.read_as_is(reader)
            else:
                bank.freshness.use(name)
        losses, recalls = [], []
        for window, (loss, rows) in enumerate(read_windows(reader, rest, settings.window, settings.windows, bank)):
            losses.append(loss)
            if name == "oracle":
                fresh_rows.append(rows)
            elif bank is not None:
                # A bank in which nothing may be read is not read at all.
                recalls.append(recall_of(rows, fresh_rows[window]) if len(rows) else 0.0)
        if record_id not in run:
            done = {} if bank is None else dataclasses.asdict(bank.freshness.refreshed)
            tokens = len(memory) if name == "oracle" else done.get("tokens", 0) + done.get("probed_tokens", 0)
            values = {
                "losses": losses,
                "recalls": recalls or None,
                "tokens": tokens,
                "seconds": time.perf_counter() - start,
                "gap": None if bank is None or name == "oracle" else bank.freshness.lags("gap").values[0].item(),
            }
            run.write([{"id": record_id, **common, "system": name, **values, "refreshed": done}])


def read_windows(
    model: LongMemForCausalLM, ids: Int[Tensor, " tokens"], window: int, count: int, bank: MemoryBank | None
) -> Iterator[tuple[float, Tensor]]:
    """Yield for each window its mean loss in nats, and the rows of chunks that were read (empty without memory)."""
    for number in range(count):
        tokens = ids[None, number * window : (number + 1) * window].to(model.input_device)
        with torch.no_grad():  # not around the generator, which would leave it between two windows
            output = model(tokens, memory=bank, output_memory_reads=True)
        rows = [read.rows[0].cpu() for read in output.memory_reads or ()]
        loss = float(token_losses(output.logits, tokens).double().mean())
        yield loss, torch.stack(rows) if rows else torch.empty(0, dtype=torch.int64)


def recall_of(rows: Int[Tensor, "*where chunks"], wanted: Int[Tensor, "*where chunks"]) -> float:
    """Return the share of the chunks wanted that are among those read, for the same queries.

    >>> recall_of(torch.tensor([[3, 5, -1]]), torch.tensor([[5, 3, 4]]))
    0.6666666666666666
    """
    found = (wanted.unsqueeze(-1) == rows.unsqueeze(-2)).any(dim=-1)
    return found[wanted >= 0].double().mean().item()


def written(model: LongMemForCausalLM, ids: Int[Tensor, " tokens"]) -> MemoryBank:
    """Return a bank with one document, written by the model's encoder."""
    bank = MemoryBank.for_model(model, capacity_tokens=None, index="flat")
    model.memorize(bank, ids, "text")
    return bank


def with_backbone(model: LongMemForCausalLM, backbone: Any) -> LongMemForCausalLM:
    """Return a model that reads with the same trained weights beside another backbone of the same architecture.

    With LoRA the copied layers are the other backbone's, and the adapters this model's.
    """
    reader = LongMemForCausalLM(model.config, backbone, model.tokenizer)
    trained = model.side_state_dict()
    reader.load_side_state_dict(trained)
    return reader.eval()


def read_long_texts(settings: StaleTextSettings, model: LongMemForCausalLM) -> dict[str, Int[Tensor, " tokens"]]:
    """Return the texts by name, cut to what is read.

    Raises:
        ValueError: too few are long enough.
    """
    length = settings.memory_tokens + settings.windows * settings.window
    found: dict[str, Tensor] = {}
    for ids in token_ids_of(settings.data, settings.split, model):
        if len(ids) >= length:
            found[f"text {len(found) + 1}"] = ids[:length]
        if len(found) == settings.texts:
            return found
    raise ValueError(
        f"`data` must hold {settings.texts} texts of {length:,} tokens, got {len(found)} in {settings.data!r}; ask for fewer "
        "`texts`, or less memory."
    )


def token_ids_of(data: str, split: str, model: LongMemForCausalLM) -> Iterator[Int[Tensor, " tokens"]]:
    """Yield the token ids of each document."""
    files: Sequence[Any] = files_of_split(data, split) if Path(data).suffix == ".json" else [data]
    for file in files:
        for row in load_corpus(file, model.tokenizer):
            yield torch.tensor(row["input_ids"])
