"""The arguments and the help of `longmem memorize` and `longmem bank`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from longmem.cli.parsing import add_command, add_group, bank_folder

POLICIES = '"frozen", "eager", "lazy", "bounded:max_lag=4", ...'
MEMORIZE_EXAMPLES = """\
examples:
  longmem memorize book.txt --bank memory                       a new bank, or one more document in it
  longmem memorize draft.txt --bank memory --replace            a new version of a document that is there
  longmem memorize a.txt --id "meeting, May 2" --bank memory    a name of your own
  longmem memorize *.md --bank memory --tag notes --pin         to be read by tag, and never evicted
  longmem memorize *.md --bank memory --model Qwen/Qwen3-0.6B   another model, for a new bank

A document is on the disk once it is whole: a run that is interrupted keeps those before it, and nothing of the one in
progress. A bank belongs to the model that wrote it, and remembers its name. `longmem bank add` is the same command; it
also reads what `longmem bank export` wrote.
"""
BANK_EXAMPLES = """\
examples:
  longmem bank add notes.txt --bank memory --tag notes     read documents into a bank (`longmem memorize`)
  longmem bank list --bank memory --tag notes              documents, their tokens, what is still there
  longmem bank update notes.txt --bank memory              a new version: what did not change is copied
  longmem bank delete notes.txt --bank memory
  longmem bank compact --bank memory                       give back the space of what was deleted
  longmem bank tune --bank memory --queries new.txt        which index finds enough, and how fast
  longmem bank staleness --bank memory --model tuned       what another model would find stale
  longmem bank refresh --bank memory --model tuned         encode it again

Each change is on the disk, as a whole, when the command ends. One process may change a bank while any number read it.
"""
APPEND_EXAMPLES = """\
examples:
  longmem bank append monday.txt tuesday.txt --id diary --bank memory    in this order, all or none
"""
UPDATE_EXAMPLES = """\
examples:
  longmem bank update notes.txt --bank memory
  longmem bank update second-draft.txt --id draft.txt --bank memory

Windows of the text whose tokens stood in the version before are copied and not encoded. Tags, pin and dates stay.
"""
LIST_EXAMPLES = """\
examples:
  longmem bank list --bank memory
  longmem bank list --bank memory --tag notes --json | jq -r .documents[].document_id
"""
INFO_EXAMPLES = """\
examples:
  longmem bank info --bank memory
  longmem bank info --bank memory --json     for a program
"""
DELETE_EXAMPLES = """\
examples:
  longmem bank delete book.txt notes.txt --bank memory    all of them or, if one is unknown, none

What is deleted is never found again; `longmem bank compact` removes its bytes from the disk.
"""
TAG_EXAMPLES = """\
examples:
  longmem bank tag a.txt b.txt --tag novel --tag english --bank memory    instead of the tags they had
  longmem bank tag a.txt --bank memory                                    none
"""
PIN_EXAMPLES = """\
examples:
  longmem bank pin handbook.txt --bank memory      never evicted, however full the bank is
  longmem bank unpin handbook.txt --bank memory
"""
SUPERSEDE_EXAMPLES = """\
examples:
  longmem bank supersede plan-v1.txt --by plan-v2.txt --bank memory    kept, listed, and found by no search
  longmem bank supersede rumour.txt --bank memory                      withdrawn: nothing took its place
  longmem bank restore plan-v1.txt --bank memory                       found again, also if it had expired
"""
VERIFY_EXAMPLES = """\
examples:
  longmem bank verify --bank memory && cp -r memory backup    exit code 2 if a byte is not as it was written
"""
COMPACT_EXAMPLES = """\
examples:
  longmem bank compact --bank memory    afterwards no byte of what was deleted is in the folder
"""
EXPORT_EXAMPLES = """\
examples:
  longmem bank export documents.jsonl --bank memory
  longmem bank export notes.jsonl --tag notes --bank memory
  longmem bank add notes.jsonl --bank another --model Qwen/Qwen3-0.6B    memorize the texts with another model

