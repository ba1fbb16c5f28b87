"""`longmem bank`: its actions and, as far as no model is needed, their work: look into a bank, label, delete, check, export."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from longmem.cli import common, find, memorize, staleness, tune
from longmem.cli.common import add_command, add_group, bank_folder, option
from longmem.cli.texts import export_line
from longmem.files import new_file

if TYPE_CHECKING:
    from longmem.memory import DocumentInfo, MemoryBank

BANK_EXAMPLES = """\
  longmem bank add notes.txt --bank memory --tag notes     read documents into a bank (`longmem memorize`)
  longmem bank list --bank memory --tag notes              documents, their tokens, what is still there
  longmem bank find "locker code" --bank memory            passages that have to do with a text
  longmem bank update notes.txt --bank memory              a new version: what did not change is copied
  longmem bank delete notes.txt --bank memory
  longmem bank compact --bank memory                       give back the space of what was deleted
  longmem bank tune --bank memory --queries new.txt        which index finds enough, and how fast
  longmem bank staleness --bank memory --model tuned       what another model would find stale
  longmem bank refresh --bank memory --model tuned         encode it again

Each change is on the disk, as a whole, when the command ends. One process may change a bank while any number read it.
"""
LIST_EXAMPLES = """\
  longmem bank list --bank memory
  longmem bank list --bank memory --tag notes --json | jq -r .documents[].document_id
"""
INFO_EXAMPLES = """\
  longmem bank info --bank memory
  longmem bank info --bank memory --json     for a program
"""
DELETE_EXAMPLES = """\
  longmem bank delete book.txt notes.txt --bank memory    all of them or, if one is unknown, none

What is deleted is never found again; `longmem bank compact` removes its bytes from the disk.
"""
TAG_EXAMPLES = """\
  longmem bank tag a.txt b.txt --tag novel --tag english --bank memory    instead of the tags they had
  longmem bank tag a.txt --bank memory                                    none
"""
PIN_EXAMPLES = """\
  longmem bank pin handbook.txt --bank memory      never evicted, however full the bank is
  longmem bank unpin handbook.txt --bank memory
"""
SUPERSEDE_EXAMPLES = """\
  longmem bank supersede plan-v1.txt --by plan-v2.txt --bank memory    kept, listed, and found by no search
  longmem bank supersede rumour.txt --bank memory                      withdrawn: nothing took its place
  longmem bank restore plan-v1.txt --bank memory                       found again, also if it had expired
"""
VERIFY_EXAMPLE = (
    "  longmem bank verify --bank memory && cp -r memory backup    exit code 2 if a byte is not as it was written"
)
COMPACT_EXAMPLE = "  longmem bank compact --bank memory    afterwards no byte of what was deleted is in the folder"
EXPORT_EXAMPLES = """\
  longmem bank export documents.jsonl --bank memory
  longmem bank export notes.jsonl --tag notes --bank memory
  longmem bank add notes.jsonl --bank another --model Qwen/Qwen3-0.6B    memorize the texts with another model

