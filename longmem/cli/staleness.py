"""`longmem bank staleness` and `longmem bank refresh`: what in a bank another encoder wrote, and encoding it again."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import shlex
import time
from typing import TYPE_CHECKING, Any

from longmem.cli import common
from longmem.cli.common import POLICIES, add_command, bank_folder, model_option

if TYPE_CHECKING:
    from rich.console import Console

    from longmem.memory import MemoryBank
    from longmem.memory.refresh import RefreshReport, StalenessReport

STALENESS_EXAMPLES = """\
  longmem bank staleness --bank memory                       which encoders wrote what is there
  longmem bank staleness --bank memory --model tuned         what would be stale if this model read it
  longmem bank staleness --bank memory --model tuned --probe --plot staleness.png

Nothing in the bank changes. stale: another encoder wrote it. behind: changes of the encoder since. gap: how far its weights
have moved since, relative to their norm. drift: the same of stored keys, which --probe measures on about 64 tokens of each
earlier encoder. masked: chunks that the refresh policy does not let be read as they are. moved: by a map, to this encoder.
"""
REFRESH_EXAMPLES = """\
  longmem bank refresh --bank memory --model tuned                    everything that another encoder wrote
  longmem bank refresh --bank memory --budget-tokens 100000           so much for now; the next run goes on

