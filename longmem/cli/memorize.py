"""`longmem memorize` and `longmem bank add`, `append`, `update`: texts into a bank on disk."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from longmem.cli import common
from longmem.cli.common import DEFAULT_MODEL, POLICIES, add_command, bank_folder, labels, model_option, option
from longmem.cli.texts import STDIN, Text, find_files, read_text, read_texts
from longmem.errors import printable

if TYPE_CHECKING:
    from longmem.memory import MemoryBank
    from longmem.model.modeling import LongMemForCausalLM

MEMORIZE_EXAMPLES = """\
  longmem memorize book.txt --bank memory                       a new bank, or one more document in it
  longmem memorize draft.txt --bank memory --replace            a new version of a document that is there
  longmem memorize a.txt --id "meeting, May 2" --bank memory    a name of your own
  longmem memorize project --glob "*.py" --bank memory           a folder, each file by its path from there
  pdftotext paper.pdf - | longmem memorize - --id paper --bank memory
  longmem memorize *.md --bank memory --tag notes --pin         to be read by tag, and never evicted
  longmem memorize *.md --bank memory --model Qwen/Qwen3-0.6B   another model, for a new bank

  longmem memorize corpus --bank ray://notes                    by workers of a cluster (`longmem cluster start`)

A document is on the disk once it is whole, a long one in pieces of 100,000 characters: a run that was interrupted keeps
them, and the same command goes on. A bank belongs to the model that wrote it, and remembers its name. `longmem bank add` is
the same command; it also reads what `longmem bank export` wrote.
"""
APPEND_EXAMPLES = """\
  longmem bank append monday.txt tuesday.txt --id diary --bank memory    in this order, all or none
"""
UPDATE_EXAMPLES = """\
  longmem bank update notes.txt --bank memory
  longmem bank update second-draft.txt --id draft.txt --bank memory

