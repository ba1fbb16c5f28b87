"""What neighbours in memory gain in ordinary text: perplexity of windows behind the start of each text, which is in memory.

python experiments/neighbours/books.py my-books/*.txt --window 512 --scored 511
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, which is not installed

from experiments.neighbours.neighbours import NeighbourModel, Store
from longmem import LongMemForCausalLM, MemoryBank
from longmem.evaluation.intervals import perplexity_of, perplexity_reduction
from longmem.evaluation.perplexity.scoring import token_losses
from longmem.evaluation.systems.system import LocalModel
from longmem.evaluation.tasks.files import read_text

SYSTEMS = ("off", "on", "neighbours", "wrong", "wrong neighbours")


@torch.no_grad()
def losses(
    model: LongMemForCausalLM,
    texts: Sequence[Int[Tensor, " _tokens"]],
    memory_tokens: int,
    window: int,
    scored: int,
) -> Float[Tensor, "systems texts"]:
    """Return the mean loss of each system on the last `scored` tokens of a window behind the start of each text.

    The wrong memory is that of the text before, for the first text that of the last one.
    """
    memories: list[tuple[MemoryBank, Store]] = []
    for text in texts:
        bank, start = MemoryBank.for_model(model, capacity_tokens=None), text[:memory_tokens]
        model.memorize(bank, start, "start")
        memories.append((bank, Store.of(model, bank, start.tolist())))
    found = []
    for number, text in enumerate(texts):
        ids = text[None, memory_tokens : memory_tokens + window]
        systems: list[Any] = [LocalModel(model)]
        for bank, store in (memories[number], memories[number - 1]):
            systems += [LocalModel(model, bank), NeighbourModel(LocalModel(model, bank), store)]
        found.append([float(token_losses(each(ids, logits_to_keep=scored + 1).logits, ids).mean()) for each in systems])
    return torch.tensor(found).T


def table(found: Float[Tensor, "systems texts"]) -> str:
    """Return the perplexity of each system, and by how much it is below that of memory off, with a 95 % interval over texts."""
    lines = ["| | perplexity | below memory off, % (95 %) |", "|---|---:|---:|"]
    for name, own in zip(SYSTEMS, found, strict=True):
        share, low, high = perplexity_reduction(own, found[0])
        gain = "" if name == "off" else f"{share:.1f} ({low:.1f} to {high:.1f})"
        lines.append(f"| {name} | {perplexity_of(float(own.mean())):.2f} | {gain} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="+", help="text files, two at least")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--memory-tokens", type=int, default=6144)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--scored", type=int, default=511, help="tokens at the end of a window that are scored")
    given = parser.parse_args()
    model = LongMemForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16).eval()
    needed = given.memory_tokens + given.window
    texts = [
        torch.tensor(model.tokenizer(read_text(path)[: 10 * needed])["input_ids"][:needed]) for path in given.texts
    ]
    if len(texts) < 2 or min(map(len, texts)) < needed or not 0 < given.scored < given.window:
        parser.error(f"needs two texts at least, of {needed} tokens each, and fewer scored tokens than a window has.")
    print(table(losses(model, texts, given.memory_tokens, given.window, given.scored)))


if __name__ == "__main__":
    main()