Text is not needed: token ids are kept. Each document is on the disk once it is whole, so a run can be stopped with Ctrl-C,
and the next one goes on. --policy also says what the bank does from now on when its encoder changes.
"""


def add(actions: Any) -> None:
    """Add `bank staleness` and `bank refresh`."""
    bank = bank_folder(on_cluster=False)
    reader = model_option("the bank's own encoder, and no model is opened; with --probe, the model that wrote the bank")
    report = add_command(actions, "staleness", show, "say what another encoder wrote", STALENESS_EXAMPLES, bank, reader)
    report.add_argument("--probe", action="store_true", help="measure how far keys have moved")
    report.add_argument("--plot", type=common.new_file, metavar="FILE", help="figure to write (.png)")
    encoder = model_option("the model that wrote the bank, as it is now")
    again = add_command(actions, "refresh", refresh, "encode again what is stale", REFRESH_EXAMPLES, bank, encoder)
    again.add_argument("--budget-tokens", type=int, metavar="N", help="encode no more than that; default: all")
    again.add_argument("--policy", metavar="NAME", help=f"follow it from now on: {POLICIES}; default: the bank's")


def show(arguments: argparse.Namespace) -> None:
    """Say in words whether a bank is fresh, then print the figures, in total, by encoder and by document."""
    from longmem.console import PlainTable
    from longmem.plots import plot_staleness, require_matplotlib

    if arguments.plot is not None:
        require_matplotlib()
    common.open_bank(arguments.bank).close()  # says what is wrong with it before a model is opened
    model_name = model = None
    if arguments.model or arguments.probe:
        model_name, model = common.open_model_of(arguments)
    with common.open_bank(arguments.bank) as bank:  # without the model: nothing is to change
        report, policy = bank.freshness.report(model, probe=arguments.probe), bank.refresh
    summary = verdict(report, policy, model_name, command(arguments, model_name))
    if arguments.plot is not None:
        compared = "its current encoder" if model_name is None else model_name
        plot_staleness(arguments.plot, report, title=f"Staleness of {arguments.bank} for {compared}")
    if arguments.json:
        values = {"bank": str(arguments.bank), "model": model_name, "refresh": policy, "is_fresh": report.is_fresh}
        common.print_json(finite({**values, "summary": summary, **dataclasses.asdict(report)}))
        return
    console = common.console_for(False)
    console.print(summary)
    for rows in tables(report):
        if len(rows) > 1:
            console.print("")
            console.print(PlainTable(rows))


def refresh(arguments: argparse.Namespace) -> None:
    """Bring a bank up to date with a model: what a map of its policy does not move is encoded again."""
    from longmem.encoder.stamp import refuse_other_recipe
    from longmem.memory import MemoryBank

    if arguments.budget_tokens is not None and arguments.budget_tokens < 1:
        raise ValueError(f"`--budget-tokens` must be at least 1, got {arguments.budget_tokens}.")
    common.open_bank(arguments.bank).close()
    if arguments.policy is not None:
        MemoryBank(memory_layers=[0], chunk_size=1, refresh=arguments.policy)  # refuses what is not known
    console = common.console_for(arguments.json, quiet=arguments.quiet)
    model_name, model = common.open_model_of(arguments)
    with common.open_bank(arguments.bank, write=True) as bank:
        refuse_other_recipe(bank.encoders.stamp, model.encoder_stamp())  # before anything is changed
        before = bank.freshness.report(model)
        if arguments.policy is not None:
            bank.freshness.use(arguments.policy)
        began = time.perf_counter()
        done = bring_up_to_date(bank, model, arguments.budget_tokens, console)
        seconds = time.perf_counter() - began
        if arguments.model:
            common.remember_model(arguments.bank, model_name)
        after, policy = bank.freshness.report(model), bank.refresh
    if arguments.json:
        values: dict[str, Any] = {"bank": str(arguments.bank), "model": model_name, "refresh": policy}
        speed = round(done.tokens / seconds, 1)
        counts = {
            "stale_tokens_before": before.tokens_to_encode,
            "tokens_left": after.tokens_to_encode,
            "unreachable": after.unreachable,
        }
        common.print_json({**values, **dataclasses.asdict(done), "tokens_per_second": speed, **counts})
        return
    tokens_moved = after.mapped * after.tokens // max(1, after.entries)
    moved = f", {tokens_moved:,} tokens moved by a map" if after.mapped else ""
    speed_text = f" ({done.tokens / seconds:,.0f} tokens/s)" if done.tokens else ""
    console.print(f"{arguments.bank}: {done.tokens:,} tokens encoded again in {seconds:,.1f} s{speed_text}{moved}.")
    if after.tokens_to_encode:
        console.print(f"{after.tokens_to_encode:,} tokens are left; `{command(arguments, arguments.model)}` goes on.")
    if after.unreachable:
        console.print(unreachable_sentence(after))
    if done.failed:
        console.print(f"{done.failed:,} segments got numbers that are not finite, and stay as they were.")


def bring_up_to_date(bank: MemoryBank, model: Any, budget_tokens: int | None, console: Console) -> RefreshReport:
    """Return what was done: a bank that maps what it can does that first, and what is still stale is encoded again."""
    from longmem.console import token_progress

    before = dataclasses.replace(bank.freshness.refreshed)
    if bank.freshness.policy.reads_mapped():
        bank.ready_for(model)
    with contextlib.ExitStack() as shown:
        has_work = bank.freshness.report(model).tokens_to_encode > 0
        progress = shown.enter_context(token_progress("refresh", console)) if has_work else None
        bank.freshness.reencode(model, budget_tokens=budget_tokens, progress=progress)
    return bank.freshness.refreshed.since(before)


def verdict(report: StalenessReport, policy: str, model_name: str | None, refresh_command: str) -> str:
    """Return in words whether a bank is fresh and, if it is not, what differs and what to do."""
    reader = "the bank's current encoder" if model_name is None else model_name
    if report.differs_for_good:
        names = ", ".join(report.differs_for_good)
        return (
            f"Not for {reader}: it and the bank differ in {names}, which no encoding again puts right. Memorize the texts "
            "anew: `longmem bank export`, then `longmem bank add` with this model and another folder."
        )
    if not report.entries:
        return "The bank holds no chunk, so nothing is stale."
    if report.is_fresh:
        return f"Fresh: all {report.tokens:,} tokens were written by {reader}."
    stale, unknown = (round(share * report.tokens) for share in (report.stale_share, report.unknown_share))
    parts = []
    if stale:
        parts.append(
            f"{stale:,} of {report.tokens:,} tokens were written by another encoder than {reader}; the encoders differ in "
            f"{', '.join(report.differs)}"
        )
    if unknown:
        parts.append(f"for {unknown:,} of {report.tokens:,} tokens nobody knows which encoder wrote them")
    sentences = [f"Stale: {'; '.join(parts)}.", policy_sentence(report, policy)]
    if report.tokens_to_encode:
        sentences.append(f"`{refresh_command}` encodes {report.tokens_to_encode:,} tokens again.")
    if report.unreachable:
        sentences.append(unreachable_sentence(report))
    return " ".join(sentences)


def policy_sentence(report: StalenessReport, policy: str) -> str:
    """Return what the refresh policy makes of what is stale."""
    kind = policy.partition(":")[0]
    if not report.masked:
        return f"The refresh policy is {policy}: all of it may be read as it is."
    if kind == "frozen" and report.masked == report.entries:
        return f"The refresh policy is {policy}: the bank is refused."
    masked = "all" if report.masked == report.entries else f"{report.masked:,} of {report.entries:,}"
    return f"The refresh policy is {policy}: {masked} chunks are not read as they are."


def unreachable_sentence(report: StalenessReport) -> str:
    """Return how many documents can't be encoded again, which they are, and the way out."""
    names = [each.document_id for each in report.documents if each.is_unreachable]
    some = ", ".join(repr(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
    count = "1 document" if len(names) == 1 else f"{len(names):,} documents"
    return (
        f"{count} can't be encoded again as a whole, because token ids or what stood before them are not known ({some}): "
        "replace from the text, by `longmem bank update`, or delete."
    )


def command(arguments: argparse.Namespace, model_name: str | None) -> str:
    """Return the command that brings the bank up to date."""
    words = ["longmem", "bank", "refresh", "--bank", str(arguments.bank)]
    return shlex.join([*words, *(["--model", model_name] if arguments.model and model_name else [])])


def tables(report: StalenessReport) -> tuple[list[list[str]], ...]:
    """Return the tables of the whole bank, of the encoders that wrote what is there, and of documents, their heads first."""
    from longmem.plots.banks import short_digest

    totals = {
        "tokens": f"{report.tokens:,}",
        "stale": f"{report.stale_share:.1%}",
        "of an unknown encoder": f"{report.unknown_share:.1%}",
        "masked chunks": f"{report.masked:,}",
        "moved chunks": f"{report.mapped:,}",
        "tokens to encode again": f"{report.tokens_to_encode:,}",
        "documents that can't be": f"{report.unreachable:,}",
        "behind, mean": f"{report.lag_mean:.2f}",
        "behind, most": f"{report.lag_max:,}",
        "gap, most": number(report.gap_max),
        "drift, most": number(report.probe_drift),
        "age, mean": f"{report.age_mean / 3600:,.1f} h",
    }
    versions = [
        [
            short_digest(each),
            f"{each.tokens:,}",
            "?" if each.lag is None else f"{each.lag}",
            number(each.gap),
            number(0.0 if each.is_fresh else each.drift),
            ", ".join(each.differs),
        ]
        for each in report.versions
    ]
    documents = [
        [
            each.document_id,
            f"{each.tokens:,}",
            f"{each.stale_share:.0%}",
            f"{each.lag_max}",
            f"{each.masked:,}",
            f"{each.mapped:,}",
            f"{each.age / 3600:,.1f} h",
            "" if not each.stale_share else "not all" if each.is_unreachable else "yes",
        ]
        for each in report.documents
    ]
    return (
        [["in total", ""], *map(list, totals.items())],
        [["encoder", "tokens", "behind", "gap", "drift", "differs in"], *versions],
        [["document", "tokens", "stale", "behind", "masked", "moved", "age", "refresh"], *documents],
    )


def number(value: float | None) -> str:
    """Return a number with three digits, "?" for what is not known."""
    return "?" if value is None else f"{value:.3g}"


def finite(values: Any) -> Any:
    """Return the same values for JSON, which has no number for what is not finite: None stands there."""
    if isinstance(values, dict):
        return {str(name): finite(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
