"""Keeping libraries quiet: their progress bars and warnings, where ours say what matters."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def without_transformers_bars() -> Iterator[None]:
    """Keep transformers from drawing progress bars of its own inside the block."""
    from transformers.utils import logging as transformers_logging

    show_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if show_bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def without_warnings_of(library: str) -> Iterator[None]:
    """Keep the warnings of a library's logger from the terminal inside the block; errors are shown."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