Each line has document_id, tags, is_pinned, dated, valid_until, is_superseded, superseded_by, num_tokens,
first_resident_token, and token_ids and text from there on:
datasets.load_dataset("json", data_files="documents.jsonl").
"""

# What an action has done, and how it changes one document.
CHANGES: dict[str, tuple[str, Callable[[MemoryBank, str, argparse.Namespace], None]]] = {
    "delete": ("deleted", lambda bank, name, _: bank.delete(name)),
    "tag": ("tagged", lambda bank, name, arguments: bank.tag(name, arguments.tag)),
    "pin": ("pinned", lambda bank, name, _: bank.pin(name)),
    "unpin": ("unpinned", lambda bank, name, _: bank.pin(name, False)),
    "supersede": ("superseded", lambda bank, name, arguments: bank.supersede(name, by=arguments.by)),
    "restore": ("restored", lambda bank, name, _: bank.restore(name)),
}


def add(commands: Any) -> None:
    """Add the group `bank` and all its actions."""
    bank = bank_folder()
    by_tag = option("--tag", action="append", default=[], help="only documents with one of these tags")
    actions = add_group(commands, "bank", "change a bank, look into it, check it, tune it", BANK_EXAMPLES)
    memorize.add_actions(actions)
    add_command(actions, "list", list_documents, "list the documents of a bank", LIST_EXAMPLES, bank, by_tag)
    add_command(actions, "info", show_info, "show sizes and settings of a bank", INFO_EXAMPLES, bank)
    for name, summary, epilog in (
        ("delete", "delete documents", DELETE_EXAMPLES),
        ("tag", "give documents tags instead of those they had", TAG_EXAMPLES),
        ("pin", "keep documents from eviction", PIN_EXAMPLES),
        ("unpin", "let documents be evicted again", PIN_EXAMPLES),
        ("supersede", "hide documents that no longer hold", SUPERSEDE_EXAMPLES),
        ("restore", "let documents be found again", SUPERSEDE_EXAMPLES),
    ):
        command = add_command(actions, name, change_documents, summary, epilog, bank)
        command.add_argument("documents", nargs="+", metavar="DOCUMENT", help="names, as `longmem bank list` has them")
        if name == "supersede":
            command.add_argument("--by", metavar="DOCUMENT", help="what took their place; default: nothing did")
        if name == "tag":
            command.add_argument("--tag", action="append", default=[], help="may be given several times; none: no tags")
    own = bank_folder(on_cluster=False)
    add_command(actions, "verify", verify, "compare every byte with its checksum", VERIFY_EXAMPLE, own)
    add_command(actions, "compact", compact, "give back the space of what was deleted", COMPACT_EXAMPLE, bank)
    written = add_command(actions, "export", export, "write documents as lines of JSON", EXPORT_EXAMPLES, bank, by_tag)
    written.add_argument("output", type=common.new_file, metavar="OUT", help="file to write (.jsonl)")
    find.add(actions)
    tune.add(actions)
    staleness.add(actions)


def list_documents(arguments: argparse.Namespace) -> None:
    """Print the documents of a bank, in the order in which they were added."""
    from rich.table import Table

    with common.open_bank(arguments.bank) as bank:
        documents = chosen_documents(bank, arguments.tag)
    if arguments.json:
        common.print_json({"documents": [dataclasses.asdict(info) for info in documents]})
        return
    table = Table(box=None, header_style="bold")
    table.add_column("document", overflow="fold")  # a name that is cut short cannot be given to another command
    for column in ("tokens", "in memory from token", "chunks", "reads"):
        table.add_column(column, justify="right")
    table.add_column("pinned")
    table.add_column("tags")
    # Columns of time only where something is said of it.
    dates = [day(info.written_at if info.dated is None else info.dated) for info in documents]
    standings = [standing(info, time.time()) for info in documents]
    more = {"date": dates} if any(info.dated is not None for info in documents) else {}
    more |= {"holds": standings} if any(standings) else {}
    for column in more:
        table.add_column(column, overflow="fold")
    for info, *of_time in zip(documents, *more.values(), strict=True):
        numbers = (info.num_tokens, info.first_resident_token, info.num_chunks, info.num_reads)
        labels = ("pinned" if info.is_pinned else "", ", ".join(info.tags), *of_time)
        table.add_row(info.document_id, *(f"{number:,}" for number in numbers), *labels)
    nothing = f"No document has a tag of {', '.join(arguments.tag)}." if arguments.tag else "The bank is empty."
    common.console_for(False).print(table if documents else nothing)


def show_info(arguments: argparse.Namespace) -> None:
    """Print sizes and settings of a bank."""
    if isinstance(arguments.bank, str):
        with common.open_bank(arguments.bank) as bank:
            print_values(on_cluster(bank), arguments)
        return
    with common.open_bank(arguments.bank) as bank:
        documents, versions = bank.documents(), bank.freshness.report().versions
        values = {
            "model": common.model_of_bank(arguments.bank),
            "documents": len(documents),
            "pinned_documents": sum(info.is_pinned for info in documents),
            "tags": sorted({tag for info in documents for tag in info.tags}),
            "tokens": bank.num_tokens,
            "capacity_tokens": bank.capacity_tokens,
            "capacity_bytes": bank.capacity_bytes,
            "reads": sum(info.num_reads for info in documents),
            "bytes_on_disk": common.bytes_on_disk(arguments.bank),
            "bytes_that_compact_gives_back": bank.folder.num_dead_bytes,
            "memory_layers": list(bank.memory_layers),
            "chunk_size": bank.chunk_size,
            "index": bank.index,
            "eviction": bank.eviction,
            "age_prior": None if bank.age_prior is None else bank.age_prior.name,
            "storage_dtype": str(bank.storage_dtype).removeprefix("torch."),
            "refresh": bank.refresh,
            "fingerprint": bank.fingerprint,
            "encoders": [version.stamp.digest for version in bank.encoders.versions],
            "tokens_of_other_encoders": sum(each.tokens for each in versions if not each.is_fresh),
        }
    print_values(values, arguments)


def on_cluster(bank: Any) -> dict[str, Any]:
    """Return sizes and settings of a bank whose shards are on the nodes of a cluster."""
    documents = bank.documents()
    return {
        "model": bank.model_name,
        "documents": len(documents),
        "tokens": bank.num_tokens,
        "shards": [each["folder"] for each in bank._told],
        "memory_layers": list(bank.memory_layers),
        "chunk_size": bank.chunk_size,
        "refresh": bank.refresh,
        "fingerprint": bank.fingerprint,
    }


def print_values(values: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print named values, as JSON where a program reads them."""
    from rich.table import Table

    if arguments.json:
        common.print_json(values)
        return
    table = Table(box=None, show_header=False)
    for name, value in values.items():
        if value is None and name.startswith("capacity"):
            value = "no limit"
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        table.add_row(name.replace("_", " "), f"{text:,}" if isinstance(text, int) else str(text))
    common.console_for(False).print(table)


