"""Tables of an evaluation on documents, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from longmem.evaluation.book_tables import spelled
from longmem.evaluation.results import markdown_table, title_of_system

NOTE = (
    "Every document counts the same: perplexity is e to the mean, over documents, of the mean loss of their scored tokens. "
    "Intervals hold 95 % and are over documents (of a single document, over its windows). Bits per byte: of the text of the "
    "scored tokens, in UTF-8. Seconds: of running the window, per scored token; in brackets with what was memorized or "
    "indexed for it, where that is more."
)


def document_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Return the table of systems, its head first: a line for each group of lengths, and its systems below it."""
    below = f"below {title_of_system(metrics['baseline'])}, % (95 %)"
    rows = [["", "perplexity (95 %)", below, "bits per byte (95 %)", "s per token"]]
    for name, part in metrics["lengths"].items():
        rows.append([group_heading(name, part), "", "", "", ""])
        for system, values in part["systems"].items():
            perplexity, bits = spelled(values["perplexity"], ".2f"), spelled(values["bits_per_byte"], ".3f")
            rows.append([title_of_system(system), perplexity, below_of(metrics, system, values), bits, cost_of(values)])
    return rows


def narrow_tables(metrics: Mapping[str, Any]) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield heading and rows of each group of lengths, with as many intervals as a terminal has room for."""
    for name, part in metrics["lengths"].items():
        rows = [["", "perplexity", f"% below {metrics['baseline']}", "bits/byte", "s/token"]]
        for system, values in part["systems"].items():
            perplexity, bits = f"{values['perplexity']['value']:.2f}", f"{values['bits_per_byte']['value']:.3f}"
            rows.append([title_of_system(system), perplexity, below_of(metrics, system, values), bits, cost_of(values)])
        yield group_heading(name, part), rows


def group_heading(name: str, part: Mapping[str, Any]) -> str:
    """Return a group of lengths with what was scored of it."""
    documents = f"{part['documents']} document" + ("s" if part["documents"] > 1 else "")
    return f"{name}: {documents}, {part['scored_tokens']:,} tokens scored"


def below_of(metrics: Mapping[str, Any], system: str, values: Mapping[str, Any]) -> str:
    """Return by how many percent the perplexity of a system is below the baseline's; nothing for the baseline."""
    return "" if system == metrics["baseline"] else spelled(values["reduction_percent"], "+.2f")


def cost_of(values: Mapping[str, float]) -> str:
    """Return seconds per scored token and, where it is more, with what was prepared."""
    running = f"{values['seconds_per_token']:.2g}"
    total = f"{values['seconds_per_token'] + values['preparing_seconds_per_token']:.2g}"
    return running if running == total else f"{running} ({total})"


def distance_rows(metrics: Mapping[str, Any], *, brief: bool = False) -> list[list[str]]:
    """Return the table of what is saved by distance, its head first; empty where nothing was compared.

    `brief` leaves out what does not fit a terminal: intervals, and what systems are called.
    """
    found = metrics["distances"]
    if found is None:
        return []
    systems = next(group["systems"] for group in found["groups"].values() if group["systems"])
    rows = [["tokens back", "tokens", *(system if brief else title_of_system(system) for system in systems)]]
    for name, group in found["groups"].items():
        short = brief or group["units"] == 1  # one window has no interval
        gains = [f"{gain['value']:+.3f}" if short else spelled(gain, "+.3f") for gain in group["systems"].values()]
        rows.append([name, f"{group['tokens']:,}", *(gains or [""] * len(systems))])
    return rows


def distance_heading(metrics: Mapping[str, Any]) -> str:
    """Return what the table of distances shows."""
    against, ngram = title_of_system(metrics["distances"]["against"]), metrics["distances"]["ngram"]
    return (
        f"Nats per token saved against {against}, by how far back the same {ngram} tokens (the scored one and those before "
        "it) last ended"
    )


def tables(metrics: Mapping[str, Any]) -> str:
    """Return all tables in Markdown, and what their columns mean."""
    parts = [f"{markdown_table(document_rows(metrics))}\n\n{NOTE}\n"]
    if metrics["distances"] is not None:
        rows = markdown_table(distance_rows(metrics))
        parts.append(f"## {distance_heading(metrics)}\n\n{rows}\n\nEvery token counts the same here.\n")
    return "\n".join(parts)
