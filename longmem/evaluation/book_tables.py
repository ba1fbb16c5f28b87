"""What the losses of books say: perplexities, reductions, shares of what a longer window gains, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from longmem.evaluation.book_files import BookScores
from longmem.evaluation.book_plan import BookPlan, Cut
from longmem.evaluation.intervals import Estimate, perplexity_estimate, perplexity_ratio, ratio_of_means
from longmem.evaluation.perplexity import SYSTEMS
from longmem.evaluation.results import TITLES, markdown_table, title_of_system

# Each pair: by how much is the perplexity of the first below that of the second.
COMPARISONS = (("on", "backbone"), ("on", "off"), ("on", "wrong"), ("wrong", "off"))

ENCODED = ("on", "wrong")  # systems that read memory


def losses_of_units(books: Mapping[str, BookScores], cut: Cut, system: str, windows: int) -> Float[Tensor, " units"]:
    """Return the mean loss of each book over its first windows; of a single book, that of each window."""
    losses = [book.cuts[str(cut)][system].losses[:windows].double() for book in books.values()]
    return losses[0].mean(dim=1) if len(losses) == 1 else torch.stack([each.mean() for each in losses])


def summarize_books(books: Mapping[str, BookScores], plan: BookPlan, seed: int = 0) -> dict[str, Any]:
    """Return the metrics of an evaluation on books, for each cut.

    `all_windows` compares the four systems on all windows. `context_windows`, where longer contexts were asked for,
    compares everything on the windows that these were scored on, and has `share_of_gain_percent`: what memory saves
    against the backbone (in nats) as a share of what the longer window saves; None where that may be nothing.
    Every book counts the same. Intervals hold 95 % and are over books; those of a single book over its windows.

    `cost` has, for each system, the seconds per scored token over all windows that it scored, each window being read
    anew; their ratio to those of the backbone with the same window; and for systems that read memory the ratio when
    the time to encode what is in memory at the start is shared out among the tokens scored here.
    """
    cuts = {}
    for cut in plan.cuts:
        cuts[str(cut)] = {
            "memorized_tokens": plan.memorized(cut),
            "all_windows": compare(books, cut, SYSTEMS, plan.windows, seed),
            "cost": costs(books, cut, plan),
        }
        if plan.contexts:
            cuts[str(cut)]["context_windows"] = compare(books, cut, plan.systems, plan.long_windows, seed)
    return {"books": list(books), "cuts": cuts}


def compare(
    books: Mapping[str, BookScores], cut: Cut, systems: Sequence[str], windows: int, seed: int
) -> dict[str, Any]:
    """Return perplexities, reductions and shares of systems on the first windows of each book."""
    losses = {system: losses_of_units(books, cut, system, windows) for system in systems}
    backbone = losses["backbone"]
    found: dict[str, Any] = {"windows": windows, "systems": {}, "reductions_percent": {}, "share_of_gain_percent": {}}
    for system, own in losses.items():
        found["systems"][system] = {
            "loss": own.mean().item(),
            "perplexity": estimate(perplexity_estimate(own, seed)),
            "reduction_percent": estimate(reduction(own, backbone, seed)),
            "books": {
                name: book.cuts[str(cut)][system].losses[:windows].double().mean().exp().item()
                for name, book in books.items()
            },
        }
    for better, worse in COMPARISONS:
        found["reductions_percent"][f"{better}/{worse}"] = estimate(reduction(losses[better], losses[worse], seed))
    for system in systems:
        if system not in SYSTEMS:
            share = ratio_of_means(100 * (backbone - losses["on"]), backbone - losses[system], seed=seed)
            found["share_of_gain_percent"][system] = None if share is None else estimate(share)
    return found


def reduction(losses: Float[Tensor, " units"], baseline: Float[Tensor, " units"], seed: int) -> Estimate:
    """Return by how many percent a perplexity is below another on the same units, and the interval."""
    value, low, high = (100 * (1 - ratio) for ratio in perplexity_ratio(losses, baseline, seed))
    return value, high, low  # the highest ratio is the lowest reduction


def estimate(values: Estimate) -> dict[str, Any]:
    """Return a value with its interval, for JSON."""
    return {"value": values[0], "interval": list(values[1:])}


def costs(books: Mapping[str, BookScores], cut: Cut, plan: BookPlan) -> dict[str, dict[str, float]]:
    """Return seconds per scored token of each system, and what that is in times of the backbone; see `summarize_books`."""
    found: dict[str, dict[str, float]] = {}
    for system in plan.systems:
        scores = [book.cuts[str(cut)][system] for book in books.values()]
        tokens = sum(each.num_tokens for each in scores)
        seconds = sum(each.seconds for each in scores) / tokens
        found[system] = {"seconds_per_token": seconds}
        found[system]["relative"] = seconds / found["backbone"]["seconds_per_token"]
        if system in ENCODED:
            encoding = sum(book.encoding_seconds for book in books.values()) * plan.memorized(cut) / tokens
            found[system]["relative_with_encoding"] = (seconds + encoding) / found["backbone"]["seconds_per_token"]
    return found


def system_rows(part: Mapping[str, Any], cost: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Return the table of systems, its head first: perplexity, how far it is below the backbone's, and the cost."""
    rows = [["", "perplexity (95 %)", "below backbone, % (95 %)", "cost"]]
    for system, values in part["systems"].items():
        below = "" if system == "backbone" else spelled(values["reduction_percent"], "+.2f")
        times = f"{cost[system]['relative']:.2f}"
        if system in ENCODED:
            times += f" ({cost[system]['relative_with_encoding']:.2f})"
        rows.append([title_of_system(system), spelled(values["perplexity"], ".2f"), below, times])
    return rows