Each line has document_id, tags, is_pinned, dated, valid_until, is_superseded, superseded_by, num_tokens,
first_resident_token, and token_ids and text from there on:
datasets.load_dataset("json", data_files="documents.jsonl").
"""
TUNE_EXAMPLES = """\
examples:
  longmem bank tune --bank memory --queries new.txt                      a table, and the setting to use
  longmem bank tune --bank memory --queries new.txt --output tuning      also as Markdown, JSON and figure
  longmem bank tune --bank memory --queries new.txt --recall 0.9 --apply

The keys are the bank's, the queries what its model asks while it reads the text. One setting serves all layers: the
first memory layer is measured unless you name another.
"""
STALENESS_EXAMPLES = """\
examples:
  longmem bank staleness --bank memory                       which encoders wrote what is there
  longmem bank staleness --bank memory --model tuned         what would be stale if this model read it
  longmem bank staleness --bank memory --model tuned --probe --plot staleness.png

Nothing in the bank changes. stale: another encoder wrote it. behind: changes of the encoder since. gap: how far its weights
have moved since, relative to their norm. drift: the same of stored keys, which --probe measures on about 64 tokens of each
earlier encoder. masked: chunks that the refresh policy does not let be read as they are. moved: by a map, to this encoder.
"""
REFRESH_EXAMPLES = """\
examples:
  longmem bank refresh --bank memory --model tuned                    everything that another encoder wrote
  longmem bank refresh --bank memory --budget-tokens 100000           so much for now; the next run goes on
  longmem bank refresh --bank memory --model tuned --policy lazy      and from now on what a read finds stale

