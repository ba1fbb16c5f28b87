"""`longmem bank`: look into a saved bank, delete from it. No model is opened."""

from __future__ import annotations

import argparse
import dataclasses

from rich.table import Table

from longmem.commands import opening


def list_documents(arguments: argparse.Namespace) -> None:
    """Print the documents of a bank, in the order in which they were added."""
    documents = opening.open_bank(arguments.bank).documents()
    if arguments.json:
        opening.print_json({"documents": [dataclasses.asdict(info) for info in documents]})
        return
    table = Table("document", box=None, header_style="bold")
    for column in ("tokens", "in memory from token", "chunks"):
        table.add_column(column, justify="right")
    for info in documents:
        numbers = (info.num_tokens, info.first_resident_token, info.num_chunks)
        table.add_row(info.document_id, *(f"{number:,}" for number in numbers))
    opening.console_for(False).print(table if documents else "The bank is empty.")


def show_info(arguments: argparse.Namespace) -> None:
    """Print sizes and settings of a bank."""
    bank = opening.open_bank(arguments.bank)
    files = [path for path in arguments.bank.iterdir() if path.is_file()]
    values = {
        "model": opening.model_of_bank(arguments.bank),
        "documents": len(bank.documents()),
        "tokens": bank.num_tokens,
        "capacity_tokens": bank.capacity_tokens,
        "bytes_on_disk": sum(path.stat().st_size for path in files),
        "memory_layers": list(bank.memory_layers),
        "chunk_size": bank.chunk_size,
        "index": bank.index,
        "eviction": bank.eviction,
        "storage_dtype": str(bank.storage_dtype).removeprefix("torch."),
        "fingerprint": bank.fingerprint,
    }
    if arguments.json:
        opening.print_json(values)
        return
    table = Table(box=None, show_header=False)
    for name, value in values.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    opening.console_for(False).print(table)


def delete_documents(arguments: argparse.Namespace) -> None:
    """Delete documents and save the bank; all of them or, if one is unknown, none."""
    opening.open_bank(arguments.bank)  # before a lock is made in a folder that holds none
    with opening.sole_writer(arguments.bank):
        bank = opening.open_bank(arguments.bank)
        for document_id in arguments.documents:
            bank.delete(document_id)
        bank.save(arguments.bank)
    if arguments.json:
        opening.print_json({"deleted": arguments.documents, "bank_tokens": bank.num_tokens})
    else:
        opening.console_for(False).print(f"{arguments.bank}: {bank.num_tokens:,} tokens left.")
