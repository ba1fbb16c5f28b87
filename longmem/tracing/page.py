"""A trace as one page of HTML: click a word to see what it read, click a passage to see which words read it."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from typing import Any

FRAME_HEIGHT = 640


def trace_page(data: dict[str, Any], title: str) -> str:
    """Return a page in one file, which loads nothing; `data`: `Trace.to_dict`."""
    # A script of this type ends at `</`, wherever it stands.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    template = files("longmem.tracing").joinpath("page.html").read_text(encoding="utf-8")
    before, after = template.split("{{data}}")
    return before.replace("{{title}}", html.escape(title)) + text + after


def trace_frame(data: dict[str, Any]) -> str:
    """Return the page inside a frame, for a notebook: its styles stay its own."""
    page = html.escape(trace_page(data, "Who read what"), quote=True)
    return (
        f'<iframe srcdoc="{page}" sandbox="allow-scripts" style="width:100%;height:{FRAME_HEIGHT}px;border:0"></iframe>'
    )
