"""Result folders: every number beside the settings, versions, seed and raw losses that it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from longmem.evaluation.perplexity import WindowScores, loss_difference
from longmem.settings.environment import environment

# What systems are called in tables and figures; "context-N" is named by `title_of_system`.
TITLES = {
    "backbone": "backbone, same window",
    "bm25": "backbone, passages by BM25",
    "hidden": "backbone, passages by hidden states",
    "off": "LongMem, memory off",
    "on": "LongMem, memory on",
    "wrong": "LongMem, wrong memory",
}


def title_of_system(name: str) -> str:
    """Return what a system is called in tables and figures.

    >>> title_of_system("context-8192")
    'backbone, window 8,192'
    """
    kind, _, size = name.partition("-")
    return f"backbone, window {int(size):,}" if kind == "context" else TITLES[name]


def summarize(scores: Mapping[str, WindowScores], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Return loss, perplexity, speed and the loss saved against memory off (with its interval) of each system."""
    summary: dict[str, dict[str, Any]] = {}
    for system, result in scores.items():
        gain, low, high = loss_difference(result, scores["off"], seed)
        summary[system] = {
            "loss": result.loss,
            "perplexity": result.perplexity,
            "tokens_per_second": result.tokens_per_second,
            "seconds": result.seconds,
            "scored_tokens": result.num_tokens,
            "gain_over_off": gain,
            "gain_over_off_interval": [low, high],
        }
    return summary


def table_rows(summary: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return the rows of the table for people, its head first: losses and gains in nats per token."""
    rows = [["", "loss", "perplexity", "tokens/s", "gain over off (95 %)"]]
    for system, values in summary.items():
        low, high = values["gain_over_off_interval"]
        gain = "" if system == "off" else f"{values['gain_over_off']:+.4f} ({low:+.3f}, {high:+.3f})"
        name = TITLES.get(system, system)
        speed = f"{values['tokens_per_second']:,.0f}" if "tokens_per_second" in values else ""
        rows.append([name, f"{values['loss']:.4f}", f"{values['perplexity']:.2f}", speed, gain])
    return rows


def markdown_table(rows: list[list[str]]) -> str:
    """Return rows as a Markdown table; numbers are aligned right.

    >>> print(markdown_table([["", "loss"], ["off", "2.5"]]))
    |  | loss |
    |---|---:|
    | off | 2.5 |
    """
    head, *body = rows
    rule = "|---|" + "---:|" * (len(head) - 1)
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in body)])


def write_results(
    folder: str | PathLike[str],
    *,
    config: Mapping[str, Any],
    scores: Mapping[str, Mapping[str, WindowScores]],
    metrics: Mapping[str, Any],
    summary: Mapping[str, Any],
    seed: int,
) -> Path:
    """Write `config.json`, `environment.json`, `losses.safetensors`, `metrics.json` and `table.md`; return the folder.

    Args:
        folder: made if missing; files of an earlier result are replaced.
        config: resolved settings of model and run.
        scores: by text, then by system; the losses are stored as `text/system`.
        metrics: what a program reads.
        summary: of `summarize`, for the table.
        seed: of whatever was drawn.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(as_json(config), encoding="utf-8")
    write_metrics(folder, metrics=metrics, table=markdown_table(table_rows(summary)) + "\n", seed=seed)
    losses = {f"{text}/{system}": result.losses for text, group in scores.items() for system, result in group.items()}
    save_file(losses, folder / "losses.safetensors")
    return folder


def write_metrics(folder: Path, *, metrics: Mapping[str, Any], table: str, seed: int) -> None:
    """Write `environment.json`, `metrics.json` and `table.md` to a folder that has configuration and losses."""
    (folder / "environment.json").write_text(as_json({**environment(), "seed": seed}), encoding="utf-8")
    (folder / "metrics.json").write_text(as_json(metrics), encoding="utf-8")
    (folder / "table.md").write_text(table, encoding="utf-8")


def as_json(content: Mapping[str, Any]) -> str:
    """Return the text of a JSON file for people and programs; what JSON does not know is written as text."""
    return json.dumps(content, indent=2, default=str) + "\n"


def verdict(scores: Mapping[str, WindowScores], seed: int = 0) -> str:
    """Return in one sentence what the numbers say about memory, whichever way they fall."""
    gain, low, _ = loss_difference(scores["on"], scores["off"], seed)
    over_wrong, low_over_wrong, _ = loss_difference(scores["on"], scores["wrong"], seed)
    if gain <= 0:
        return f"Memory does not help on this text: the loss is {-gain:.3f} nats higher with it."
    if low <= 0 or low_over_wrong <= 0:
        return f"Memory lowers the loss by {gain:.3f} nats here, which may be chance: an interval holds 0."
    return f"Memory lowers the loss by {gain:.3f} nats; against a wrong memory the right one saves {over_wrong:.3f}."