Windows of the text whose tokens stood in the version before are copied and not encoded. Tags, pin and dates stay.
"""
PIECE = 100_000  # characters of a long text that are tokenised, encoded and committed together
# What is chosen when a bank is made, by the arguments of `MemoryBank`.
OPTIONS_OF_A_NEW_BANK = ("capacity_tokens", "index", "eviction", "storage_dtype", "refresh")


def add(commands: Any) -> None:
    """Add the command `memorize`."""
    add_memorize(commands, "memorize")


def add_actions(actions: Any) -> None:
    """Add `bank add`, which is `memorize`, `bank append` and `bank update`."""
    bank, writer, encoding = bank_folder(), model_option(), encoding_option()
    add_memorize(actions, "add")
    parents = [bank, writer, encoding]
    append = add_command(actions, "append", append_files, "continue a document with files", APPEND_EXAMPLES, *parents)
    append.add_argument("files", nargs="+", type=Path, metavar="FILE", help="texts or documents, or - to read one")
    append.add_argument("--id", required=True, metavar="NAME", help="name of the document")
    parents.append(labels())
    update = add_command(actions, "update", update_document, "replace a document", UPDATE_EXAMPLES, *parents)
    update.add_argument("file", type=Path, metavar="FILE", help="text or document, or - to read one")
    update.add_argument("--id", metavar="NAME", help="name of the document; default: the file's name")


def add_memorize(to: Any, name: str) -> None:
    """Add the command that reads files into a bank, under this name."""
    writer = model_option(f"the model that wrote the bank; {DEFAULT_MODEL} for a new one")
    parents = (bank_folder(), labels(), writer, encoding_option())
    command = add_command(to, name, run, "read text files into a bank", MEMORIZE_EXAMPLES, *parents)
    command.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="texts, documents (.pdf, ...), exports, folders, or - to read",
    )
    command.add_argument(
        "--glob", metavar="PATTERN", help='which files of folders, such as "*.md"; default: those of text'
    )
    command.add_argument("--id", metavar="NAME", help="name of the document (one FILE only); default: the file's name")
    command.add_argument("--replace", action="store_true", help="replace documents that are there under that name")
    command.add_argument(
        "--workers", type=int, metavar="N", help="encoding workers of ray://NAME; default: one a GPU, or a node"
    )
    new = command.add_argument_group("options of a new bank")
    new.add_argument("--capacity", dest="capacity_tokens", type=int, metavar="TOKENS", help="default: no limit")
    new.add_argument("--index", help='"auto", "flat", "ivf:probed_share=0.06", ...; default: auto')
    new.add_argument("--eviction", help='what goes when it is full: "fifo", "lru", "ttl:seconds=3600"; default: fifo')
    new.add_argument("--storage-dtype", metavar="DTYPE", help="float16, bfloat16, float32 or int8; default: float16")
    new.add_argument("--refresh", metavar="POLICY", help=f"when its encoder changes: {POLICIES}; default: frozen")


def encoding_option() -> argparse.ArgumentParser:
    """Return the option of commands that read texts."""
    return option("--encoding", metavar="NAME", help='of the texts, such as "latin-1"; default: UTF-8')


class Written(NamedTuple):
    """How many tokens of a text were encoded, and how many copied from the version before."""

    encoded: int
    copied: int = 0


def run(arguments: argparse.Namespace) -> None:
    """Add documents or, with `--replace`, new versions of them; each is on the disk once it is whole."""
    from longmem.memory import MemoryBank, has_bank
    from longmem.memory.checks import validate_document_id, validate_tags

    files, passed_over = find_files(arguments.files, arguments.glob)
    texts = read_texts(files, arguments.id, arguments.encoding)
    if passed_over:
        said = f"{len(passed_over)} files hold no text and are left out, such as {printable(str(passed_over[0]))}."
        print(f"longmem: {said}", file=sys.stderr)
    if isinstance(arguments.bank, str):
        return fill(texts, arguments)
    if arguments.workers is not None:
        raise ValueError(f"`--workers` is for a bank on a cluster, ray://NAME, got {arguments.workers} for a folder.")
    folder, is_new = arguments.bank, not has_bank(arguments.bank)
    options = {name: vars(arguments)[name] for name in OPTIONS_OF_A_NEW_BANK if vars(arguments)[name] is not None}
    # All that can be said before a model is opened is said before.
    for text in texts:
        validate_document_id("--id" if arguments.id is not None else "name of a document", text.name)
        validate_tags((*text.tags, *arguments.tag))
    if is_new:
        MemoryBank(**{"memory_layers": [0], "chunk_size": 1, **options})
    else:
        with common.open_bank(folder) as bank:
            for name, given in options.items():
                if (own := str(getattr(bank, name)).removeprefix("torch.")) != str(given):
                    option = name.removesuffix("_tokens").replace("_", "-")
                    raise ValueError(
                        f"`--{option}` is set when a bank is made, and is {own} of the one that is there, got {given}; "
                        "leave it out."
                    )
            left_of(texts, bank, arguments.replace)
    model_name = arguments.model or common.model_of_bank(folder) or DEFAULT_MODEL
    console = common.console_for(arguments.json, quiet=arguments.quiet)
    console.print(f"Opening {model_name} ...")
    model = common.open_named(model_name, arguments)
    if is_new:
        _ = model.tokenizer  # where there is none, nothing is made
        MemoryBank.for_model(model, folder=folder, **options).close()
    with common.open_bank(folder, model, write=True) as bank:
        if is_new or arguments.model:
            common.remember_model(folder, model_name)
        left, began = left_of(texts, bank, arguments.replace), time.perf_counter()
        written = {text.name: write(bank, model, text, arguments) for text in left}
        supersede(bank, texts)
        report(bank, model_name, written, time.perf_counter() - began, arguments)


def fill(texts: list[Text], arguments: argparse.Namespace) -> None:
    """Let workers of a cluster encode documents and write them; what an earlier run has written is not written again."""
    from longmem.cluster import Encoders
    from longmem.cluster.wire import raised
    from longmem.console import token_progress
    from longmem.memory.checks import validate_count
    from longmem.model.names import lasting_name

    for name in OPTIONS_OF_A_NEW_BANK:
        if vars(arguments)[name] is not None:
            raise ValueError(f"`--{name.replace('_', '-')}` is set when a bank is made, by `longmem cluster start`.")
    if arguments.workers is not None:
        validate_count("--workers", arguments.workers)
    if arguments.device != "auto":
        raise ValueError(
            f"`--device` must be auto for a bank on a cluster, got {arguments.device!r}; Ray gives each worker its device."
        )
    bank = common.open_bank(arguments.bank)
    left = left_of([text for text in texts if not is_there(bank, text)], bank, arguments.replace)
    model_name = arguments.model or common.model_of_bank(arguments.bank)
    if model_name is None:
        raise ValueError(f"the bank {arguments.bank} does not say which model writes it; name it with `--model`.")
    plain = argparse.Namespace(tag=arguments.tag, pin=arguments.pin, json=True, quiet=True)
    make = functools.partial(model_of_worker, lasting_name(model_name))
    written, began = {text.name: Written(0) for text in texts}, time.perf_counter()
    console = common.console_for(arguments.json, quiet=arguments.quiet)
    with Encoders(make, arguments.workers) as workers, token_progress(f"{len(left)} documents", console) as progress:
        in_all, done, tokens = sum(len(text.text) for text in left), 0, 0
        for text, answer in workers.run(left, lambda actor, text: actor.work.remote(write_there, bank, (text, plain))):
            written[text.name] = raised(answer)
            done, tokens = done + len(text.text), tokens + sum(written[text.name])
            progress(tokens, round(tokens * in_all / done))
    for text in texts:  # each in a transaction of its own, for they are in different shards
        supersede(bank, [text])
    report(bank, model_name, written, time.perf_counter() - began, arguments)


def model_of_worker(name: str) -> LongMemForCausalLM:
    """Return a model on the GPU that a worker was given or, without one, on its CPU."""
    from longmem.model.opening import open_model
    from longmem.settings.environment import chosen_device

    return open_model(name).to(chosen_device())  # type: ignore[arg-type]


def write_there(bank: MemoryBank, model: LongMemForCausalLM, task: tuple[Text, argparse.Namespace]) -> Written:
    """Write a document in a worker, unless one before it died with all of it written."""
    text, arguments = task
    return Written(0) if is_there(bank, text) else write(bank, model, text, arguments)


def is_there(bank: MemoryBank, text: Text) -> bool:
    """Return whether the bank holds just this text under its name."""
    return start_of(bank, text) == len(text.text)


def supersede(bank: MemoryBank, texts: list[Text]) -> None:
    """Say what superseded a text in the bank that it was exported from, once that is there as well."""
    with bank.transaction():
        for text in texts:
            if text.name in bank and (by := successor(bank, text)):
                bank.supersede(text.name, by=by)


def successor(bank: MemoryBank, text: Text) -> str | None:
    """Return what superseded a text where the bank can keep that: it is there and, on a cluster, in the same shard."""
    from longmem.cluster import ClusterBank

    if text.superseded_by is None or text.superseded_by not in bank:
        return None
    is_apart = isinstance(bank, ClusterBank) and bank.shard_of(text.superseded_by) != bank.shard_of(text.name)
    return None if is_apart else text.superseded_by


def write(bank: MemoryBank, model: LongMemForCausalLM, text: Text, arguments: argparse.Namespace) -> Written:
    """Commit one document: new, in place of the one of this name, or what is not yet there of a text of which it is the start.

    A long text is tokenised and committed in pieces, so that a run that was stopped goes on where it was.
    """
    from longmem.console import token_progress

    tags = (*text.tags, *arguments.tag)
    known_characters = start_of(bank, text) % len(text.text)  # of one that is all there, none is left to be added
    console = common.console_for(arguments.json, quiet=arguments.quiet)
    with token_progress(text.name, console) as progress:
        if text.name in bank and not known_characters:
            with bank.transaction():
                encoded = bank.update(text.name, text.text, model=model, progress=progress)
                label(bank, text, tags, arguments)
            return Written(encoded, bank.info(text.name).num_tokens - encoded)
        encoded, known = 0, bank.info(text.name).num_tokens if known_characters else 0
        for start, stop in pieces_of(text.text, known_characters):

            def report(
                done: int, total: int, before: int = known + encoded, share: float = stop / len(text.text)
            ) -> None:
                progress(before + done, round((before + total) / share))

            with bank.transaction():
                said = {"tags": tags, "dated": text.dated, "valid_until": text.valid_until}
                options: dict[str, Any] = {"append": True} if text.name in bank else said
                written = model.memorize(bank, text.text[start:stop], text.name, progress=report, **options)
                encoded += written.num_encoded
                label(bank, text, tags, arguments)
    return Written(encoded)


def pieces_of(text: str, start: int = 0) -> Iterator[tuple[int, int]]:
    """Yield where to cut a text from `start` on, about every `PIECE` characters: behind a line or, failing that, a word.

    >>> list(pieces_of("one two"))
    [(0, 7)]
    """
    end = len(text.rstrip())  # once: a look at all that is left would copy it for each piece
    while start < len(text):
        stop = start + PIECE
        if len(text) - stop < PIECE // 8:
            stop = len(text)
        else:  # tokens of many kinds of tokenizers begin with a space and end with a line
            stop = text.rfind("\n", start + 1, stop) + 1 or max(text.rfind(" ", start + 1, stop), 0) or stop
        while stop < len(text) and (stop >= end or text[start:stop].isspace()):  # nobody can encode a blank piece
            stop = min(stop + PIECE, len(text))
        yield start, stop
        start = stop


def start_of(bank: MemoryBank, text: Text) -> int:
    """Return the characters of a text that the bank holds, where these are its start: a run was stopped, or the text grew."""
    known, info = 0, bank.info(text.name) if text.name in bank else None
    for start in range(0, 0 if info is None or info.first_resident_token else info.num_tokens, PIECE):
        part = bank.text(text.name, start, start + PIECE) or ""
        if not text.text.startswith(part, known):
            return 0
        known += len(part)
    return known


def label(bank: MemoryBank, text: Text, tags: Sequence[str], arguments: argparse.Namespace) -> None:
    """Give a document its tags, if there are any, hide it if it no longer holds, and pin it if it is to be."""
    if tags:
        bank.tag(text.name, tags)
    if text.is_superseded:  # hidden in the commit that brings it, so that an import cut short shows nothing of it
        bank.supersede(text.name, by=successor(bank, text))
    if arguments.pin or text.is_pinned:
        bank.pin(text.name)


def append_files(arguments: argparse.Namespace) -> None:
    """Continue a document with the text of files; all of them or, if anything fails, none."""
    from longmem.console import token_progress

    texts = [read_text(path, arguments.encoding) for path in arguments.files]
    if isinstance(arguments.bank, str) and len(texts) > 1:
        raise ValueError(
            f"one file at a time can be appended on a cluster, got {len(texts)}; each is a transaction there."
        )
    with common.open_bank(arguments.bank) as bank:
        bank.info(arguments.id)
    model_name, model = common.open_model_of(arguments)
    with common.open_bank(arguments.bank, model, write=True) as bank:
        encoded, began = 0, time.perf_counter()
        with bank.transaction():  # of a second try after half of it, the document would have that half twice
            for path, text in zip(arguments.files, texts, strict=True):
                with token_progress(path.name, common.console_for(arguments.json, quiet=arguments.quiet)) as progress:
                    options: dict[str, Any] = {"append": True, "progress": progress}
                    encoded += model.memorize(bank, text, arguments.id, **options).num_encoded
        report(bank, model_name, {arguments.id: Written(encoded)}, time.perf_counter() - began, arguments)


def update_document(arguments: argparse.Namespace) -> None:
    """Replace a document by a new version of its text; what did not change is copied."""
    if arguments.file == STDIN and not arguments.id:
        raise ValueError(
            "`--id` must name the document that standard input replaces, got none; `longmem bank list` has names."
        )
    (text,) = read_texts(find_files([arguments.file])[0], arguments.id or None, arguments.encoding)
    with common.open_bank(arguments.bank) as bank:
        bank.info(text.name)
    model_name, model = common.open_model_of(arguments)
    with common.open_bank(arguments.bank, model, write=True) as bank:
        began = time.perf_counter()
        written = {text.name: write(bank, model, text, arguments)}
        report(bank, model_name, written, time.perf_counter() - began, arguments)


def report(
    bank: MemoryBank, model_name: str, written: dict[str, Written], seconds: float, arguments: argparse.Namespace
) -> None:
    """Print what was written, and whether anything had to go for it."""
    infos = {info.document_id: info for info in bank.documents()}
    if any(info.first_resident_token for info in infos.values()) or written.keys() - infos.keys():
        full = "" if bank.capacity_tokens is None else f" at {bank.capacity_tokens:,} tokens"
        print(f"longmem: the bank is full{full}; the oldest made room for the newest.", file=sys.stderr)
    values = {
        "bank": str(arguments.bank),
        "model": model_name,
        "written_tokens": {name: sum(counts) for name, counts in written.items()},
        "copied_tokens": {name: counts.copied for name, counts in written.items()},
        "seconds": round(seconds, 3),
        "bank_tokens": bank.num_tokens,
        "capacity_tokens": bank.capacity_tokens,
    }
    encoded, copied = (sum(column) for column in zip(*written.values(), strict=True))
    limit = "" if bank.capacity_tokens is None else f" of {bank.capacity_tokens:,}"
    sentence = (
        f"{arguments.bank}: {encoded:,} tokens encoded ({encoded / seconds:,.0f} tokens/s), {copied:,} copied; "
        f"{bank.num_tokens:,}{limit} tokens in memory"
    )
    if size := common.bytes_on_disk(arguments.bank):
        sentence += f", {size / 1e6:,.1f} MB on disk"
    common.tell(arguments, values, f"{sentence}.")


def left_of(texts: list[Text], bank: MemoryBank, replace: bool) -> list[Text]:
    """Return those of some texts that a bank does not hold: the others are of a run that was stopped.

    Raises ValueError if all are there, or one has another text there; but not if they are to be replaced.
    """
    if replace:
        return texts
    known = {text.name: start_of(bank, text) for text in texts}
    left = [text for text in texts if known[text.name] < len(text.text)] or texts
    if taken := [text.name for text in left if text.name in bank and not known[text.name] % len(text.text)]:
        raise ValueError(
            f"the bank already holds a document {taken[0]!r}; leave it out, use `--replace` for a new version of it, or "
            "another name with `--id`."
        )
    return left
