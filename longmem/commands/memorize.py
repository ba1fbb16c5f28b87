"""`longmem memorize`: text files into a bank on disk."""

from __future__ import annotations

import argparse
import time

from longmem.commands import opening
from longmem.console import token_progress
from longmem.memory import MemoryBank


def run(arguments: argparse.Namespace) -> None:
    """Add or replace documents, then save the bank in one step.

    Raises:
        ValueError: a name that is there or given twice, an empty or unreadable file, or a bank of another model.
    """
    names = [arguments.id] if arguments.id else [path.name for path in arguments.files]
    if arguments.id and len(arguments.files) > 1:
        raise ValueError(
            f"`--id` names one file, got {len(arguments.files)}; leave it out, or memorize them one by one."
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"files must have different names, got {twice[0]} twice; memorize them one by one with `--id`."
        )
    texts = [opening.read_text(path) for path in arguments.files]
    if blank := [str(path) for path, text in zip(arguments.files, texts, strict=True) if not text.strip()]:
        raise ValueError(f"{blank[0]} holds no text.")
    folder, is_new = arguments.bank, not opening.has_bank(arguments.bank)
    if not is_new:
        if arguments.capacity is not None:
            raise ValueError("`--capacity` is set when a bank is made; leave it out for the one that is there.")
        refuse_known(opening.open_bank(folder), names, arguments.replace)  # before the model is opened
    model_name = arguments.model or opening.model_of_bank(folder) or opening.DEFAULT_MODEL
    console = opening.console_for(arguments.json)
    console.print(f"Opening {model_name} ...")
    model = opening.open_model(model_name)
    with opening.sole_writer(folder):
        capacity = {} if arguments.capacity is None else {"capacity_tokens": arguments.capacity}
        bank = MemoryBank.for_model(model, **capacity) if is_new else opening.open_bank(folder, model)
        refuse_known(bank, names, arguments.replace)
        written = {}
        began = time.perf_counter()
        for name, text in zip(names, texts, strict=True):
            if name in bank:
                bank.delete(name)
            with token_progress(name, console) as report:
                written[name] = model.memorize(bank, text, name, progress=report)
        seconds = time.perf_counter() - began
        bank.save(folder)
        opening.remember_model(folder, model_name)
    lost = sum(info.first_resident_token for info in bank.documents())
    if lost or any(name not in bank for name in names):
        opening.say(
            f"longmem: the bank is full at {bank.capacity_tokens:,} tokens; the oldest made room for the newest."
        )
    if arguments.json:
        opening.print_json(
            {
                "bank": str(folder),
                "model": model_name,
                "written_tokens": written,
                "seconds": round(seconds, 3),
                "bank_tokens": bank.num_tokens,
                "capacity_tokens": bank.capacity_tokens,
            }
        )
        return
    speed = sum(written.values()) / seconds
    console.print(
        f"{folder}: {bank.num_tokens:,} of {bank.capacity_tokens:,} tokens, {bank.nbytes / 1e6:,.0f} MB "
        f"({speed:,.0f} tokens/s)."
    )


def refuse_known(bank: MemoryBank, names: list[str], replace: bool) -> None:
    """Raise ValueError for a document that is there, unless it is to be replaced."""
    if known := [name for name in names if name in bank and not replace]:
        raise ValueError(
            f"the bank already holds a document {known[0]!r}; use `--replace` for a new version of it, or another name "
            "with `--id`."
        )