Text is not needed: token ids are kept. Each document is on the disk once it is whole, so a run can be stopped with Ctrl-C,
and the next one goes on. --policy also says what the bank does from now on when its encoder changes.
"""


def add_bank_commands(commands: Any) -> None:
    """Add `memorize` and the group `bank`."""
    bank = bank_folder()
    parents = (bank, labels(), model_option("the model that wrote the bank; smollm2-135m for a new one"))
    add_options_of_add(
        add_command(commands, "memorize", "memorize:add", "read text files into a bank", MEMORIZE_EXAMPLES, *parents)
    )
    writer = model_option("the model that wrote the bank")
    by_tag = tag_filter()
    actions = add_group(commands, "bank", "change a bank, look into it, check it, tune it", BANK_EXAMPLES)

    add_options_of_add(
        add_command(actions, "add", "memorize:add", "read text files into a bank", MEMORIZE_EXAMPLES, *parents)
    )
    append = add_command(
        actions, "append", "memorize:append", "continue a document with text files", APPEND_EXAMPLES, bank, writer
    )
    append.add_argument("files", nargs="+", type=Path, metavar="FILE", help="text files, UTF-8")
    append.add_argument("--id", required=True, metavar="NAME", help="name of the document")
    update = add_command(
        actions, "update", "memorize:update", "replace a document", UPDATE_EXAMPLES, bank, labels(), writer
    )
    update.add_argument("file", type=Path, metavar="FILE", help="text file, UTF-8")
    update.add_argument("--id", metavar="NAME", help="name of the document; default: the file's name")

    add_command(actions, "list", "bank:list_documents", "list the documents of a bank", LIST_EXAMPLES, bank, by_tag)
    add_command(actions, "info", "bank:show_info", "show sizes and settings of a bank", INFO_EXAMPLES, bank)
    for name, summary, epilog in (
        ("delete", "delete documents", DELETE_EXAMPLES),
        ("tag", "give documents tags instead of those they had", TAG_EXAMPLES),
        ("pin", "keep documents from eviction", PIN_EXAMPLES),
        ("unpin", "let documents be evicted again", PIN_EXAMPLES),
        ("supersede", "hide documents that no longer hold", SUPERSEDE_EXAMPLES),
        ("restore", "let documents be found again", SUPERSEDE_EXAMPLES),
    ):
        command = add_command(actions, name, f"bank:{name}_documents", summary, epilog, bank)
        command.add_argument(
            "documents", nargs="+", metavar="DOCUMENT", help="names, as `longmem bank list` shows them"
        )
        if name == "supersede":
            command.add_argument("--by", metavar="DOCUMENT", help="what took their place; default: nothing did")
        if name == "tag":
            command.add_argument("--tag", action="append", default=[], help="may be given several times; none: no tags")

    add_command(actions, "verify", "bank:verify", "compare every byte with its checksum", VERIFY_EXAMPLES, bank)
    add_command(actions, "compact", "bank:compact", "give back the space of what was deleted", COMPACT_EXAMPLES, bank)
    export = add_command(
        actions, "export", "bank:export", "write documents as lines of JSON", EXPORT_EXAMPLES, bank, by_tag
    )
    export.add_argument("output", type=Path, metavar="OUT", help="file to write (.jsonl)")
    add_tune(actions, bank, writer)
    add_refresh(actions, bank)


def add_options_of_add(command: argparse.ArgumentParser) -> None:
    """Add what `memorize` and `bank add` take."""
    command.add_argument("files", nargs="+", type=Path, metavar="FILE", help="text files, UTF-8, or exports (.jsonl)")
    command.add_argument("--id", metavar="NAME", help="name of the document (one FILE only); default: the file's name")
    command.add_argument("--replace", action="store_true", help="replace documents that are there under that name")
    new = command.add_argument_group("options of a new bank")
    new.add_argument("--capacity", type=int, metavar="TOKENS", help="default: no limit")
    new.add_argument("--index", help='"auto", "flat", "ivf:probed_share=0.06", ...; default: auto')
    new.add_argument("--eviction", help='what goes when it is full: "fifo", "lru", "ttl:seconds=3600"; default: fifo')
    new.add_argument("--storage-dtype", metavar="DTYPE", help="float16, bfloat16, float32 or int8; default: float16")
    new.add_argument("--refresh", metavar="POLICY", help=f"when its encoder changes: {POLICIES}; default: frozen")


def add_tune(actions: Any, *parents: argparse.ArgumentParser) -> None:
    """Add `bank tune`."""
    tune = add_command(
        actions, "tune", "tune:run", "measure recall and speed of index settings", TUNE_EXAMPLES, *parents
    )
    tune.add_argument("--queries", type=Path, metavar="FILE", help="text to read; default: the bank's longest document")
    tune.add_argument("--layer", type=int, help="memory layer to measure; default: the first")
    tune.add_argument("--num-queries", type=int, default=1024, help="for each key-value head")
    tune.add_argument("--recall", type=float, default=0.95, help="share of the exact best that has to be found")
    tune.add_argument("--output", type=Path, metavar="DIR", help="folder for tuning.md, tuning.json and tuning.png")
    tune.add_argument("--apply", action="store_true", help="let the bank use the recommended setting")


def add_refresh(actions: Any, bank: argparse.ArgumentParser) -> None:
    """Add `bank staleness` and `bank refresh`."""
    reader = model_option("the bank's own encoder, and no model is opened; with --probe, the model that wrote the bank")
    staleness = add_command(
        actions, "staleness", "staleness:show", "say what another encoder wrote", STALENESS_EXAMPLES, bank, reader
    )
    staleness.add_argument("--probe", action="store_true", help="measure how far keys have moved")
    staleness.add_argument("--plot", type=Path, metavar="FILE", help="figure to write (.png)")
    encoder = model_option("the model that wrote the bank, as it is now")
    refresh = add_command(
        actions, "refresh", "staleness:refresh", "encode again what is stale", REFRESH_EXAMPLES, bank, encoder
    )
    refresh.add_argument("--budget-tokens", type=int, metavar="N", help="encode no more than that; default: all")
    refresh.add_argument("--policy", metavar="NAME", help=f"follow it from now on: {POLICIES}; default: the bank's")


def labels() -> argparse.ArgumentParser:
    """Return the options that label a document."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--tag", action="append", default=[], help="tag of the documents; may be given several times")
    parser.add_argument("--pin", action="store_true", help="keep the documents from eviction")
    return parser


def tag_filter() -> argparse.ArgumentParser:
    """Return the option that chooses documents."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--tag", action="append", default=[], help="only documents with one of these tags")
    return parser


def model_option(default: str) -> argparse.ArgumentParser:
    """Return the option that names a model."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", help=f"default: {default}")
    return parser
