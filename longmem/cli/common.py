"""What the commands share: parsers whose help teaches, opening models and banks by name, consoles, JSON."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from longmem.errors import StaleMemoryError, printable
from longmem.files import write_file

if TYPE_CHECKING:
    from rich.console import Console

    from longmem.memory import MemoryBank
    from longmem.model.modeling import LongMemForCausalLM

# With the trained side network that comes with this package, if there is one.
DEFAULT_MODEL = "smollm2-135m"
POLICIES = '"frozen", "eager", "lazy", "bounded:max_lag=4", ...'
MENDABLE = (ValueError, OSError, ImportError, RuntimeError, MemoryError)  # errors that a user can do something about
Run = Callable[[argparse.Namespace], int | None]


class UsageError(Exception):
    """A command line that is not understood; `usage` shows how the command is called."""

    def __init__(self, command: str, usage: str, message: str) -> None:
        super().__init__(message)
        self.command, self.usage = command, usage


class Parser(argparse.ArgumentParser):
    """A parser that raises what it does not understand, for the one place that tells of errors.

    "~" is the home folder in a `Path`, and in a "name" that may be one: shells leave it as it stands in `--bank=~/memory`.
    """

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.register("type", Path, path)
        self.register("type", "name", os.path.expanduser)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(self.prog, self.format_usage(), message)


class TeachingFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults, and keep the lines of examples."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # None, False and an empty list say nothing as a default.
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def add_command(
    to: Any, name: str, run: Run, summary: str, examples: str, *parents: argparse.ArgumentParser
) -> argparse.ArgumentParser:
    """Return the parser of a new command; `run` does its work and returns an exit code, None for 0."""
    common = option("--json", action="store_true", help="print one JSON object on standard output, for a program")
    common.add_argument(
        "--quiet", action="store_true", help="print results alone: no progress, nothing of what was done"
    )
    common.add_argument("--debug", action="store_true", help="show where an error came from")
    command = _add_parser(to, name, summary, examples, parents=[common, *parents])
    command.set_defaults(run=run)
    return command


def add_group(to: Any, name: str, summary: str, examples: str) -> Any:
    """Return what commands of a new group are added to."""
    group = _add_parser(to, name, summary, examples)
    return group.add_subparsers(dest="action", required=True, metavar="ACTION")


def _add_parser(to: Any, name: str, summary: str, examples: str, **options: Any) -> argparse.ArgumentParser:
    description, epilog = summary[0].upper() + summary[1:] + ".", f"examples:\n{examples}" if examples else None
    options |= {"description": description, "epilog": epilog, "formatter_class": TeachingFormatter}
    return to.add_parser(name, help=summary, **options)


def told(error: BaseException) -> str:
    """Return what an error says."""
    too_little = "this machine has too little memory for that; give it less at once, or a smaller model."
    return too_little if isinstance(error, MemoryError) else str(error)


def option(*names: str, **settings: Any) -> argparse.ArgumentParser:
    """Return a parser with one option, to be a parent of the commands that have it."""
    parser = Parser(add_help=False)
    parser.add_argument(*names, **settings)
    return parser


def bank_folder(on_cluster: bool = True) -> argparse.ArgumentParser:
    """Return the option of all commands that use a bank; not `on_cluster`: of those that work on folders alone."""
    kind, more = (place, "; ray://NAME: one on a cluster") if on_cluster else (folder_alone, "")
    return option("--bank", required=True, type=kind, metavar="DIR", help=f"folder of the bank{more}")


def folder_alone(name: str) -> Path:
    """Return the folder of a bank, for a command that knows no other kind of place."""
    if isinstance(found := place(name), str):
        raise argparse.ArgumentTypeError(
            f"this command works on folders, got {name}; end the bank by `longmem cluster stop`, and name a shard's folder"
        )
    return found


def place(name: str) -> Path | str:
    """Return the folder of a bank, or the name of one on a cluster as it was given."""
    return name if name.startswith("ray://") else path(name)


def path(name: str) -> Path:
    """Return a path, "~" being the home folder."""
    if not name:
        raise argparse.ArgumentTypeError("it must name a file or a folder; '.' is the current one")
    return Path(os.path.expanduser(name))


def new_file(name: str) -> Path:
    """Return the path of a file that can be written: what is wrong with it is told before the work."""
    from longmem.memory.folder.catalogue import CATALOGUE

    found = path(name)
    if found.is_dir() or not found.parent.is_dir() or (found.parent / CATALOGUE).exists():
        raise argparse.ArgumentTypeError(f"it must name a file in a folder that is there and holds no bank, got {name}")
    return found


def labels() -> argparse.ArgumentParser:
    """Return the options that label a document."""
    parser = option("--tag", action="append", default=[], help="tag of the documents; may be given several times")
    parser.add_argument("--pin", action="store_true", help="keep the documents from eviction")
    return parser


def model_option(default: str = "the model that wrote the bank") -> argparse.ArgumentParser:
    """Return the options that name a model and where it runs."""
    options = option("--model", type="name", help=f"default: {default}")
    add_device(options)
    return options


def add_device(command: argparse.ArgumentParser) -> None:
    """Add the option that says where models run."""
    names = '"cpu", "cuda", "cuda:1"; auto: a GPU where there is one'
    command.add_argument("--device", default="auto", metavar="NAME", help=names)


def add_writing(command: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Add the options that say how new tokens are written."""
    command.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help="tokens to write")
    command.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    command.add_argument("--seed", type=int, default=0, help="for a temperature above 0")


