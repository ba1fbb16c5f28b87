"""What an evaluation on ChapterBreak is told."""

from __future__ import annotations

import dataclasses
from typing import Literal

from longmem.evaluation.runs.settings import Count, EvaluationSettings

# They see the end of the context that fits the window, and nothing else.
LOCAL_SYSTEMS = ("backbone", "off")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChapterBreakSettings(EvaluationSettings):
    """What is asked, and how much of the story each system may use."""

    data: str
    """JSON file in ChapterBreak's format, plain or .json.gz; or name of a dataset on the Hugging Face Hub that has such
    files, the official one being simsun131/chapterbreak."""

    file: str | None = None
    """File of a dataset on the Hub; None: the one whose name has the smallest ctx_N that fills the longest context."""

    split: str | None = None
    """Split of the file, in the official one pg19 or ao3; None: the only one."""

    contexts: tuple[Count, ...] = (512, 2048, 8192)
    """Tokens before the chapter break that are told, each a row of the table. What does not fit the window is in memory or
    among the passages; where all fits there are no other systems than backbone and off."""

    suffix_tokens: Count = 128
    """Tokens of each suffix that are scored; the rest is cut off."""

    joiner: str = "\n\n"
    """What stands between context and suffix, the same for all suffixes, in the place of the whitespace there. Its tokens
    are read and not scored."""

    scoring: Literal["per_token", "sum"] = "per_token"
    """Which log-likelihood the summary, the differences and the figure are of; the table has both."""

    def __post_init__(self) -> None:
        """Check what is beyond types and ranges."""
        super().__post_init__()
        if not self.contexts or len(set(self.contexts)) < len(self.contexts):
            raise ValueError(f"`contexts` must be at least one length, and none twice, got {list(self.contexts)}.")
        if self.suffix_tokens >= self.window:
            raise ValueError(
                f"`suffix_tokens` must be less than `window`, which holds a suffix and what comes before it, got "
                f"{self.suffix_tokens} and {self.window}."
            )
