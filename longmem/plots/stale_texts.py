"""What memory gains on real text under each refresh policy, after each change of the encoder."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from longmem.plots.style import draw_interval, require_matplotlib

COLORS = {"oracle": "#1f6fb4", "never": "#d98c21"}
POLICY_COLOR = "#5a8f4e"


def plot_stale_texts(path: str | PathLike[str], metrics: Mapping[str, Any], *, title: str) -> None:
    """Draw, for each change of the encoder, the gain of every system over memory off, with its interval.

    Args:
        path: PNG to write.
        metrics: of `summarize_stale_texts`.
        title: of the figure.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # without pyplot: no display and no global state

    changes = metrics["changes"]
    names = [name for name in next(iter(changes.values()))["systems"] if name != "off"]
    figure = Figure(figsize=(4.6 + 3.2 * len(changes), 1.6 + 0.5 * len(names)), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(1, len(changes), sharey=True, squeeze=False)[0]
    for axes, (rate, change) in zip(panels, changes.items(), strict=True):
        for place, name in enumerate(reversed(names)):
            values = change["systems"][name]
            gain, *ends = values["gain"]
            draw_interval(axes, place, gain, ends, COLORS.get(name, POLICY_COLOR), f"{gain:+.3f}")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(names)), [change["systems"][name]["title"] for name in reversed(names)], fontsize=8)
        axes.set_ylim(-0.6, len(names) - 0.3)
        axes.set_title(f"tuned at {rate}, gap {change['gap']:.4f}", fontsize=9)
        axes.set_xlabel("nats a token below memory off", fontsize=9)
    figure.savefig(path, dpi=130)
