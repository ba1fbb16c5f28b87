"""Tasks of lm-evaluation-harness as one evaluation: lm-eval asks, every item becomes a record."""

import copy
import dataclasses
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.metrics import mean
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from rich.console import Console
from transformers import set_seed

from longmem.console import without_warnings_of
from longmem.errors import did_you_mean
from longmem.evaluation.folder import RunFolder, digest, spread
from longmem.evaluation.harness.model import LongMemLM, validate_tokenizer
from longmem.evaluation.registry import CONFIGS
from longmem.evaluation.settings import Count, EvaluationSettings, Number
from longmem.evaluation.systems.making import context_size, is_longer_window, validate_context
from longmem.evaluation.task import Axis, Case, Measure, Record, Task
from longmem.model.modeling import LongMemForCausalLM

SYSTEMS = ("backbone", "off", "on")
OWN_TASKS = CONFIGS / "harness_tasks"
ACCURACIES = ("acc_norm", "acc", "exact_match")  # what is drawn, the first that a task has


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarnessSettings(EvaluationSettings):
    """Tasks of lm-evaluation-harness, the backbone as its model `hf`, LongMem as `longmem`; `limit` is of each task."""

    systems: tuple[str, ...] = SYSTEMS
    """What is compared, among backbone, context-N, off and on: the harness asks nothing that another text's memory or
    passages could be fed with."""

    tasks: tuple[str, ...]
    """Names of tasks, groups or tags, of lm-eval (which fetches their data) or of `include_path`."""

    include_path: str | None = None
    """Folder with more tasks as YAML files, which take the place of lm-eval's of the same name; None: the two that come
    along, quality and babi."""

    data: str | None = None
    """Folder with data: `{data}/{task}.jsonl` replaces what a task would read, fetch or make. Examples before a question
    are then taken from it too, unless the task's file has its own."""

    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What tasks that make or choose their data are told (lm-eval's `--metadata`), such as {max_seq_lengths: [4096]} for
    RULER. They measure with the model's tokenizer, and draw from `seed`."""

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
        super().__post_init__()
        others = [name for name in self.systems if name not in SYSTEMS and not is_longer_window(name)]
        if others:
            raise ValueError(f"`systems` must be among {', '.join(SYSTEMS)}, context-N, got {others[0]!r}.")


class Harness(Task):
    """lm-eval's tasks and metrics: shares of right answers in percent, everything else as lm-eval tells it.

    Metrics that are means have intervals over groups of items; of any other there is lm-eval's value alone.
    """

    name, title, kind = "harness", "lm-evaluation-harness", HarnessSettings
    axes = (Axis("task", "panel"),)
    pool = "none"
    sort_by = ("doc_id",)
    notes = ("Seconds per item are all that lm-eval needs, preparing as well.",)

    def __init__(self, settings: HarnessSettings) -> None:
        super().__init__(settings)
        self._tokenizer = tempfile.TemporaryDirectory()  # for tasks that open one by its name
        self.manager = task_manager(settings, {"tokenizer": self._tokenizer.name, **settings.metadata})
        self.tasks: dict[str, Any] = {}  # of `cases`

    @property
    def run_title(self) -> str:
        return f"{self.settings.model_title} in {self.title}: {', '.join(self.settings.tasks)}"

    @property
    def measures(self) -> Mapping[str, Measure]:
        """Return the metrics of every task, `metric,filter` where it has filters of its own, accuracies first."""
        found = {}
        for name, task in self.tasks.items():
            kinds = [each["name"] for each in task.config.filter_list or ()] or ["none"]
            own = task.aggregation()
            for metric in sorted(own, key=lambda metric: (*ACCURACIES, metric).index(metric)):
                aggregate = None if own[metric] is mean or is_length(metric) else own[metric]
                is_share = is_length(metric) or (metric in ACCURACIES and aggregate is None)
                for title in [metric_title(metric, kind) for kind in kinds]:
                    unit = "%" if is_share else "lm-eval's unit"
                    found[f"{name}: {title}"] = Measure(title, unit, aggregate=aggregate)
        return found

    def score(self, record: Record) -> Mapping[str, Any]:
        task, kind = record["task"], record["filter"]
        counted = {metric: value for metric, value in record["metrics"].items() if not is_length(metric) or value >= 0}
        return {f"{task}: {metric_title(metric, kind)}": value for metric, value in counted.items()}

    def cases(self, model: LongMemForCausalLM) -> list[Case]:
        """Return none, lm-eval asks: make or fetch what it will.

        Raises ValueError if the tokenizer has no eos token, which it needs, or a longer window does not fit the backbone.
        """
        validate_tokenizer(model)
        for name in filter(is_longer_window, self.settings.systems):
            validate_context(model, context_size(name), self.settings.window)
        model.tokenizer.save_pretrained(self._tokenizer.name)
        self.tasks = load_tasks(self.manager, self.settings)
        return []

    def identity(self, cases: Sequence[Case]) -> dict[str, Any]:
        """Return a hash of what each task asks: its configuration, wherever its data lie, and the items."""
        found = {}
        for name, task in self.tasks.items():
            config = {key: str(value) for key, value in task.dump_config().items()}
            config = {key: value for key, value in config.items() if not key.startswith(("dataset_", "meta"))}
            found[name] = digest([config, str([task.eval_docs[number] for number in self._items(task)])])
        return found

    def ask(self, model: LongMemForCausalLM, run: RunFolder, console: Console) -> bool:
        """Let lm-eval ask; a task that a system has answered whole is not asked again."""
        for system in self.settings.systems:
            lm = make_lm(system, model, self.settings)
            for name, task in self.tasks.items():
                items = self._items(task)
                own = [record for record in run.records if (record["system"], record["task"]) == (system, name)]
                if not {record["doc_id"] for record in own}.issuperset(items):
                    console.print(f"{name}, {system}: {len(items)} items", markup=False)
                    records = self._answers(lm, name, task, system, items)
                    run.write(record for record in records if record["id"] not in run)
        return True

    def _items(self, task: Any) -> list[int]:
        return spread(len(task.eval_docs), self.settings.limit)

    def _answers(self, lm: HFLM, name: str, task: Any, system: str, items: list[int]) -> list[dict[str, Any]]:
        """Return the records of a system's answers to a task; each has an even share of what they cost."""
        settings, start = self.settings, time.perf_counter()
        options: dict[str, Any] = {"num_fewshot": settings.num_fewshot, "task_manager": self.manager}
        encoded = lm.encoded_tokens if isinstance(lm, LongMemLM) else 0
        seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        with without_warnings_of("lm_eval"):  # of every context that is cut off
            options |= {"apply_chat_template": settings.apply_chat_template, **dict.fromkeys(seeds, settings.seed)}
            results = lm_eval.simple_evaluate(lm, tasks=[task], samples={name: items}, bootstrap_iters=0, **options)
        samples = results["samples"][name]  # one for each item and filter
        tokens = (lm.encoded_tokens if isinstance(lm, LongMemLM) else 0) - encoded
        costs = {"seconds": (time.perf_counter() - start) / len(items), "encoded_tokens": tokens / len(samples)}
        return [{**record_of(sample, name, system, settings.group), **costs} for sample in samples]


def is_length(metric: Any) -> bool:
    """Return whether a metric is one of RULER's: the share found by items of so many tokens, -1 for any other item."""
    return isinstance(metric, str) and metric.isdecimal()


def metric_title(metric: str, kind: str) -> str:
    """Return what a metric is called, with the filter that answers went through if it has a name."""
    return metric if kind == "none" else f"{metric},{kind}"


def make_lm(system: str, model: LongMemForCausalLM, settings: HarnessSettings) -> HFLM:
    """Return a system as lm-eval knows models: the backbone as its `hf`, LongMem as `longmem`."""
    rows: dict[str, Any] = {"batch_size": settings.batch_size}
    if system in ("off", "on"):
        return LongMemLM(model, memory=system, window=settings.window, local_tokens=settings.local_tokens, **rows)
    window = context_size(system) if is_longer_window(system) else settings.window
    tokenizer = copy.deepcopy(model.tokenizer)
    with without_warnings_of("lm_eval"):  # about what an open model makes superfluous
        return HFLM(model.backbone, tokenizer=tokenizer, max_length=window, softmax_dtype="float32", **rows)


def record_of(sample: dict[str, Any], task: str, system: str, group: str) -> dict[str, Any]:
    """Return the record of an item as lm-eval logs it: answers, metrics, hashes of texts; `group` is a field of the item."""
    number = sample["doc_id"]
    own_group = sample["doc"].get(group) if isinstance(sample["doc"], dict) else None
    record: dict[str, Any] = {"id": f"{task}/{system}/{number}/{sample['filter']}", "system": system}
    record |= {"item": f"{task}/{number}", "group": str(number if own_group is None else own_group), "task": task}
    kept = ("doc_id", "filter", "target", "resps", "filtered_resps", "doc_hash", "prompt_hash")
    record |= {key: sample[key] for key in kept}
    record["metrics"] = {metric: sample[metric] for metric in sample["metrics"]}
    return json.loads(json.dumps(record, default=handle_non_serializable))


def task_manager(settings: HarnessSettings, metadata: Mapping[str, Any]) -> TaskManager:
    """Return lm-eval's index of tasks, which tells `metadata` to each. Raises ValueError if there is no folder, or no task."""
    for name in ("include_path", "data"):
        folder = getattr(settings, name)
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"`{name}` must be a folder, got {folder!r}.")
    # lm-eval's own index takes seconds to read: only where it is needed.
    options: dict[str, Any] = {"include_path": settings.include_path or OWN_TASKS, "metadata": dict(metadata)}
    manager = TaskManager(include_defaults=False, **options)
    if not set(settings.tasks).issubset(manager.all_tasks):
        manager = TaskManager(**options)
    if unknown := [name for name in settings.tasks if name not in manager.all_tasks]:
        offer = did_you_mean(unknown[0], manager.all_tasks)
        raise ValueError(f"`tasks` must be tasks of lm-eval or of `include_path`, got {unknown[0]!r}.{offer}")
    return manager


def load_tasks(manager: TaskManager, settings: HarnessSettings) -> dict[str, Any]:
    """Return the tasks of a run by name, with their data; groups and tags are taken apart."""
    found: dict[str, Any] = {}
    for name in settings.tasks:
        wanted: Any = name
        path = None if settings.data is None else Path(settings.data, f"{name}.jsonl").resolve()
        if path is not None and path.is_file():
            data: dict[str, Any] = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}}
            data |= {"test_split": "test"} | dict.fromkeys(
                ("custom_dataset", "dataset_name", "training_split", "validation_split")
            )
            # lm-eval lets only the members of a group differ from what the task's file says.
            wanted = {"group": f"{name} with data", "task": [{"task": name, **data}]}
        set_seed(settings.seed)  # what a task draws does not depend on those before it
        with without_warnings_of("lm_eval"):
            found |= manager.load([wanted])["tasks"]
    return found