def standing(info: DocumentInfo, now: float) -> str:
    """Return whether and until when a document holds, empty if nothing was said."""
    if info.is_superseded:
        return "withdrawn" if info.superseded_by is None else f"superseded by {info.superseded_by}"
    if info.valid_until is None:
        return ""
    return f"{'until' if info.valid_until > now else 'expired'} {day(info.valid_until)}"


def day(date: float) -> str:
    """Return the day of a date, in UTC.

    >>> day(86_400.0)
    '1970-01-02'
    """
    return datetime.datetime.fromtimestamp(date, datetime.UTC).date().isoformat()


def change_documents(arguments: argparse.Namespace) -> None:
    """Change the named documents in one commit, all of them or none, and say what was done."""
    done, change = CHANGES[arguments.action]
    with common.open_bank(arguments.bank, write=True) as bank:
        with bank.transaction():
            for document_id in dict.fromkeys(arguments.documents):
                change(bank, document_id, arguments)
        tokens = bank.num_tokens
    names = ", ".join(arguments.documents)
    told = {done: arguments.documents, "bank_tokens": tokens}
    common.tell(arguments, told, f"{arguments.bank}: {done} {names}; {tokens:,} tokens in memory.")


def verify(arguments: argparse.Namespace) -> None:
    """Read every file of a bank and compare it with its checksums."""
    with common.open_bank(arguments.bank) as bank:
        files = bank.folder.verify()
        num_bytes = sum(path.stat().st_size for path in files)
    told = {"files": len(files), "bytes": num_bytes, "is_whole": True}
    common.tell(arguments, told, f"{len(files)} files, {num_bytes / 1e6:,.1f} MB: every byte is as it was written.")


def compact(arguments: argparse.Namespace) -> None:
    """Give back the space of what was deleted or evicted."""
    if isinstance(arguments.bank, str):
        with common.open_bank(arguments.bank) as shards:
            shards.compact()
        common.tell(arguments, {"bank": arguments.bank}, f"{arguments.bank}: what was deleted is gone from all shards.")
        return
    with common.open_bank(arguments.bank, write=True) as bank:
        before = common.bytes_on_disk(arguments.bank)
        bank.folder.compact()
        after = common.bytes_on_disk(arguments.bank)
    told = {"bytes_before": before, "bytes_after": after}
    common.tell(arguments, told, f"{arguments.bank}: {before / 1e6:,.1f} MB before, {after / 1e6:,.1f} MB now.")


def export(arguments: argparse.Namespace) -> None:
    """Write documents to a file, one JSON object on each line; the file is there once it is whole."""
    with common.open_bank(arguments.bank) as bank:
        documents = chosen_documents(bank, arguments.tag)
        with new_file(arguments.output) as draft, draft.open("w", encoding="utf-8") as file:
            file.writelines(export_line(bank, info) for info in documents)
    told = {"output": str(arguments.output), "documents": len(documents)}
    common.tell(arguments, told, f"{arguments.output}: {len(documents)} documents.")


def chosen_documents(bank: MemoryBank, tags: list[str]) -> list[DocumentInfo]:
    """Return the documents with one of the tags; all, if there are none."""
    return [info for info in bank.documents() if not tags or set(tags) & set(info.tags)]
