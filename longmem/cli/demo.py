"""The demonstration: what memory does for a small model on this machine, measured here and now.

One recipe, top to bottom: open a model, memorize the first part of a long text, score the rest, show what was read,
continue a prompt, save, reopen, check. No number is stored in the package.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from longmem.cli import common
from longmem.cli.parsing import DEFAULT_MODEL, add_command

if TYPE_CHECKING:
    from jaxtyping import Int
    from rich.console import Console
    from torch import Tensor

    from longmem.evaluation.perplexity import WindowScores
    from longmem.memory import MemoryBank
    from longmem.model.modeling import LongMemForCausalLM
    from longmem.model.reads import Passage

Scores: TypeAlias = "dict[str, WindowScores]"
EXAMPLES = """\
Opens a small model and its trained side network, memorizes the first part of a long text, scores the rest with four
systems on the same tokens, shows what was read, continues a prompt, saves, reopens and compares. All numbers are computed
in the run. Two cores need a few minutes.

examples:
  longmem demo
  longmem demo --file book.txt --output book-demo
  longmem demo --windows 4                          quicker, rougher
  longmem demo --model runs/books/side-network      a side network of your own
"""


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """What `longmem demo` can be told.

    Args:
        output: folder for results, figure, bank and side network.
        file: text to read; default: Python's reference manual.
        model: name of a model (`longmem.model.names`).
        memory_tokens: tokens of the first part, which is memorized.
        windows: windows of the rest, which are scored.
        window: tokens the model sees at once.
        new_tokens: tokens of the continuation.
        seed: of torch and of the bootstrap.
    """

    output: Path = Path("longmem-demo")
    file: Path | None = None
    model: str = DEFAULT_MODEL
    memory_tokens: int = 12_288
    windows: int = 12
    window: int = 512
    new_tokens: int = 40
    seed: int = 0


def add(commands: Any) -> None:
    """Add the command `demo`."""
    demo = add_command(commands, "demo", run, "measure what memory does, on this machine, in minutes", EXAMPLES)
    default = DemoSettings()
    demo.add_argument("--file", type=Path, help="text to read (default: Python's reference manual)")
    demo.add_argument("--output", type=Path, default=default.output, metavar="DIR", help="folder for all results")
    demo.add_argument("--model", default=default.model, help="name or folder; see `longmem --help`")
    demo.add_argument("--memory-tokens", type=int, default=default.memory_tokens, help="tokens of the text to memorize")
    demo.add_argument("--windows", type=int, default=default.windows, help="windows of the rest to score")
    demo.add_argument("--window", type=int, default=default.window, help="tokens the model sees at once")
    demo.add_argument("--seed", type=int, default=default.seed, help="seed of torch and of the intervals")


def run(arguments: argparse.Namespace) -> None:
    """Run the demonstration with the settings of the command line."""
    names = {field.name for field in dataclasses.fields(DemoSettings)}
    settings = DemoSettings(**{name: value for name, value in vars(arguments).items() if name in names})
    metrics = run_demo(settings, common.console_for(arguments.json, markup=True))
    if arguments.json:
        common.print_json(metrics)


def run_demo(settings: DemoSettings, console: Console) -> dict[str, Any]:
    """Run the demonstration, tell it on the console and return its metrics; files are in `settings.output`.

    Raises:
        ValueError: the text is too short, or a number is out of range.
        RuntimeError: the reopened model does not compute the same numbers.
    """
    import torch
    from rich.markup import escape

    from longmem.console import Headings, plain_table
    from longmem.data.sample_texts import split_texts
    from longmem.evaluation.results import TITLES, summarize, table_rows, verdict, write_results
    from longmem.model.names import look_up
    from longmem.model.reads import read_passages
    from longmem.plots import plot_scores, require_matplotlib

    began = time.perf_counter()
    require_matplotlib()
    validate_settings(settings)
    settings.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    step = Headings(console)

    step("Open the model")
    model = open_aloud(settings, console)
    scored_tokens = settings.windows * settings.window
    texts = split_texts(model.tokenizer, settings.file, settings.memory_tokens, scored_tokens)
    past, rest, name = texts.past, texts.rest, texts.name

    step(f"Memorize the first {len(past):,} tokens of {name}, and of {texts.wrong_name} as a wrong memory")
    bank = memorize(model, past, "right memory", console)
    wrong_bank = memorize(model, texts.wrong, "wrong memory", console)

    step(f"Score the {len(rest):,} tokens that follow, in windows of {settings.window}")
    scores = score_aloud(model, rest, bank, wrong_bank, settings, console)
    summary = summarize(scores, settings.seed)
    console.print(plain_table(table_rows(summary), emphasized=TITLES["on"]))
    console.print(f"  {verdict(scores, settings.seed)}")

    number = int((scores["off"].losses - scores["on"].losses).mean(dim=1).argmax())
    window = rest[number * settings.window : (number + 1) * settings.window]
    step(f"What was read where memory helped most, in window {number + 1}")
    tokens = helped_tokens(scores, number)
    reads = read_passages(model, bank, window, [slice(token, token + 1) for token in tokens])
    for token, (passage,) in zip(tokens, reads, strict=True):
        place = len(past) + number * settings.window + token
        losses = [scores[system].losses[number, token - 1].item() for system in ("off", "on")]
        console.print(describe(str(model.tokenizer.decode(window[token])), place, losses, passage))

    step("Continue a prompt from that window, with and without memory")
    continuations = continue_prompt(model, bank, window, settings.new_tokens)
    for title, text in continuations.items():
        console.print(f"  [bold]{title}:[/] {escape(text.strip())}\n")

    step("Save, reopen, compare")
    difference = reopened_difference(model, bank, rest, scores, settings)
    console.print(f"  reopened: largest difference of {settings.window - 1} losses {difference:.1e}")
    if difference > 1e-4:
        raise RuntimeError(f"the reopened model differs by {difference:.3g} in a loss: what was saved is not the same.")

    metrics = {
        "side_network": look_up(settings.model).origin,
        "systems": summary,
        "reopened_largest_difference": difference,
        "passages_read": [dataclasses.asdict(passage) for (passage,) in reads],
        "continuations": continuations,
        "seconds": (seconds := time.perf_counter() - began),
    }
    config = {"demo": dataclasses.asdict(settings), "model": model.config.to_dict()}
    write_results(
        settings.output, config=config, scores={name: scores}, metrics=metrics, summary=summary, seed=settings.seed
    )
    plot_scores(
        settings.output / "demo.png",
        scores,
        title=f"{settings.model} reading {name}, its first {len(past):,} tokens in memory",
        first_token=len(past),
        window=settings.window,
        reading_layers=bank.memory_layers,
    )
    console.print(closing(settings.output, seconds))
    return metrics


def validate_settings(settings: DemoSettings) -> None:
    """Raise ValueError for numbers that leave nothing to memorize or to score."""
    for name, least in (("windows", 1), ("window", 2), ("new_tokens", 1)):
        if (value := getattr(settings, name)) < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    if settings.memory_tokens < settings.window:
        raise ValueError(f"`memory_tokens` must be at least `window`, {settings.window}, got {settings.memory_tokens}.")


def open_aloud(settings: DemoSettings, console: Console) -> LongMemForCausalLM:
    """Return the model, and say whether its side network is a trained one.

    Raises:
        ValueError: the side network was made for shorter windows than the demonstration's.
    """
    from rich.markup import escape

    from longmem.model.names import look_up
    from longmem.model.opening import open_model

    origin = look_up(settings.model).origin
    name, window = settings.model, settings.window
    # Settings would ask for a new side network. One that is there encodes text in windows of its own length.
    model = open_model(name, segment_length=window) if origin == "new" else open_model(name)
    if window > (longest := model.config.segment_length):
        raise ValueError(f"`window` must be at most the model's `segment_length`, {longest}, got {window}.")
    weights = sum(parameter.numel() for parameter in model.side_network.parameters()) / 1e6
    side_network = {
        "saved": "the side network that was saved beside it",
        "packaged": "the trained side network that comes with this package",
        "new": "a new side network, copied from it and not trained (the README says how to train one)",
    }[origin]
    backbone = escape(model.config.backbone_name_or_path or name)
    console.print(f"  {backbone}, frozen, and {side_network} ({weights:.0f} million weights).")
    return model


def memorize(model: LongMemForCausalLM, ids: Int[Tensor, " tokens"], document_id: str, console: Console) -> MemoryBank:
    """Return a bank that holds these tokens as its one document."""
    from longmem.console import token_progress
    from longmem.memory import MemoryBank

    chunk = model.config.chunk_size
    bank = MemoryBank.for_model(model, capacity_tokens=-(-len(ids) // chunk) * chunk)
    with token_progress(document_id, console) as report:
        model.memorize(bank, ids, document_id, progress=report)
    return bank


def score_aloud(
    model: LongMemForCausalLM,
    rest: Int[Tensor, " tokens"],
    bank: MemoryBank,
    wrong_bank: MemoryBank,
    settings: DemoSettings,
    console: Console,
) -> Scores:
    """Return the scores of all systems, with one progress bar over them."""
    from longmem.console import token_progress
    from longmem.evaluation.perplexity import compare_systems

    finished: dict[str, int] = {}
    with token_progress("four systems", console) as report:

        def report_system(system: str, done: int, total: int) -> None:
            finished[system] = done
            report(sum(finished.values()), 4 * total)

        return compare_systems(
            model, rest, memory=bank, wrong_memory=wrong_bank, window=settings.window, progress=report_system
        )


def helped_tokens(scores: Scores, number: int, count: int = 5) -> list[int]:
    """Return the tokens of a window whose loss memory lowered most, in order of the text."""
    gains = (scores["off"].losses - scores["on"].losses)[number]
    return sorted((gains.topk(min(count, len(gains))).indices + 1).tolist())


def describe(token: str, place: int, losses: list[float], passage: Passage) -> str:
    """Return two lines on what was read for one token."""
    from rich.markup import escape

    before, chunk, after = (escape(" ".join(part.split())) for part in (passage.before, passage.chunk, passage.after))
    return (
        f"  [bold]{escape(repr(token))}[/] at {place:,}: loss {losses[0]:.2f} -> {losses[1]:.2f}, read tokens "
        f"{passage.start:,} to {passage.stop:,} (share {passage.share:.3f})\n"
        f"      [dim]...{before}[/] [bold cyan]{chunk}[/] [dim]{after}...[/]"
    )


def continue_prompt(
    model: LongMemForCausalLM, bank: MemoryBank, window: Int[Tensor, " window"], new_tokens: int
) -> dict[str, str]:
    """Return the prompt (the start of the window), its greedy continuations, and how the text really goes on."""
    import torch

    length = min(64, len(window) // 2)
    prompt = window[None, :length].to(model.input_device)

    def decode(ids: Tensor) -> str:
        return str(model.tokenizer.decode(ids, skip_special_tokens=True))

    found = {"prompt": decode(window[:length])}
    for title, memory in (("with memory", bank), ("without memory", None)):
        mask = torch.ones_like(prompt)
        ids = model.generate(prompt, attention_mask=mask, memory=memory, max_new_tokens=new_tokens, do_sample=False)  # type: ignore[misc]
        found[title] = decode(ids[0, length:])
    return {**found, "the text itself": decode(window[length : length + new_tokens])}


def reopened_difference(
    model: LongMemForCausalLM, bank: MemoryBank, rest: Int[Tensor, " tokens"], scores: Scores, settings: DemoSettings
) -> float:
    """Save model and bank, open both again, and return the largest difference of a loss in the first window."""
    from longmem.evaluation.perplexity import score_windows
    from longmem.memory import MemoryBank
    from longmem.model.modeling import LongMemForCausalLM

    model.save_pretrained(settings.output / "side-network")
    bank.save(settings.output / "bank")
    reopened = LongMemForCausalLM.from_pretrained(settings.output / "side-network")
    with MemoryBank.open(settings.output / "bank", reopened, read_only=True) as reopened_bank:
        again = score_windows(reopened, rest[: settings.window], window=settings.window, memory=reopened_bank)
    return (again.losses - scores["on"].losses[:1]).abs().max().item()


def closing(output: Path, seconds: float) -> str:
    """Return the last lines: where the files are, and what to do next."""
    from rich.markup import escape

    folder = escape(str(output))
    return (
        f"\n[bold]Done in {seconds / 60:.1f} minutes.[/] In {folder}:\n"
        "  demo.png, table.md, metrics.json, losses.safetensors, config.json, environment.json,\n"
        "  bank (the memory) and side-network (the model). Try them:\n"
        f'  longmem generate --model {folder}/side-network --bank {folder}/bank --prompt "A class is"'
    )
