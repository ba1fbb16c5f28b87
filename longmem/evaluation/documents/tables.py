"""Tables of an evaluation on documents, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longmem.evaluation.book_tables import spelled
from longmem.evaluation.results import markdown_table
from longmem.evaluation.systems import title_of_system

NOTE = (
    "Every document counts the same: perplexity is e to the mean, over documents, of the mean loss of their scored tokens. "
    "Intervals hold 95 % and are over documents (of a single document, over its windows). Bits per byte: of the text of the "
    "scored tokens, in UTF-8. Seconds: of running the window, per scored token; in brackets with what was memorized or "
    "indexed for it, where that is more."
)


def document_rows(metrics: Mapping[str, Any], *, brief: bool = False) -> list[list[str]]:
    """Return the table of systems, its head first: a line for each group of lengths, and its systems below it.

    `brief` leaves out what does not fit a terminal: the intervals of all but what is compared.
    """
    baseline = metrics["baseline"]
    heads = ["perplexity", f"% below {baseline} (95 %)", "bits per byte", "s per token"]
    if not brief:
        heads = ["perplexity (95 %)", f"below {title_of_system(baseline)}, % (95 %)", "bits per byte (95 %)", heads[-1]]
    rows = [["", *heads]]
    for name, part in metrics["lengths"].items():
        count = f"{part['documents']} document" + ("s" if part["documents"] > 1 else "")
        rows.append([f"{name}: {count}, {part['scored_tokens']:,} tokens scored", "", "", "", ""])
        for system, values in part["systems"].items():
            below = "" if system == baseline else spelled(values["reduction_percent"], "+.2f")
            perplexity, bits = (
                f"{found['value']:{form}}" if brief else spelled(found, form)
                for found, form in ((values["perplexity"], ".2f"), (values["bits_per_byte"], ".3f"))
            )
            rows.append([title_of_system(system), perplexity, below, bits, cost_of(values)])
    return rows


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
        gains = [f"{gain['value']:+.3f}" if brief else spelled(gain, "+.3f") for gain in group["systems"].values()]
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
