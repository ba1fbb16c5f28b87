"""Settings of an evaluation with lm-evaluation-harness."""

from __future__ import annotations

import dataclasses

from longmem.evaluation.runs import EvaluationSettings
from longmem.evaluation.runs.settings import Count, Number

SYSTEMS = ("backbone", "off", "on")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarnessSettings(EvaluationSettings):
    """Tasks of lm-evaluation-harness, with the backbone as its `hf` model and LongMem as `longmem`, memory off and on."""

    systems: tuple[str, ...] = SYSTEMS
    """What is compared, among backbone, off and on: the harness asks nothing that another text's memory, passages or a
    longer window could be fed with."""

    tasks: tuple[str, ...]
    """Names of tasks, groups or tags, of lm-eval (which fetches their data) or of `include_path`."""

    include_path: str | None = None
    """Folder with more tasks as YAML files."""

    data: str | None = None
    """Folder with data for tasks of `include_path`: `{data}/{task}.jsonl` replaces the file that the task names."""

    num_fewshot: Number | None = None
    """Examples before each question; None: what each task says."""

    apply_chat_template: bool = False
    """Put what is asked into the tokenizer's chat template."""

    local_tokens: Count | None = None
    """Tokens of a long context that stay in the window; None: as many as find room. With fewer, the options of a multiple
    choice share more work."""

    group: str = "group"
    """Field that says which items belong together, such as questions about one text: intervals are over these groups.
    Items without it stand for themselves."""

    def __post_init__(self) -> None:
        """Check what is beyond types and ranges."""
        super().__post_init__()
        others = [name for name in self.systems if name not in SYSTEMS]
        if others:
            raise ValueError(f"`systems` must be among {', '.join(SYSTEMS)}, got {others[0]!r}.")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"`tasks` must be at least one, and none twice, got {list(self.tasks)}.")
