"""`longmem chat`: talk to a model that remembers what has left its window, and the documents it was given."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longmem.cli import common
from longmem.cli.common import DEFAULT_MODEL, add_command, model_option, option
from longmem.cli.texts import STDIN, read_text
from longmem.errors import did_you_mean, printable

if TYPE_CHECKING:
    from longmem.memory import MemoryBank
    from longmem.model.modeling import LongMemForCausalLM

EXAMPLES = """\
  longmem chat                       in memory: all is gone at the end
  longmem chat --bank memory         with what is in a bank, and what is said goes there
  echo "What did I note?" | longmem chat --bank memory
"""
COMMANDS = """\
  /remember FILE   read a file into memory
  /forget DOC      forget a document
  /documents       what is in memory
  /why             the passages that the last answer read
  /off, /on        answer without memory, and with it again
  /help, /bye      this list; end (also Ctrl-D)"""
TAKES = {"remember": "FILE", "forget": "DOC", **dict.fromkeys(("documents", "why", "off", "on", "help", "bye"), "")}


def add(commands: Any) -> None:
    """Add the command `chat`."""
    bank = option(
        "--bank",
        type=common.folder_alone,
        metavar="DIR",
        help="folder of the bank; default: a memory that ends with the talk",
    )
    command = add_command(
        commands, "chat", run, "talk to a model with memory", EXAMPLES, bank, model_option(DEFAULT_MODEL)
    )
    common.add_writing(command, max_new_tokens=200)


def run(arguments: argparse.Namespace) -> None:
    """Talk until the end of the input."""
    from longmem.memory import MemoryBank, has_bank

    if arguments.json:
        raise ValueError("`--json` must be left out of a talk; `longmem generate --chat --json` gives one answer.")
    common.drawing(arguments)  # before a model is opened
    if is_person():
        print("Opening the model ...", file=sys.stderr)
    if arguments.bank is not None and has_bank(arguments.bank):
        _, model = common.open_model_of(arguments)
        bank = common.open_bank(arguments.bank, model, write=True)
    else:
        name = arguments.model or DEFAULT_MODEL
        model = common.open_named(name, arguments)
        bank = MemoryBank.for_model(model, folder=arguments.bank, capacity_tokens=None)
        if arguments.bank is not None:
            common.remember_model(arguments.bank, name)
    with bank:
        talk(Conversation(model.eval(), bank, arguments), _lines(arguments.quiet))


def is_person() -> bool:
    """Return whether somebody types, at a terminal."""
    return sys.stdin is not None and sys.stdin.isatty()


def _lines(quiet: bool) -> Iterator[str]:
    types = is_person()
    if types:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  by being imported: what is typed can be edited, and called back
        if not quiet:
            print(f"Ask, or:\n{COMMANDS}\n")
    while True:
        try:
            yield input("> " if types else "")
        except EOFError:
            return


class Conversation:
    """A stream that speaks in the model's chat format; what leaves its window goes into the bank."""

    def __init__(self, model: LongMemForCausalLM, bank: MemoryBank, arguments: argparse.Namespace) -> None:
        self.model, self.bank, self.arguments = model, bank, arguments
        import torch

        name = f"chat {time.strftime('%Y-%m-%d %H:%M:%S')}"
        self.stream = model.stream(bank, document_id=name, seed=arguments.seed)
        torch.manual_seed(arguments.seed)  # for answers without memory; the stream has numbers of its own
        self.turns: list[dict[str, str]] = []
        self.said = ""  # the text that the stream has taken in
        self.uses_memory = True
        # What the last answer went on from, the answer, and whether it could read.
        self.last: tuple[list[int], list[int], bool] | None = None

    def ask(self, text: str, on_text: Callable[[str], None]) -> None:
        """Answer; `on_text` gets the answer in pieces. A question that can't be read is as if it had not been asked."""
        from longmem.memory.checks import validate_text
        from longmem.serving.engine import chat_text
        from longmem.streaming.stream import decoded

        tokenizer, turns = self.model.tokenizer, [*self.turns, {"role": "user", "content": text}]
        whole = chat_text(tokenizer, turns)
        validate_text("text", whole)
        goes_on = whole.startswith(self.said)
        new = whole.removeprefix(self.said) if goes_on else chat_text(tokenizer, turns[-1:])
        asked, num_before = tokenizer(new, add_special_tokens=False)["input_ids"], self.stream.num_tokens
        try:
            self.stream.read(asked)
        except BaseException:  # the question is no part of the talk, but what was read of it is in the stream
            self.said += str(tokenizer.decode(asked[: self.stream.num_tokens - num_before]))
            raise
        self.turns, before = turns, self._window()
        ids: list[int] = []
        answer = ""

        def noted() -> Iterator[int]:
            for token in self._tokens():
                ids.append(token)
                yield token

        try:
            for piece in decoded(tokenizer, noted(), skip_special_tokens=True):
                answer += piece
                on_text(piece)
        finally:  # also what was written before Ctrl-C is in the stream
            self.said = whole + str(tokenizer.decode(ids))  # what went before and what is new are the whole
            self.turns.append({"role": "assistant", "content": answer})
            self.last = before, ids, self.uses_memory

    def _window(self) -> list[int]:
        """Return what the stream's window holds, behind the tokens that stand before a text."""
        local = self.stream.local_ids.tolist()
        return [*self.model.config.missing_start(local), *local]

    def _tokens(self) -> Iterator[int]:
        options = common.drawing(self.arguments)
        if self.uses_memory:
            yield from self.stream.generate(self.arguments.max_new_tokens, **options)
            return
        import torch

        start = torch.tensor([self._window()], device=self.model.input_device)
        mask = torch.ones_like(start)
        new = self.model.generate(start, attention_mask=mask, max_new_tokens=self.arguments.max_new_tokens, **options)
        ids = new[0, start.shape[1] :].tolist()
        self.stream.read(ids)
        yield from ids

    def command(self, line: str) -> str:
        """Do what a line that begins with a slash asks for; return what to say. Raises ValueError, OSError."""
        from longmem.memory.checks import got

        name, rest = [*line[1:].split(maxsplit=1), "", ""][:2]
        if name not in TAKES:
            raise ValueError(f"there is no command {got('/' + name)}.{did_you_mean(name, TAKES)} /help lists them.")
        if bool(TAKES[name]) != bool(rest):
            raise ValueError(
                f"/{name} must have {TAKES[name] or 'nothing'} behind it, got {got(rest)}; /help lists commands."
            )
        if name == "remember":
            from longmem.console import token_progress

            path = _path(rest)
            if path.is_dir() or path == STDIN:
                raise ValueError(f"FILE must be one file, got {got(rest)}; `longmem memorize` reads folders and pipes.")
            if path.name in self.bank:
                raise ValueError(
                    f"FILE must have a name that is new to memory, got {got(path.name)}; /forget it first."
                )
            text = read_text(path)
            with token_progress(path.name, common.console_for(True)) as progress:
                count = self.model.memorize(self.bank, text, path.name, progress=progress)
            return f"remembered {path.name}: {count:,} tokens"
        if name == "forget":
            if rest not in self.bank:
                raise ValueError(f"DOC must be a document in memory, got {got(rest)}; /documents lists them.")
            self.bank.delete(rest)
            return f"forgotten: {rest}"
        if name == "documents":
            found = self.bank.documents()
            return "\n".join(f"{each.document_id}: {each.num_tokens:,} tokens" for each in found) or "nothing yet"
        if name in ("on", "off"):
            self.uses_memory = name == "on"
            return f"memory is {name}"
        return self.why() if name == "why" else f"commands:\n{COMMANDS}"

    def why(self) -> str:
        """Return the passages that the last answer read most."""
        from longmem.tracing import explain

        if self.last is None or not self.last[1]:
            return "there is no answer yet"
        before, answer, has_read = self.last
        if not has_read:
            return "memory was off: nothing was read"
        passages = explain(self.model, before, memory=self.bank, answer=answer).passages(count=5)
        lines = (f"{each.weight:6.1%}  {each.document_id}: {each.text.strip()!r}" for each in passages)
        return "\n".join(lines) or "nothing was in memory"


def _path(given: str) -> Path:
    """Return the file that is meant; many terminals quote the path of one that is dropped on them."""
    path, parts = Path(given).expanduser(), []
    with contextlib.suppress(ValueError):  # half a quotation
        parts = shlex.split(given)
    return path if path.exists() or len(parts) != 1 else Path(parts[0]).expanduser()


def talk(conversation: Conversation, lines: Iterator[str]) -> None:
    """Answer line by line; what goes wrong with one of them is told, and the talk goes on."""

    def say(text: str, end: str = "") -> None:
        print(printable(text), end=end, flush=True)

    for line in lines:
        if line.strip() == "/bye":
            return
        try:
            if line.lstrip().startswith("/"):
                say(conversation.command(line.strip()), end="\n")
            elif line.strip():
                conversation.ask(line, say)
                print()
        except common.MENDABLE as error:
            print(f"longmem: {printable(common.told(error))}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\n(stopped)")
