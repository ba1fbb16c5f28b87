"""The demonstration: what memory does for a small model on this machine, measured here and now.

One recipe, top to bottom: open a model, memorize the first part of a long text, score the rest, show what was read,
continue a prompt, save, reopen, check. No number is stored in the package.
"""

import dataclasses
import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from rich.console import Console
from rich.markup import escape
from safetensors.torch import save_file
from torch import Tensor

from longmem.console import PlainTable, counting, token_progress
from longmem.data.sample_texts import split_texts
from longmem.evaluation.folder import as_json
from longmem.evaluation.intervals import perplexity_of
from longmem.evaluation.perplexity.scoring import Cut, View, WindowScores, loss_difference, make_views, score_windows
from longmem.evaluation.systems import title_of_system
from longmem.evaluation.tables import markdown_table
from longmem.files import make_folder, new_file, write_file
from longmem.memory import MemoryBank
from longmem.model.modeling import LongMemForCausalLM
from longmem.model.names import look_up
from longmem.model.opening import open_model
from longmem.plots import plot_scores, require_matplotlib
from longmem.settings.environment import chosen_device, environment
from longmem.tracing import Passage, explain, read_passages

# Nobody has read this before: whoever answers has it from memory. Below, beginnings of sentences, and how they go on.
NOTES = """Notes of the harbour office.
The lighthouse at Varnholm was built by Ilse Tamberg. Its lamp is lit at a quarter past six.
The ferry to Orsay island is called Kittiwake. The captain of the ferry is Anton Brevik.
The code of the boathouse door is 48213. The spare key is kept under the green barrel.
The next meeting of the harbour office is on Thursday.
"""
ROOM_FOR_NOTES = 512  # tokens
ASKED = {
    "Who built the lighthouse at Varnholm? The lighthouse at Varnholm was built by": "Ilse Tamberg",
    "What is the ferry to Orsay island called? The ferry to Orsay island is called": "Kittiwake",
    "What is the code of the boathouse door? The code of the boathouse door is": "48213",
    "Where is the spare key kept? The spare key is kept under": "the green barrel",
}
SYSTEMS = ("backbone", "off", "on", "wrong")
Scores = dict[str, WindowScores]


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """What a demonstration is told: the options of `longmem demo`, and `new_tokens`, those of the continuation.

    Raises ValueError for numbers that leave nothing to memorize or to score.
    """

    output: Path
    file: Path | None
    model: str
    memory_tokens: int
    windows: int
    window: int
    seed: int
    new_tokens: int = 40

    def __post_init__(self) -> None:
        for name, least in (("windows", 1), ("window", 2), ("new_tokens", 1)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        if self.file is not None and not self.file.is_file():
            raise ValueError(
                f"`file` must be a text file, got {str(self.file)!r}, which is none; leave it out for a manual."
            )
        if self.memory_tokens < self.window:
            raise ValueError(f"`memory_tokens` must be at least `window`, {self.window}, got {self.memory_tokens}.")

    @property
    def cut(self) -> Cut:
        """How the rest is cut into windows: one after the other."""
        return Cut(self.window, self.window)


def run_demo(settings: DemoSettings, console: Console) -> dict[str, Any]:
    """Run the demonstration, tell it on the console and return its metrics; files are in `settings.output`.

    Raises ValueError if the text is too short or a number out of range, RuntimeError if the reopened model computes other
    numbers.
    """
    began = time.perf_counter()
    require_matplotlib()
    make_folder(settings.output)
    torch.manual_seed(settings.seed)
    numbers = itertools.count(1)

    def step(title: str) -> None:
        console.print(f"\n[bold]{next(numbers)}. {escape(title)}[/]")

    step("Open the model")
    model = open_aloud(settings, console)
    scored_tokens = settings.windows * settings.window
    texts = split_texts(model.tokenizer, settings.file, settings.memory_tokens, scored_tokens)
    past, rest, name = texts.past, texts.rest, texts.name

    step(f"Memorize the first {len(past):,} tokens of {name}, and of {texts.wrong_name} as a wrong memory")
    bank = memorize(model, past, "right memory", console)
    wrong_bank = memorize(model, texts.wrong, "wrong memory", console)

    step(f"Score the {len(rest):,} tokens that follow, in windows of {settings.window}")
    views = make_views(SYSTEMS, model, rest, settings.cut, {"on": bank, "wrong": wrong_bank})
    windows = settings.cut.row(0, settings.windows)
    with token_progress("four systems", console) as report:
        progress = counting(report, len(views) * settings.windows * settings.cut.scored)
        scores = {key: score_windows(view, windows, with_reads=True, progress=progress) for key, view in views.items()}
    summary = summarize(scores, settings.seed)
    console.print(PlainTable(table_rows(summary), emphasized=title_of_system("on")))
    console.print(f"  {verdict(scores, settings.seed)}")

    number = int(torch.stack([(off - on).mean() for off, on in losses_of_windows(scores)]).argmax())
    window = rest[number * settings.window : (number + 1) * settings.window]
    step(f"What was read where memory helped most, in window {number + 1}")
    # The tokens of it whose loss memory lowered most, in order of the text.
    off, on = losses_of_windows(scores)[number]
    tokens = sorted(((off - on).topk(min(5, len(off))).indices + 1).tolist())
    begin = model.config.missing_start(window.tolist())
    places = [len(begin) + token for token in tokens]
    reads = read_passages(model, bank, torch.tensor([*begin, *window.tolist()]), [slice(at, at + 1) for at in places])
    for token, (passage,) in zip(tokens, reads, strict=True):
        place = len(past) + number * settings.window + token
        losses = [each[token - 1].item() for each in (off, on)]
        console.print(describe(str(model.tokenizer.decode(window[token])), place, losses, passage))

    step("Continue a prompt from that window, with and without memory")
    continuations = continue_prompt(model, bank, window, settings.new_tokens)
    for title, text in continuations.items():
        console.print(f"  [bold]{title}:[/] {escape(text.strip())}\n")

    step("Memorize a note that nobody has read before, and ask for what it says")
    (page := settings.output / "explain.html").unlink(missing_ok=True)
    answers = ask_about_notes(model, bank, page, console)

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
        "answers": answers,
        "seconds": (seconds := time.perf_counter() - began),
    }
    # Files of an earlier demonstration in the same folder are replaced.
    files = {
        "config.json": as_json({"demo": dataclasses.asdict(settings), "model": model.config.to_dict()}),
        "metrics.json": as_json(metrics),
        "environment.json": as_json({**environment(), "seed": settings.seed}),
        "table.md": markdown_table(table_rows(summary)) + "\n",
    }
    for file, text in files.items():
        write_file(settings.output / file, text)
    tensors = {f"{name}/{system}": torch.stack(own.losses) for system, own in scores.items()}
    with new_file(settings.output / "losses.safetensors") as draft:
        save_file(tensors, draft)
    plot_scores(
        settings.output / "demo.png",
        scores,
        title=f"{settings.model} reading {name}, its first {len(past):,} tokens in memory",
        first_token=len(past),
        cut=settings.cut,
        reading_layers=bank.memory_layers,
    )
    folder = escape(str(settings.output))
    console.print(
        f"\n[bold]Done in {seconds / 60:.1f} minutes.[/] In {folder}:\n"
        "  explain.html (open it: which word of an answer read which passage),\n"
        "  demo.png, table.md, metrics.json, losses.safetensors, config.json, environment.json,\n"
        "  bank (the memory) and side-network (the model). Try them:\n"
        f'  longmem generate --model {folder}/side-network --bank {folder}/bank --prompt "A class is"'
    )
    return metrics


