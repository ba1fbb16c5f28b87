"""What losses say: perplexities by part, reductions, cost, savings by the distance of what is needed; and their tables."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from longmem.evaluation import intervals
from longmem.evaluation.intervals import as_values, perplexity_of
from longmem.evaluation.perplexity.scoring import Cut
from longmem.evaluation.perplexity.settings import PerplexitySettings
from longmem.evaluation.perplexity.texts import DISTANCES, TextScores, bits_per_byte, distance_groups
from longmem.evaluation.summary import share_of_window
from longmem.evaluation.systems.making import title_of_system
from longmem.evaluation.tables import PARITY, Rows, markdown_table, parity_rows, with_interval

# The groups of the paper's table, and documents that are shorter than its shortest; each ends before so many tokens.
LENGTHS = {
    "under 5k tokens": 5_000,
    "5k to 10k": 10_000,
    "10k to 100k": 100_000,
    "100k to 500k": 500_000,
    "500k to 1M": 1_000_000,
    "over 1M": None,
}
ALL = "all documents"
# Each pair: by how much is the perplexity of the first below that of the second.
COMPARISONS = (("on", "backbone"), ("on", "off"), ("on", "wrong"), ("wrong", "off"))


def length_group(num_tokens: int) -> str:
    """Return the group of documents of this length.

    >>> [length_group(count) for count in (4_999, 5_000, 2_000_000)]
    ['under 5k tokens', '5k to 10k', 'over 1M']
    """
    return next(name for name, end in LENGTHS.items() if end is None or num_tokens < end)


def summarize_texts(texts: Sequence[Mapping[Cut, TextScores]], settings: PerplexitySettings) -> dict[str, Any]:
    """Return the metrics of an evaluation.

    `parts` each compare the systems on some windows: of the documents of each group of lengths, and of all; of all books, for
    each cut all windows, and the first ones where only these were scored with longer contexts. A perplexity is e to the mean,
    over texts, of the mean loss of their scored tokens, so that each text counts the same; bits per byte are the mean over
    texts. `distances`, of documents, has the loss saved against memory off (without it, the backbone) by how far back stands
    what a token repeats; there each token counts the same. Intervals hold 95 % and are over texts; those of a single text over
    its windows (`units` 1: of one window, there is none).
    """
    if settings.plan == "books":
        parts, distances = book_parts(texts, settings), None
        shown = next(iter(parts.values()))
    else:
        documents = [next(iter(each.values())) for each in texts]
        groups = {name: [each for each in documents if length_group(each.num_tokens) == name] for name in LENGTHS}
        groups[ALL] = documents
        parts = {name: compare_texts(own, settings.systems, settings) for name, own in groups.items() if own}
        shown, distances = parts[ALL], gains_by_distance(documents, settings)
    systems = {name: {"title": title_of_system(name), **own["perplexity"]} for name, own in shown["systems"].items()}
    summary = {"measure": "perplexity", "systems": systems}
    about = {"plan": settings.plan, "baseline": settings.baseline}
    each_part = ((name, *pair) for name, part in parts.items() for pair in part["parity"].items())
    parity = [{"of": name, "measure": "nats per token", "system": system, **own} for name, system, own in each_part]
    return {**about, "parts": parts, "parity": parity, "distances": distances, "summary": summary}


def book_parts(texts: Sequence[Mapping[Cut, TextScores]], settings: PerplexitySettings) -> dict[str, Any]:
    """Return the comparisons of books, by cut and, where longer contexts have fewer windows, by number of windows."""
    parts, windows = {}, settings.windows_per_document or 0
    without = tuple(name for name in settings.systems if name not in settings.contexts)
    for cut in settings.cuts:
        for count, systems in {windows: without, settings.context_windows or windows: settings.systems}.items():
            part = compare_texts([each[cut].part(slice(count)) for each in texts], systems, settings)
            about = {"cut": str(cut), "windows": count, "memorized_tokens": settings.memorized(cut)}
            parts[str(cut) if count == windows else f"{cut}, first {count} windows"] = about | part
    return parts


def compare_texts(texts: Sequence[TextScores], systems: Sequence[str], settings: PerplexitySettings) -> dict[str, Any]:
    """Return perplexity, reduction against the baseline, bits per byte and seconds per scored token of systems on some texts.

    `reductions_percent` compares pairs of systems. `parity` has for each longer context, where memory is also off,
    `share_of_window` of the nats that are saved.
    """
    units, seed = texts if len(texts) > 1 else texts[0].by_window(), settings.seed
    scores = {system: [unit.systems[system] for unit in units] for system in systems}
    losses = {system: torch.tensor([each.loss for each in own], dtype=torch.float64) for system, own in scores.items()}
    num_bytes = torch.stack([unit.num_bytes.sum() for unit in units])
    found, parity, reductions = {}, {}, {}
    for system, own in losses.items():
        nats = own * torch.tensor([each.num_tokens for each in scores[system]])
        bits = bits_per_byte(nats, num_bytes)[num_bytes > 0]
        whole = [each.systems[system] for each in texts]
        count = sum(each.num_tokens for each in whole)
        found[system] = {
            "loss": own.mean().item(),
            "perplexity": as_values(intervals.perplexity_estimate(own, seed)),
            "reduction_percent": as_values(intervals.perplexity_reduction(own, losses[settings.baseline], seed)),
            "bits_per_byte": as_values((bits.mean().item(), *intervals.bootstrap_interval(bits, seed=seed))),
            "seconds_per_token": sum(each.seconds for each in whole) / count,
            "preparing_seconds_per_token": sum(each.preparing_seconds for each in whole) / count,
            "documents": {text.name: perplexity_of(each.loss) for text, each in zip(texts, whole, strict=True)},
        }
        if system in settings.contexts and {"backbone", "off", "on"} <= set(systems):
            gains = (losses["off"] - losses["on"], losses["backbone"] - own)
            parity[system] = share_of_window(*(each / len(own) for each in gains), seed=seed)
    for one, two in COMPARISONS:
        if {one, two} <= losses.keys():
            reductions[f"{one}/{two}"] = as_values(intervals.perplexity_reduction(losses[one], losses[two], seed))
    return {
        "documents": len(texts),
        "tokens": sum(each.num_tokens for each in texts),
        "scored_tokens": sum(len(window) for each in texts for window in each.distances),
        "scored_bytes": int(num_bytes.sum()),
        "systems": found,
        "reductions_percent": reductions,
        "parity": parity,
    }


def gains_by_distance(documents: Sequence[TextScores], settings: PerplexitySettings) -> dict[str, Any] | None:
    """Return what systems save against memory off, in nats per token, by the distance of what is needed.

    The mean is over tokens, its interval over documents, or windows of a single one. None where there is neither "off" nor
    "backbone" to compare with.
    """
    against = next((system for system in ("off", "backbone") if system in settings.systems), None)
    others = [system for system in settings.systems if system not in ("off", "backbone")]
    if against is None or not others:
        return None
    found: dict[str, Any] = {}
    for number, name in enumerate(DISTANCES):
        own = having(documents, number, settings.ngram)
        own = having(own[0][0].by_window(), number, settings.ngram) if len(own) == 1 else own
        counts, gains = torch.tensor([float(mask.sum()) for _, mask in own]), {}
        for system in others if own else ():
            losses = [[torch.cat(unit.systems[each].losses)[mask] for each in (against, system)] for unit, mask in own]
            saved = torch.stack([(worse - better).double().sum() for worse, better in losses])
            gain = intervals.ratio_of_means(saved, counts, seed=settings.seed)
            assert gain is not None  # every unit has tokens of the group
            gains[system] = as_values(gain)
        found[name] = {"tokens": int(counts.sum()), "units": len(own), "systems": gains}
    return {"against": against, "ngram": settings.ngram, "groups": found}


def having(units: Sequence[TextScores], group: int, ngram: int) -> list[tuple[TextScores, Bool[Tensor, " _scored"]]]:
    """Return the documents, or windows of one, that have tokens of a group of distances, and which tokens these are."""
    masks = [distance_groups(torch.cat(each.distances), *each.places, ngram) == group for each in units]
    return [(each, mask) for each, mask in zip(units, masks, strict=True) if mask.any()]


NOTES = {
    "documents": "Every document counts the same: perplexity is e to the mean, over documents, of the mean loss of their "
    "scored tokens. Intervals hold 95 % and are over documents (of a single document, over its windows). Bits per byte are of "
    "the scored text, in UTF-8. Seconds: of running the window, per scored token; in brackets with what was memorized or "
    "indexed for it, where that is more. In the table of distances every token counts the same.\n",
    "books": "Intervals hold 95 % and are over books (of a single book, over its windows). Cost: seconds per scored token, in "
    "times of the backbone with the same window, every window being read anew; in brackets with the time to memorize, shared "
    "out among the tokens scored here.\n",
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
            window, stride = part["cut"].split("/")
            what = "all scored but the first token" if window == stride else f"the last {stride} of each scored"
            books = f"{part['documents']} books, the first {part['windows']} windows of each"
            after = f"after {part['memorized_tokens']:,} memorized tokens"
            heading = f"Windows of {window} tokens, {what}: {books}, {after}"
            compared = [["", "% (95 %)"]]  # reductions of perplexity
            for pair, values in part["reductions_percent"].items():
                better, worse = (title_of_system(system).removeprefix("LongMem, ") for system in pair.split("/"))
                compared.append([f"perplexity: {better} below {worse}", spelled(values, "+.2f")])
            yield heading, [[head, *system_rows(part, metrics)], *([compared] if len(compared) > 1 else [])]
        elif brief:
            yield document_heading(name, part), [[[*head[:-1], "s per token"], *system_rows(part, metrics)]]
    if metrics["plan"] == "documents" and not brief:
        below = f"below {title_of_system(metrics['baseline'])}, % (95 %)"
        rows = [["", "perplexity (95 %)", below, "bits per byte (95 %)", "s per token"]]
        for name, part in metrics["parts"].items():
            rows += [[document_heading(name, part), "", "", "", ""], *system_rows(part, metrics, with_bits=True)]
        yield "", [rows]
    if metrics["parity"] and not brief:
        yield PARITY, [parity_rows(metrics)]
    if metrics["distances"] is not None:
        yield distance_heading(metrics), [distance_rows(metrics, brief=brief)]


def document_heading(name: str, part: Mapping[str, Any]) -> str:
    """Return a group of lengths with what was scored of it."""
    plural = "s" if part["documents"] > 1 else ""
    return f"{name}: {part['documents']} document{plural}, {part['scored_tokens']:,} tokens scored"


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


def distance_heading(metrics: Mapping[str, Any]) -> str:
    """Return what the table of distances shows."""
    against, ngram = title_of_system(metrics["distances"]["against"]), metrics["distances"]["ngram"]
    back = f"how far back the same {ngram} tokens (the scored one and those before it) last ended"
    return f"Nats per token saved against {against}, by {back}"


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
