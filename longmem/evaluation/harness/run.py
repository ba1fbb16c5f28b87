"""A run: each system answers each task through lm-eval, and every item becomes a record."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import handle_non_serializable

from longmem.evaluation.harness.model import LongMemLM, validate_tokenizer
from longmem.evaluation.harness.settings import HarnessSettings
from longmem.evaluation.harness.tasks import Tasks, chosen_items
from longmem.evaluation.runs import RunFolder
from longmem.model.modeling import LongMemForCausalLM
from longmem.quiet import without_warnings_of


def run_tasks(
    model: LongMemForCausalLM,
    settings: HarnessSettings,
    manager: Any,
    tasks: Tasks,
    run: RunFolder,
    say: Callable[[str], None] = print,
) -> None:
    """Let the systems answer the tasks, and write a record for each item; what the run has whole is not asked again.

    Args:
        model: that is evaluated.
        settings: of the run.
        manager: lm-eval's index of tasks.
        tasks: by name.
        run: where records go.
        say: is told what begins.
    """
    validate_tokenizer(model)
    for system in settings.systems:
        lm = make_lm(system, model, settings)
        for name, task in tasks.items():
            items = chosen_items(task, settings.limit)
            done = {record["doc_id"] for record in run.records if (record["system"], record["task"]) == (system, name)}
            if done >= set(items):
                continue
            say(f"{name}, {system}: {len(items)} items")
            start = time.perf_counter()
            with without_warnings_of("lm_eval"):  # of every context that is cut off
                results = lm_eval.simple_evaluate(
                    lm,
                    tasks=[task],
                    task_manager=manager,
                    samples={name: items},
                    num_fewshot=settings.num_fewshot,
                    apply_chat_template=settings.apply_chat_template,
                    bootstrap_iters=0,
                    random_seed=settings.seed,
                    numpy_random_seed=settings.seed,
                    torch_random_seed=settings.seed,
                    fewshot_random_seed=settings.seed,
                )
            seconds = (time.perf_counter() - start) / len(items)
            records = [record_of(sample, name, system, seconds, settings.group) for sample in results["samples"][name]]
            run.write(record for record in records if record["id"] not in run)


def make_lm(system: str, model: LongMemForCausalLM, settings: HarnessSettings) -> HFLM:
    """Return a system as lm-eval knows models: the backbone as its `hf`, LongMem as `longmem`."""
    if system != "backbone":
        return LongMemLM(
            model,
            memory=system,
            window=settings.window,
            local_tokens=settings.local_tokens,
            batch_size=settings.batch_size,
        )
    with without_warnings_of("lm_eval"):  # about what an open model makes superfluous
        return HFLM(
            model.backbone,
            tokenizer=copy.deepcopy(model.tokenizer),
            max_length=settings.window,
            softmax_dtype="float32",
            batch_size=settings.batch_size,
        )


def record_of(sample: dict[str, Any], task: str, system: str, seconds: float, group: str) -> dict[str, Any]:
    """Return the record of an item: raw answers and what lm-eval makes of them; its texts by their hashes.

    Args:
        sample: as lm-eval logs it.
        task: its name.
        system: who answered.
        seconds: that an item took, in the mean over the task.
        group: field of the item that names its group.
    """
    name = f"{task}/{system}/{sample['doc_id']}/{sample['filter']}"
    own_group = sample["doc"].get(group) if isinstance(sample["doc"], dict) else None
    kept = ("doc_id", "filter", "target", "resps", "filtered_resps", "doc_hash", "prompt_hash")
    record = {
        "id": name,
        "task": task,
        "system": system,
        "group": str(sample["doc_id"] if own_group is None else own_group),
        **{key: sample[key] for key in kept},
        "metrics": {metric: sample[metric] for metric in sample["metrics"]},
        "seconds": seconds,
    }
    return json.loads(json.dumps(record, default=handle_non_serializable))