def open_aloud(settings: DemoSettings, console: Console) -> LongMemForCausalLM:
    """Return the model, and say whether its side network is a trained one.

    Raises ValueError if the side network was made for shorter windows than the demonstration's.
    """
    name, window, origin = settings.model, settings.window, look_up(settings.model).origin
    # Settings would ask for a new side network. One that is there encodes text in windows of its own length.
    model = open_model(name, segment_length=window) if origin == "new" else open_model(name)
    model.to(chosen_device())  # type: ignore[arg-type]
    if window > (longest := model.config.segment_length):
        raise ValueError(f"`window` must be at most the model's `segment_length`, {longest}, got {window}.")
    shared = set(model.backbone.parameters())
    weights = sum(own.numel() for own in model.side_network.parameters() if own not in shared) / 1e6
    side_network = {
        "saved": "the side network that was saved beside it",
        "packaged": "the trained side network that comes with this package",
        "new": "a new side network, copied from it and not trained (the README says how to train one)",
    }[origin]
    backbone = escape(model.config.backbone_name_or_path or name)
    console.print(f"  {backbone}, frozen, and {side_network} ({weights:.0f} million weights of its own).")
    return model


def memorize(model: LongMemForCausalLM, ids: Int[Tensor, " tokens"], document_id: str, console: Console) -> MemoryBank:
    """Return a bank that holds these tokens as its one document."""
    chunk = model.config.chunk_size
    room = len(ids) + ROOM_FOR_NOTES
    bank = MemoryBank.for_model(model, capacity_tokens=-(-room // chunk) * chunk)
    with token_progress(document_id, console) as report:
        model.memorize(bank, ids, document_id, progress=report)
    return bank


def summarize(scores: Scores, seed: int) -> dict[str, dict[str, Any]]:
    """Return loss, perplexity, speed and the loss saved against memory off (with its interval) of each system."""
    summary: dict[str, dict[str, Any]] = {}
    for system, result in scores.items():
        gain, low, high = loss_difference(result, scores["off"], seed)
        summary[system] = {
            "loss": result.loss,
            "perplexity": perplexity_of(result.loss),
            "tokens_per_second": result.num_tokens / result.seconds,
            "seconds": result.seconds,
            "scored_tokens": result.num_tokens,
            "gain_over_off": gain,
            "gain_over_off_interval": [low, high],
        }
    return summary


def table_rows(summary: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return the table of systems, its head first: losses and gains in nats per token."""
    rows = [["", "loss", "perplexity", "tokens/s", "gain over off (95 %)"]]
    for system, values in summary.items():
        low, high = values["gain_over_off_interval"]
        gain = "" if system == "off" else f"{values['gain_over_off']:+.4f} ({low:+.3f}, {high:+.3f})"
        numbers = f"{values['loss']:.4f}", f"{values['perplexity']:.2f}", f"{values['tokens_per_second']:,.0f}"
        rows.append([title_of_system(system), *numbers, gain])
    return rows


def verdict(scores: Scores, seed: int) -> str:
    """Return in one sentence what the numbers say about memory, whichever way they fall."""
    gain, low, _ = loss_difference(scores["on"], scores["off"], seed)
    over_wrong, low_over_wrong, _ = loss_difference(scores["on"], scores["wrong"], seed)
    if gain <= 0:
        return f"Memory does not help on this text: the loss is {-gain:.3f} nats higher with it."
    if low <= 0 or low_over_wrong <= 0:
        return f"Memory lowers the loss by {gain:.3f} nats here, which may be chance: an interval holds 0."
    return f"Memory lowers the loss by {gain:.3f} nats; against a wrong memory the right one saves {over_wrong:.3f}."


def losses_of_windows(scores: Scores) -> list[tuple[Tensor, Tensor]]:
    """Return for each window the losses of its tokens with memory off and on."""
    return list(zip(scores["off"].losses, scores["on"].losses, strict=True))


def describe(token: str, place: int, losses: list[float], passage: Passage) -> str:
    """Return two lines on what was read for one token."""
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
    length = min(64, len(window) // 2)
    start = model.config.missing_start(window.tolist())
    prompt = torch.tensor([[*start, *window[:length].tolist()]], device=model.input_device)

    def decode(ids: Tensor) -> str:
        return str(model.tokenizer.decode(ids, skip_special_tokens=True))

    found = {"prompt": decode(window[:length])}
    for title, memory in (("with memory", bank), ("without memory", None)):
        mask = torch.ones_like(prompt)
        ids = model.generate(prompt, attention_mask=mask, memory=memory, max_new_tokens=new_tokens, do_sample=False)
        found[title] = decode(ids[0, prompt.shape[1] :])
    return {**found, "the text itself": decode(window[length : length + new_tokens])}


def ask_about_notes(model: LongMemForCausalLM, bank: MemoryBank, page: Path, console: Console) -> list[dict[str, Any]]:
    """Return, and print, what the model answers with and without the notes in memory, and the passage that it read.

    The notes are deleted again, so the bank holds what it did before. `page`: where to show who read what for one answer.
    """
    model.memorize(bank, NOTES, "notes")
    answers: list[dict[str, Any]] = []
    for prompt, expected in ASKED.items():
        ids = model.tokenizer(prompt)["input_ids"]
        length = len(model.tokenizer(f" {expected}", add_special_tokens=False)["input_ids"])
        trace = explain(model, ids, memory=bank, max_new_tokens=length, do_sample=False)
        said, without = trace.answer.strip(), (trace.answer_without_memory or "").strip()
        is_right = said.startswith(expected)
        passages = trace.passages(count=1)
        answers.append({"prompt": prompt, "expected": expected, "with": said, "without": without, "is_right": is_right})
        answers[-1]["read"] = [{**passage._asdict(), "text": passage.text} for passage in passages]
        console.print(f"  {escape(prompt)}\n    [bold]with memory:[/] {escape(repr(said))}", end="")
        console.print(f"   without: {escape(repr(without))}")
        for passage in passages:
            text = "".join(
                f"[bold cyan]{escape(text)}[/]" if chunk >= 0 else f"[dim]{escape(text)}[/]"
                for chunk, text in passage.pieces
            )
            console.print(f"    read in {escape(passage.document_id)}: {' '.join(text.split())}")
        if is_right or not page.exists():
            trace.to_html(page, f"Who read what: {prompt}")
    bank.delete("notes")
    num_right = sum(bool(answer["is_right"]) for answer in answers)
    console.print(f"  {num_right} of {len(answers)} answered as the note says.")
    return answers


def reopened_difference(
    model: LongMemForCausalLM, bank: MemoryBank, rest: Int[Tensor, " tokens"], scores: Scores, settings: DemoSettings
) -> float:
    """Save model and bank, open both again, and return the largest difference of a loss in the first window."""
    model.save_pretrained(settings.output / "side-network")
    bank.save(settings.output / "bank")
    reopened = LongMemForCausalLM.from_pretrained(settings.output / "side-network").to(model.input_device)  # type: ignore[arg-type]
    with MemoryBank.open(settings.output / "bank", reopened, read_only=True) as reopened_bank:
        again = score_windows(View(reopened, rest, reopened_bank), settings.cut.row(0, 1))
    return (again.losses[0] - scores["on"].losses[0]).abs().max().item()
