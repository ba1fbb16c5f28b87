"""Tasks of lm-evaluation-harness as one evaluation: lm-eval asks, every item becomes a record."""

import copy
import dataclasses
import json
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

from longmem.console import without_warnings_of
from longmem.errors import did_you_mean
from longmem.evaluation.folder import RunFolder, digest, spread
from longmem.evaluation.harness.model import LongMemLM, validate_tokenizer
from longmem.evaluation.registry import CONFIGS
from longmem.evaluation.settings import Count, EvaluationSettings, Number
from longmem.evaluation.task import Axis, Case, Measure, Record, Task
from longmem.model.modeling import LongMemForCausalLM

SYSTEMS = ("backbone", "off", "on")
OWN_TASKS = CONFIGS / "harness_tasks"
ACCURACIES = ("acc_norm", "acc", "exact_match")  # what is drawn, the first that a task has


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarnessSettings(EvaluationSettings):
    """Tasks of lm-evaluation-harness, the backbone as its model `hf`, LongMem as `longmem`; `limit` is of each task."""

    systems: tuple[str, ...] = SYSTEMS
    """What is compared, among backbone, off and on: the harness asks nothing that another text's memory, passages or a
    longer window could be fed with."""

    tasks: tuple[str, ...]
    """Names of tasks, groups or tags, of lm-eval (which fetches their data) or of `include_path`."""

    include_path: str | None = None
    """Folder with more tasks as YAML files, which take the place of lm-eval's of the same name; None: the two that come
    along, quality and babi."""

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
        super().__post_init__()
        others = [name for name in self.systems if name not in SYSTEMS]
        if others:
            raise ValueError(f"`systems` must be among {', '.join(SYSTEMS)}, got {others[0]!r}.")


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
        self.manager, self.tasks = load_tasks(settings)

    @property
    def run_title(self) -> str:
        return f"{self.settings.model_title} in {self.title}: {', '.join(self.settings.tasks)}"

    @property
    def measures(self) -> Mapping[str, Measure]:
        """Return the metrics of every task, `metric,filter` where it has filters of its own, accuracies first."""
        found = {}
        for name, task in self.tasks.items():
            metrics = sorted(task.aggregation().items(), key=lambda own: (*ACCURACIES, own[0]).index(own[0]))
            for metric, aggregate in metrics:
                for kind in [each["name"] for each in task.config.filter_list or ()] or ["none"]:
                    title = metric_title(metric, kind)
                    unit = "%" if metric in ACCURACIES and aggregate is mean else "lm-eval's unit"
                    own = None if aggregate is mean else aggregate
                    found[f"{name}: {title}"] = Measure(title, unit, aggregate=own)
        return found

    def score(self, record: Record) -> Mapping[str, Any]:
        task, kind = record["task"], record["filter"]
        return {f"{task}: {metric_title(metric, kind)}": value for metric, value in record["metrics"].items()}

    def cases(self, model: LongMemForCausalLM) -> list[Case]:
        """Return none: lm-eval asks. Raises ValueError if the tokenizer has no eos token, which it needs."""
        validate_tokenizer(model)
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
        encoded = lm.encoded_tokens if isinstance(lm, LongMemLM) else 0
        seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        with without_warnings_of("lm_eval"):  # of every context that is cut off
            results = lm_eval.simple_evaluate(
                lm,
                tasks=[task],
                task_manager=self.manager,
                samples={name: items},
                num_fewshot=settings.num_fewshot,
                apply_chat_template=settings.apply_chat_template,
                bootstrap_iters=0,
                **dict.fromkeys(seeds, settings.seed),
            )
        samples = results["samples"][name]  # one for each item and filter
        tokens = (lm.encoded_tokens if isinstance(lm, LongMemLM) else 0) - encoded
        costs = {"seconds": (time.perf_counter() - start) / len(items), "encoded_tokens": tokens / len(samples)}
        return [{**record_of(sample, name, system, settings.group), **costs} for sample in samples]


def metric_title(metric: str, kind: str) -> str:
    """Return what a metric is called, with the filter that answers went through if it has a name."""
    return metric if kind == "none" else f"{metric},{kind}"


def make_lm(system: str, model: LongMemForCausalLM, settings: HarnessSettings) -> HFLM:
    """Return a system as lm-eval knows models: the backbone as its `hf`, LongMem as `longmem`."""
    window, rows = settings.window, settings.batch_size
    if system != "backbone":
        return LongMemLM(model, memory=system, window=window, local_tokens=settings.local_tokens, batch_size=rows)
    options = {"tokenizer": copy.deepcopy(model.tokenizer), "max_length": window, "softmax_dtype": "float32"}
    with without_warnings_of("lm_eval"):  # about what an open model makes superfluous
        return HFLM(model.backbone, **options, batch_size=rows)


def record_of(sample: dict[str, Any], task: str, system: str, group: str) -> dict[str, Any]:
    """Return the record of an item as lm-eval logs it: answers, metrics, hashes of texts; `group` is a field of the item."""
    own_group = sample["doc"].get(group) if isinstance(sample["doc"], dict) else None
    kept = ("doc_id", "filter", "target", "resps", "filtered_resps", "doc_hash", "prompt_hash")
    record = {
        "id": f"{task}/{system}/{sample['doc_id']}/{sample['filter']}",
        "system": system,
        "item": f"{task}/{sample['doc_id']}",
        "group": str(sample["doc_id"] if own_group is None else own_group),
        "task": task,
        **{key: sample[key] for key in kept},
        "metrics": {metric: sample[metric] for metric in sample["metrics"]},
    }
    return json.loads(json.dumps(record, default=handle_non_serializable))


def load_tasks(settings: HarnessSettings) -> tuple[TaskManager, dict[str, Any]]:
    """Return lm-eval's index of tasks and those of a run by name, groups and tags taken apart; ValueError if one is missing."""
    for name in ("include_path", "data"):
        folder = getattr(settings, name)
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"`{name}` must be a folder, got {folder!r}.")
    # lm-eval's own index takes seconds to read: only where it is needed.
    folder = settings.include_path or OWN_TASKS
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not all(name in manager.all_tasks for name in settings.tasks):
        manager = TaskManager(include_path=folder)
    for name in settings.tasks:
        if name not in manager.all_tasks:
            close = did_you_mean(name, manager.all_tasks)
            raise ValueError(f"`tasks` must be tasks of lm-eval or of `include_path`, got {name!r}.{close}")
    wanted: list[Any] = []
    for name in settings.tasks:
        path = None if settings.data is None else Path(settings.data, f"{name}.jsonl").resolve()
        if path is None or not path.is_file():
            wanted.append(name)
            continue
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}}
        # lm-eval lets only the members of a group differ from what the task's file says.
        wanted.append({"group": f"{name} with data", "task": [{"task": name, **data}]})
    with without_warnings_of("lm_eval"):
        return manager, manager.load(wanted)["tasks"]