def comparison_rows(part: Mapping[str, Any]) -> list[list[str]]:
    """Return the table of comparisons, its head first: reductions of perplexity and shares of a gain, in percent."""
    rows = [["", "% (95 %)"]]
    for pair, values in part["reductions_percent"].items():
        better, worse = (TITLES[system].removeprefix("LongMem, ") for system in pair.split("/"))
        rows.append([f"perplexity: {better} below {worse}", spelled(values, "+.2f")])
    for system, share in part["share_of_gain_percent"].items():
        size = f"{int(system.partition('-')[2]):,}"
        said = "the longer window may gain nothing" if share is None else spelled(share, ".1f")
        rows.append([f"gain of memory on, as a share of the gain of a window of {size}", said])
    return rows


def sections(metrics: Mapping[str, Any]) -> list[tuple[str, list[list[str]], list[list[str]]]]:
    """Return, for each cut and set of windows, a heading and its two tables."""
    found = []
    for cut, values in metrics["cuts"].items():
        window, stride = cut.split("/")
        what = "all scored but the first token" if window == stride else f"the last {stride} of each scored"
        for key in ("all_windows", "context_windows"):
            part = values.get(key)
            if part is None or (key == "all_windows" and same_windows(values)):
                continue
            heading = (
                f"Windows of {window} tokens, {what}: {len(metrics['books'])} books, the first {part['windows']} windows "
                f"of each, after {values['memorized_tokens']:,} memorized tokens"
            )
            found.append((heading, system_rows(part, values["cost"]), comparison_rows(part)))
    return found


def same_windows(cut: Mapping[str, Any]) -> bool:
    """Return whether the longer contexts of a cut were scored on all windows, so that one table holds everything."""
    return "context_windows" in cut and cut["context_windows"]["windows"] == cut["all_windows"]["windows"]


def markdown(metrics: Mapping[str, Any]) -> str:
    """Return all tables, and what their columns mean."""
    note = (
        "Intervals hold 95 % and are over books (of a single book, over its windows). Cost: seconds per scored token, in "
        "times of the backbone with the same window, every window being read anew; in brackets with the time to memorize, "
        "shared out among the tokens scored here.\n"
    )
    parts = [f"## {head}\n\n{markdown_table(own)}\n\n{markdown_table(both)}\n" for head, own, both in sections(metrics)]
    return "\n".join([*parts, note])


def spelled(values: Mapping[str, Any], form: str) -> str:
    """Return a value with its interval.

    >>> spelled({"value": 12.345, "interval": [12, 13]}, ".1f")
    '12.3 (12.0 to 13.0)'
    """
    low, high = values["interval"]
    return f"{values['value']:{form}} ({low:{form}} to {high:{form}})"
