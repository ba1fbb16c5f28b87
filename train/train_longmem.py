"""Adapt a side network to a text file, or to every *.txt of a folder, and save it.

    python train/train_longmem.py book.txt --output my-longmem --steps 40
    python train/train_longmem.py books/ --output my-longmem --max-minutes 30 chunk_size=8

Documents never share a memory. `OUTPUT/adaptation.jsonl` has a line per step.
"""

import argparse
from pathlib import Path

import torch

from longmem.commands.opening import console_for, open_model, parse_settings, read_text
from longmem.console import token_progress
from longmem.training import AdaptationStep, adapt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="text file, or folder with *.txt files")
    parser.add_argument("settings", nargs="*", help="settings of LongMemConfig as key=value, for a new side network")
    parser.add_argument("--backbone", default="smollm2-135m", help="backbone, or folder of a saved LongMem model")
    parser.add_argument("--output", type=Path, required=True, help="folder for side network and log")
    parser.add_argument("--window", type=int, default=512, help="tokens of a step")
    parser.add_argument("--steps", type=int, help="default: each window once")
    parser.add_argument("--max-minutes", type=float)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--memory-tokens", type=int, default=65_536, help="capacity of the memory of a document")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_intermixed_args()

    torch.manual_seed(arguments.seed)
    files = sorted(arguments.text.glob("*.txt")) if arguments.text.is_dir() else [arguments.text]
    model = open_model(arguments.backbone, **parse_settings(arguments.settings))
    documents = [torch.tensor(model.tokenizer(read_text(file), verbose=False)["input_ids"]) for file in files]
    arguments.output.mkdir(parents=True, exist_ok=True)
    with token_progress("adapting", console_for(as_json=False)) as report:

        def report_step(entry: AdaptationStep, total: int) -> None:
            report(entry.step * entry.tokens, total * entry.tokens)

        adapt(
            model,
            documents,
            window=arguments.window,
            steps=arguments.steps,
            max_seconds=None if arguments.max_minutes is None else 60 * arguments.max_minutes,
            learning_rate=arguments.learning_rate,
            bank_capacity=arguments.memory_tokens,
            log_file=arguments.output / "adaptation.jsonl",
            progress=report_step,
        )
    model.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
