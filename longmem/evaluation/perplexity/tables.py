"""Tables of an evaluation, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from longmem.evaluation.systems.names import title_of_system
from longmem.evaluation.tables import Rows, markdown_table, with_interval

NOTES = {
    "documents": (
        "Every document counts the same: perplexity is e to the mean, over documents, of the mean loss of their scored tokens. "
        "Intervals hold 95 % and are over documents (of a single document, over its windows). Bits per byte are of the scored "
        "text, in UTF-8. Seconds: of running the window, per scored token; in brackets with what was memorized or indexed for "
        "it, where that is more. In the table of distances every token counts the same.\n"
    ),
    "books": (
        "Intervals hold 95 % and are over books (of a single book, over its windows). Cost: seconds per scored token, in "
        "times of the backbone with the same window, every window being read anew; in brackets with the time to memorize, "
        "shared out among the tokens scored here.\n"
    ),
}


def markdown(metrics: Mapping[str, Any]) -> str:
    """Return all tables, and what their columns mean."""
    parts = []
    for heading, tables in sections(metrics):
        parts += [f"## {heading}\n"] * bool(heading) + [f"{markdown_table(rows)}\n" for rows in tables]
    return "\n".join([*parts, NOTES[metrics["plan"]]])


def sections(metrics: Mapping[str, Any], *, brief: bool = False) -> Iterator[tuple[str, list[Rows]]]:
    """Yield headings and the tables below them; `brief` leaves out what does not fit a terminal."""
    head = ["", "perplexity (95 %)", f"below {metrics['baseline']}, % (95 %)", "cost"]
    for name, part in metrics["parts"].items():
        if metrics["plan"] == "books":
            yield book_heading(part), [[head, *system_rows(part, metrics)], comparison_rows(part)]
        elif brief:
            yield document_heading(name, part), [[[*head[:-1], "s per token"], *system_rows(part, metrics)]]
    if metrics["plan"] == "documents" and not brief:
        below = f"below {title_of_system(metrics['baseline'])}, % (95 %)"
        rows = [["", "perplexity (95 %)", below, "bits per byte (95 %)", "s per token"]]
        for name, part in metrics["parts"].items():
            rows += [[document_heading(name, part), "", "", "", ""], *system_rows(part, metrics, with_bits=True)]
        yield "", [rows]
    if metrics["distances"] is not None:
        yield distance_heading(metrics), [distance_rows(metrics, brief=brief)]


def document_heading(name: str, part: Mapping[str, Any]) -> str:
    """Return a group of lengths with what was scored of it."""
    documents = f"{part['documents']} document" + ("s" if part["documents"] > 1 else "")
    return f"{name}: {documents}, {part['scored_tokens']:,} tokens scored"


def book_heading(part: Mapping[str, Any]) -> str:
    """Return how windows were cut, and what was scored of them."""
    window, stride = part["cut"].split("/")
    what = "all scored but the first token" if window == stride else f"the last {stride} of each scored"
    return (
        f"Windows of {window} tokens, {what}: {part['documents']} books, the first {part['windows']} windows of each, after "
        f"{part['memorized_tokens']:,} memorized tokens"
    )


def system_rows(part: Mapping[str, Any], metrics: Mapping[str, Any], *, with_bits: bool = False) -> Rows:
    """Return a row for each system: perplexity, how far it is below the baseline's, perhaps bits per byte, and the cost.

    That is in seconds per token, of books in times of the baseline's; in brackets, where it is more, with what was prepared.
    """
    rows, baseline, is_books = [], metrics["baseline"], metrics["plan"] == "books"
    unit, form = (part["systems"][baseline]["seconds_per_token"], ".2f") if is_books else (1, ".2g")
    for system, values in part["systems"].items():
        running = values["seconds_per_token"]
        alone, both = (f"{cost / unit:{form}}" for cost in (running, running + values["preparing_seconds_per_token"]))
        below = "" if system == baseline else spelled(values["reduction_percent"], "+.2f")
        bits = [spelled(values["bits_per_byte"], ".3f")] if with_bits else []
        cost = alone if alone == both else f"{alone} ({both})"
        rows.append([title_of_system(system), spelled(values["perplexity"], ".2f"), below, *bits, cost])
    return rows


def comparison_rows(part: Mapping[str, Any]) -> Rows:
    """Return the table of comparisons, its head first: reductions of perplexity and shares of a gain, in percent."""
    rows = [["", "% (95 %)"]]
    for pair, values in part["reductions_percent"].items():
        better, worse = (title_of_system(system).removeprefix("LongMem, ") for system in pair.split("/"))
        rows.append([f"perplexity: {better} below {worse}", spelled(values, "+.2f")])
    for system, share in part["share_of_gain_percent"].items():
        size = f"{int(system.partition('-')[2]):,}"
        said = "the longer window may gain nothing" if share is None else spelled(share, ".1f")
        rows.append([f"gain of memory on, as a share of the gain of a window of {size}", said])
    return rows


def distance_heading(metrics: Mapping[str, Any]) -> str:
    """Return what the table of distances shows."""
    against, ngram = title_of_system(metrics["distances"]["against"]), metrics["distances"]["ngram"]
    return (
        f"Nats per token saved against {against}, by how far back the same {ngram} tokens (the scored one and those before "
        "it) last ended"
    )


def distance_rows(metrics: Mapping[str, Any], *, brief: bool = False) -> Rows:
    """Return the table of what is saved by distance, its head first; `brief` without intervals, and with short names."""
    groups = metrics["distances"]["groups"]
    systems = next(group["systems"] for group in groups.values() if group["systems"])
    rows = [["tokens back", "tokens", *(system if brief else title_of_system(system) for system in systems)]]
    for name, group in groups.items():
        short = brief or group["units"] == 1  # one window has no interval
        gains = [f"{gain['value']:+.3f}" if short else spelled(gain, "+.3f") for gain in group["systems"].values()]
        rows.append([name, f"{group['tokens']:,}", *(gains or [""] * len(systems))])
    return rows


def spelled(values: Mapping[str, Any], form: str) -> str:
    """Return an estimate with its interval."""
    return with_interval(values["value"], values["interval"], form)