def drawing(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return how `generate` is to choose tokens. Raises ValueError for an option of `add_writing` that makes no sense."""
    from longmem.memory.checks import validate_integer
    from longmem.streaming.stream import LEAST_TEMPERATURE

    if arguments.max_new_tokens < 1:
        raise ValueError(f"`--max-new-tokens` must be at least 1, got {arguments.max_new_tokens}.")
    warmth = arguments.temperature
    if warmth and not LEAST_TEMPERATURE <= warmth < math.inf:
        raise ValueError(
            f"`--temperature` must be 0 or more, and above 0 at least {LEAST_TEMPERATURE}, got {warmth}; 0 takes the "
            "likeliest token."
        )
    validate_integer("--seed", arguments.seed)
    return {"do_sample": True, "temperature": warmth} if warmth else {"do_sample": False}


def use_device(name: str, argument: str = "--device") -> None:
    """Let models be opened on the device that was chosen. Raises ValueError if this machine has no such device."""
    from longmem.memory.checks import validate_device
    from longmem.settings.environment import DEVICE

    if name != "auto":
        validate_device(argument, name)
    DEVICE.set(name)
    if ":" in name:
        os.environ["ACCELERATE_TORCH_DEVICE"] = name


def open_named(name: str, arguments: argparse.Namespace) -> LongMemForCausalLM:
    """Return the model of a name, on the device that was chosen."""
    use_device(arguments.device)

    from longmem.model.opening import open_model
    from longmem.settings.environment import chosen_device

    return open_model(name).to(chosen_device())  # type: ignore[arg-type]


def console_for(as_json: bool, *, markup: bool = False, quiet: bool = False) -> Console:
    """Return where to talk to people: standard output, unless a program reads that; nowhere if it is to be quiet.

    Without `markup`, names of documents and files that hold "[draft]" or ":smile:" are printed as they are.
    """
    from longmem.console import SafeConsole

    return SafeConsole(stderr=as_json, quiet=quiet, highlight=False, soft_wrap=True, markup=markup, emoji=False)


def print_json(values: dict[str, Any]) -> None:
    """Print what a program reads; characters that a terminal would obey are escaped as JSON does it."""
    # An encoding that lacks a character would escape it in a way that JSON does not know.
    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    text = json.dumps(values, indent=2, ensure_ascii=not is_unicode)
    print("".join(each if printable(each) == each else json.dumps(each)[1:-1] for each in text))


def tell(arguments: argparse.Namespace, values: dict[str, Any], sentence: str) -> None:
    """Print what a command has done: the values for a program, or a sentence for people."""
    if arguments.json:
        print_json(values)
    else:
        console_for(False, quiet=arguments.quiet).print(sentence)


def open_bank(folder: Path | str, model: LongMemForCausalLM | None = None, *, write: bool = False) -> MemoryBank:
    """Return the bank in a folder, or on a cluster, to be closed.

    Where something is stale and its refresh policy has work to do, also a bank that is only read is opened for writing.

    Raises ValueError if there is none; StaleMemoryError if another encoder wrote it and its policy is "frozen", or encoding
    again would not help.
    """
    if isinstance(folder, str):
        from longmem.cluster import ClusterBank

        shards = ClusterBank.connect(folder)
        if model is not None:
            shards.ready_for(model)
        return shards  # type: ignore[return-value]  # it has what these commands use of a bank, or says that it has not

    from longmem.memory import MemoryBank, has_bank

    if not has_bank(folder):
        raise ValueError(f"there is no bank in {folder}; `longmem memorize FILE --bank {folder}` makes one.")
    if model is not None:
        with MemoryBank.open(folder, read_only=True) as bank:
            refuse_stale(folder, bank, model)
            is_current = bank.fingerprint == model.encoder_fingerprint() and not bank.freshness.has_stale
            write = write or (bank.refresh != "frozen" and not is_current)
    return MemoryBank.open(folder, model, read_only=not write)


def refuse_stale(folder: Path, bank: MemoryBank, model: LongMemForCausalLM) -> None:
    """Raise StaleMemoryError, which names the commands that help, if a frozen bank is another encoder's."""
    from longmem.encoder.stamp import refuse_other_recipe

    known, stamp = bank.encoders.stamp, model.encoder_stamp()
    if known is None or known.digest == stamp.digest or bank.refresh != "frozen":
        return
    refuse_other_recipe(known, stamp)
    raise StaleMemoryError(
        f"another encoder than this model's wrote the bank in {folder}; they differ in {', '.join(known.diff(stamp))}, so what "
        f"is stored is not what this model would store. `longmem bank refresh --bank {folder}`, with the `--model` of this "
        "command, encodes it again; `longmem bank "
        "staleness`, with the same two options, says what is stale and changes nothing."
    )


def bytes_on_disk(folder: Path | str) -> int:
    """Return the size of all files in a folder; 0 for a bank on a cluster, whose folders are elsewhere."""
    return 0 if isinstance(folder, str) else sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def model_of_bank(folder: Path | str) -> str | None:
    """Return the name of the model that wrote a bank; None where that is not known."""
    if isinstance(folder, str):
        from longmem.cluster import ClusterBank

        return ClusterBank.connect(folder).model_name

    from longmem.memory.folder.foreign import model_in

    return model_in(folder)


def open_model_of(arguments: argparse.Namespace) -> tuple[str, LongMemForCausalLM]:
    """Return name and model: the one that was chosen or, without a choice, the one that wrote the bank."""
    name = arguments.model or model_of_bank(arguments.bank)
    if name is None:
        raise ValueError(f"the bank in {arguments.bank} does not say which model wrote it; name it with `--model`.")
    return name, open_named(name, arguments)


def remember_model(folder: Path, name: str) -> None:
    """Write down the model of a bank, by a name that is found from anywhere. Whether that model fits, the bank checks."""
    from longmem.memory.folder.foreign import MODEL_FILE
    from longmem.model.names import lasting_name

    name = lasting_name(name)
    write_file(folder / MODEL_FILE, json.dumps({"model": name}, indent=2) + "\n")
