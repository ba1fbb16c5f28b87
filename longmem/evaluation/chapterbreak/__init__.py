"""ChapterBreak: which of six passages begins the next chapter (Sun, Thai and Iyyer, 2022)."""

from longmem.evaluation.chapterbreak.baselines import BASELINES, baseline_values
from longmem.evaluation.chapterbreak.building import BuildRules, build, save_split
from longmem.evaluation.chapterbreak.data import Example, Split, choose, load_split
from longmem.evaluation.chapterbreak.runner import Asking, run_chapterbreak
from longmem.evaluation.chapterbreak.scoring import credit
from longmem.evaluation.chapterbreak.settings import ChapterBreakSettings
from longmem.evaluation.chapterbreak.tables import chapterbreak_rows, margin_rows, summarize_chapterbreak

__all__ = [
    "BASELINES",
    "Asking",
    "BuildRules",
    "ChapterBreakSettings",
    "Example",
    "Split",
    "baseline_values",
    "build",
    "chapterbreak_rows",
    "choose",
    "credit",
    "load_split",
    "margin_rows",
    "run_chapterbreak",
    "save_split",
    "summarize_chapterbreak",
]
