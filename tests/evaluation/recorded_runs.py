"""How each evaluation is started and its output brought into normal form: what changes when the evaluations are rewritten.

    python tests/evaluation/recorded_runs.py --write                     # records everything again
    python tests/evaluation/recorded_runs.py --write recall locomo       # these kinds only
    python tests/evaluation/recorded_runs.py --write --parts tables figures   # only how results look, not the numbers

An adapter gets the settings of its kind and an empty folder, which is also the current one, and returns a result in the
form of `recorded_form`, without the settings. Nothing in it computes: it starts, picks and renames.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import io
import json
import os
import runpy
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

ROOT = Path(__file__).parents[2]
STALENESS = ROOT / "experiments" / "staleness"
if __name__ == "__main__":  # what pytest does by itself
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
import yaml  # noqa: E402
from changed_encoder import changed, tiny_longmem  # noqa: E402
from harness_tasks import write_tasks  # noqa: E402
from in_context_data import save_sets  # noqa: E402
from recorded_form import Result, drawn, note, plain, read, tables_of, write  # noqa: E402
from recorded_inputs import (  # noqa: E402
    SETTINGS,
    move,
    recall_backbone,
    recall_model,
    save_locomo,
    save_longeval,
    save_model,
    save_passages,
    save_quality,
    save_texts,
)
from rich.console import Console  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tiny_models import some_text  # noqa: E402

from experiments.chapterbreak.test_building import book  # noqa: E402
from experiments.learned_recall.check import RecallSettings, check_recall  # noqa: E402
from experiments.learned_recall.task import RecallTask  # noqa: E402
from experiments.staleness.calibration import calibrate_gap  # noqa: E402
from experiments.staleness.content import superseded_content  # noqa: E402
from experiments.staleness.decoupled import measure_freshness  # noqa: E402
from longmem.evaluation import run_task  # noqa: E402
from longmem.evaluation.task import best, per_token  # noqa: E402
from longmem.plots import plot_finished  # noqa: E402

Settings = Mapping[str, Any]
SECONDS = (
    "s",
    "s per item",
    "s per token",
    "s per question",
    "s to read",
    "s of preparing",
)  # heads of columns that no run repeats


def result_of(kind: str) -> Result:
    """Return what an evaluation of this kind gives now, in normal form."""
    settings = SETTINGS[kind]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), offline_cache(folder):
        found = ADAPTERS[kind](settings)
    return plain({"settings": settings, **found})


@contextlib.contextmanager
def offline_cache(folder: str) -> Any:
    """Keep whatever is cached in a folder that goes away."""
    with (
        patch.dict(os.environ, {"LONGMEM_CACHE": f"{folder}/cache"}),
        patch("datasets.config.HF_DATASETS_CACHE", f"{folder}/datasets"),
    ):
        yield


# Starting --------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What a finished run has left: its folder, and what it has drawn."""

    folder: Path
    figures: dict[str, Result]

    @property
    def records(self) -> list[dict[str, Any]]:
        """Return the predictions, in the order of their ids: the order of asking is nobody's business."""
        lines = (self.folder / "predictions.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        return sorted(map(json.loads, lines), key=lambda record: record["id"])

    @property
    def metrics(self) -> dict[str, Any]:
        """Return what programs read."""
        return json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))

    def result(self, cases: Any, records: Any, metrics: Result, without: Sequence[str] = SECONDS) -> Result:
        """Return the result in normal form, with tables and figures as they are."""
        tables = tables_of((self.folder / "table.md").read_text(encoding="utf-8"), without)
        return {"cases": cases, "records": records, "metrics": metrics, "tables": tables, "figures": self.figures}


def start(script: str | Path, *arguments: str) -> dict[str, Result]:
    """Run a script of eval/, or one that is named by its whole path, and return what it draws."""
    path = str(ROOT / "eval" / script)
    with drawn() as figures, patch("sys.argv", [path, *arguments]), contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(path, run_name="__main__")
    return figures


def evaluate(script: str | Path, **settings: Any) -> Run:
    """Run a script that takes a YAML file of settings."""
    Path("settings.yaml").write_text(yaml.safe_dump({**settings, "output": "run"}), encoding="utf-8")
    return Run(Path("run"), start(script, "settings.yaml"))


def evaluate_task(name: str, **settings: Any) -> Run:
    """Run a task of the registry to its end, and draw its figure."""
    Path("settings.yaml").write_text(yaml.safe_dump({**settings, "output": "run"}), encoding="utf-8")
    with drawn() as figures:
        finished = run_task(name, console=Console(file=io.StringIO()), file="settings.yaml")
        plot_finished(finished)
    return Run(finished.folder, figures)


def cells_of(metrics: Mapping[str, Any], measure: str) -> dict[str, Any]:
    """Return the comparisons of a measure by the values of its axes."""
    return metrics["measures"][measure]["cells"]


def model_options(**fields: Any) -> dict[str, Any]:
    """Write a tiny model; return the settings that name it."""
    return {"model": str(save_model(Path.cwd(), **fields)), "dtype": "float32", "seed": 0, "batch_size": 4}


# Picking ---------------------------------------------------------------------------------------------------------------


def short_hash(text: str) -> str:
    """Return what stands for a text that is asked."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]


def pick(record: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return some fields of a record, those that it has."""
    return {name: record[name] for name in names if name in record}


def distinct(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows without those that were there before."""
    return [row for number, row in enumerate(rows) if row not in rows[:number]]


def note_comparison(metrics: Result, measure: str, axis: str, comparison: Mapping[str, Any]) -> None:
    """Add a comparison of systems with intervals: values, and how far they are above the baseline."""
    for system, own in comparison["systems"].items():
        note(metrics, measure, system, axis, own["value"], own.get("interval", ()))
        if "above_baseline" in own:
            above = f"{measure}, above {comparison['baseline']}"
            note(metrics, above, system, axis, own["above_baseline"], own["above_baseline_interval"])


def note_estimates(metrics: Result, system: str, axis: str, **measures: Any) -> None:
    """Add measures of a system, each a value with its interval, or a value alone."""
    for name, values in measures.items():
        measure = name.replace("_", " ")
        if isinstance(values, Mapping):
            note(metrics, measure, system, axis, values["value"], values["interval"])
        elif isinstance(values, Sequence):
            note(metrics, measure, system, axis, values[0], values[1:])
        else:
            note(metrics, measure, system, axis, values)


# Perplexity --------------------------------------------------------------------------------------------------------------


def documents(settings: Settings) -> Result:
    """Perplexity by length of document, and gains by distance: three texts, of two groups of lengths."""
    return perplexity(settings, save_texts(Path("texts"), 120, 1500, 200))


def one_document(settings: Settings) -> Result:
    """Perplexity of every token of one document, whose intervals are over windows; Python's manual is the wrong memory."""
    with patch("longmem.data.sources.python_manual", lambda: some_text(200, 9)):
        return perplexity(settings, save_texts(Path("texts"), 30))


def perplexity(settings: Settings, texts: Path) -> Result:
    """Return what an evaluation on documents gives."""
    run = evaluate_task("perplexity", **model_options(segment_length=16), data=str(texts), **settings)
    cases, records, metrics = [], [], Result()
    cut = f"{settings['window']}/{settings['stride']}"
    for record in run.records:
        own, scores = record["cuts"][cut], scores_of(run, record, cut)
        case = pick(record, "tokens", "group") | pick(own, "windows", "scored_tokens", "scored_bytes")
        case |= {name: scores[name] for name in ("distances", "starts", "num_bytes")}
        case["first and last scored"] = [scores["positions"][0], scores["positions"][-1]]
        cases.append({"case": record["id"], **case})
        for system, loss in own["loss"].items():
            losses = scores[f"{system}/losses"]
            records.append({"case": record["id"], "system": system, "loss": loss, "losses": losses})
    found = run.metrics
    for length, part in found["parts"].items():
        for system, own in part["systems"].items():
            measures = pick(own, "loss", "perplexity", "reduction_percent", "bits_per_byte")
            note_estimates(metrics, system, f"length {length}", **measures)
            for name, value in own["documents"].items():
                note(metrics, "perplexity", system, f"document {name}", value)
    for distance, group in found["distances"]["groups"].items():
        for system, gain in group["systems"].items():
            note(metrics, "nats saved", system, f"distance {distance}", gain["value"], gain["interval"])
            note(metrics, "tokens", system, f"distance {distance}", group["tokens"])
    return run.result(cases, records, metrics)


def scores_of(run: Run, record: Mapping[str, Any], cut: str) -> dict[str, Any]:
    """Return what the file of a text has of one way of cutting windows."""
    scores = load_file(run.folder / "documents" / record["file"])
    return {name.removeprefix(f"{cut}/"): each for name, each in scores.items() if name.startswith(f"{cut}/")}


def books(settings: Settings) -> Result:
    """Perplexity of one stretch of each book, in two ways of cutting windows, with a memory that grows."""
    first, *others = settings["cuts"]
    window, stride = map(int, first.split("/"))
    run = evaluate_task(
        "perplexity-books",
        **model_options(segment_length=16),
        **pick(settings, "memory_tokens", "context_windows"),
        plan="books",
        data=str(save_texts(Path("texts"), 60, 60)),
        systems=["backbone", "off", "on", "wrong", f"context-{settings['context']}"],
        window=window,
        stride=stride,
        other_cuts=others,
        windows_per_document=settings["windows"],
        grow=True,
    )
    # Figures of a book are named by its number, its name and the cut.
    run = run._replace(
        figures={name.removeprefix("00000-").removeprefix("00001-"): each for name, each in run.figures.items()}
    )
    records, metrics = [], Result()
    for record in run.records:
        for cut, own in record["cuts"].items():
            scores, scored = scores_of(run, record, cut), own["scored_tokens"] // own["windows"]
            for system in sorted(own["loss"]):
                told = {"case": record["id"], "axis": f"windows {cut}", "system": system}
                told["losses"] = scores[f"{system}/losses"].view(-1, scored)
                share = scores.get(f"{system}/memory_share")
                records.append(told | ({} if share is None else {"memory share": share}))
    for part in run.metrics["parts"].values():
        kind = "all" if part["windows"] == settings["windows"] else "context"
        axis = f"windows {part['cut']}, {kind} windows"
        for system, own in part["systems"].items():
            note_estimates(metrics, system, axis, **pick(own, "loss", "perplexity", "reduction_percent"))
            for name, value in own["documents"].items():
                note(metrics, "perplexity", system, f"{axis}, book {name}", value)
        for pair, own in part["reductions_percent"].items():
            note_estimates(metrics, pair, axis, reduction_of_pair=own)
    cases = [{"case": record["id"]} for record in run.records]
    return run.result(cases, records, metrics, without=("cost",))  # of the backbone's seconds


# Recall at a distance ----------------------------------------------------------------------------------------------------


def recall(settings: Settings) -> Result:
    """One fact far back in a text, by size of the memory and depth of the fact; values compared and written."""
    save_texts(Path("texts"), 200)
    return facts("recall", settings, haystack="texts/a.txt")


def recall_together(settings: Settings) -> Result:
    """Facts of all distances in memory at once, their values the wrong ones of each other, stored as int8."""
    save_texts(Path("texts"), 200)
    return facts("recall", {**settings, "generate": False}, haystack="texts/a.txt")


def longeval(settings: Settings) -> Result:
    """The prompts of LongEval: lines and topics."""
    own = {**settings, "tasks": [task.removeprefix("longeval-") for task in settings["tasks"]]}
    return facts("longeval", own, before="longeval-", data=str(save_longeval(Path("longeval"))))


def facts(task: str, settings: Settings, *, before: str = "", **sources: str) -> Result:
    """Return what an evaluation of recall at a distance gives; names of tasks were once longer by what stands before."""
    run = evaluate_task(task, **model_options(segment_length=128), **sources, **settings)
    places = {system: place for place, system in enumerate(settings["systems"])}
    cases, records, metrics = {}, [], Result()
    for record in sorted(run.records, key=lambda record: (record["case"], places[record["system"]])):
        kind = before + record["task"]
        name = f"{kind}/{record['case']}" if before else record["case"]
        part, depth = record.get("file", f"{record['size']:,}"), depth_of(record["depth"], settings)
        about = {"question": short_hash(record["question"]), "task": kind, "part": part, "depth": depth}
        cases[name] = {"case": name, **about, **pick(record, "size", "distance", "values", "right")}
        means = per_token(record)
        told = {"per_token": means, "choice": best(means)}
        told |= {"text": record["prediction"]} if "prediction" in record else {}
        records.append({"case": name, "system": record["system"], **told})
    for measure, title in (("accuracy", "accuracy"), ("exact", "written exactly")):
        for key, cell in cells_of(run.metrics, measure).items() if measure in run.metrics["measures"] else ():
            kind, *rest = key.split(", ")
            if len(rest) < 2 and (key, measure) != ("all", "exact"):
                axis = f"{before}{kind}, size {rest[0] if rest else 'all'}"
                note_comparison(metrics, title, "all tasks" if key == "all" else axis, cell)
            if measure == "accuracy" and len(rest) == 2:
                axis = f"{before}{kind}, size {rest[0]}, depth {depth_of(float(rest[1]), settings)}"
                for system, own in cell["systems"].items():
                    note(metrics, title, system, axis, own["value"])
            if measure == "accuracy" and not rest and key != "all":
                note(metrics, title, "a guess", before + kind, cell["chance"])
    return run.result(list(cases.values()), records, metrics)


def depth_of(depth: float, settings: Settings) -> str:
    """Return how the depth of a fact was once written."""
    return f"{depth:g} tokens" if settings.get("distances") else f"{depth:g}"


# In-context learning -----------------------------------------------------------------------------------------------------


def squad(settings: Settings) -> Result:
    """Questions about passages, in SQuAD's format, after others with their answers."""
    asked = {name: value for name, value in settings.items() if name not in ("sets", "squad")}
    data = str(save_passages(Path("squad.json")))
    return demonstrations("squad", {**asked, **settings["squad"], "data": data}, whole="squad")


def in_context(settings: Settings) -> Result:
    """Demonstrations of labelled sets in memory: the wrong memory is another set's, or has labels shuffled."""
    return demonstrations(
        "in-context", {**settings, "data": str(save_sets(Path("sets"), test=8))}, whole="mean of sets"
    )


def demonstrations(task: str, settings: Settings, whole: str) -> Result:
    """Return what an evaluation with demonstrations gives; `whole` is what results of all items were called."""
    run = evaluate_task(task, **model_options(segment_length=64), **settings)
    cases, records, metrics = [], [], Result()
    told = ("likeliest", "logprobs", "prediction", "content_free")
    counted = ("window_demonstrations", "read_demonstrations", "read_tokens")
    # By system, then item, as the ids were when the results were recorded.
    for record in sorted(run.records, key=lambda each: (each["case"], each["system"], each.get("number", -1))):
        if record["system"] in settings["systems"]:  # and no guess
            place = {"case": f"{record['set']}, {record.get('number', 'demonstrations')}", "seed": record["seed"]}
            if "item" in record:
                cases.append({"case": place["case"], **pick(record, "gold", "golds", "group")})
            records.append({**place, "system": record["system"], **pick(record, *told, *counted)})
    found = run.metrics
    for measure in found["measures"]:
        title = "F1" if measure == "f1" else measure
        for cell, comparison in cells_of(found, measure).items():
            axis = whole if cell == "all" else cell
            guess = comparison["systems"].pop("majority", None)
            if guess is not None and measure == "prefix rule" and cell != "all":
                note(metrics, title, "most frequent label", axis, guess["value"])
            note_comparison(metrics, title, axis, comparison)
            for system, own in comparison["systems"].items():
                note(metrics, f"{title}, deviation over seeds", system, axis, own["deviation"])
                for seed, value in own["repeats"].items():
                    note(metrics, title, system, f"{axis}, seed {seed}", value)
    return run.result(distinct(cases), records, metrics)


# Questions about long documents ------------------------------------------------------------------------------------------


def chapterbreak(settings: Settings) -> Result:
    """Examples made from books, and which suffix follows, with the baselines that need no model."""
    Path("books").mkdir()
    for seed, name in enumerate("abc"):
        Path(f"books/{name}.txt").write_text(book(9, seed), encoding="utf-8")
    rules = [f"{name}={value}" for name, value in settings["books"].items()]
    start(ROOT / "experiments/chapterbreak/build_chapterbreak.py", "books", *rules, "--output", "data.json")
    asked = {name: value for name, value in settings.items() if name != "books"}
    run = evaluate_task("chapterbreak", **model_options(segment_length=32), data="data.json", **asked)
    built = json.loads(Path("data.json").read_text(encoding="utf-8"))
    cases = [
        {"case": f"{work}/{number}", **{name: short_hash(json.dumps(text)) for name, text in entry.items()}}
        for split in built.values()
        for work, entries in split.items()
        for number, entry in enumerate(entries)
    ]
    records, metrics = [], Result()
    renamed = {"context": "contexts", "context_tokens": "context_tokens", "logprobs": "sums", "values": "values"}
    # By example, then system, then tokens that it used, as the ids were when the results were recorded.
    for record in sorted(
        run.records, key=lambda each: (each["item"], each["system"], each["case"].split("/")[2:][-1:])
    ):
        told = {new: record[name] for name, new in renamed.items() if name in record} | pick(record, "tokens")
        records.append({"case": record["item"], "system": record["system"], **told})
    found = run.metrics
    note(metrics, "accuracy, per_token", "a guess", "all", found["summary"]["chance"])
    for scoring in ("per_token", "sum"):
        for length, comparison in cells_of(found, scoring).items():
            note_comparison(metrics, f"accuracy, {scoring}", f"context {length}", comparison)
    for length, comparison in cells_of(found, "margin").items():
        note_comparison(metrics, "margin", f"context {length}", comparison)
    return run.result(cases, records, metrics)


def quality(settings: Settings) -> Result:
    """Multiple choice on articles, in QuALITY's format: options as text, or their letters."""
    return questions("quality", settings, save_quality(Path("quality.jsonl")))


def locomo(settings: Settings) -> Result:
    """Written answers to questions about conversations, in LoCoMo's format."""
    return questions("locomo", settings, save_locomo(Path("locomo.json")))


def questions(task: str, settings: Settings, data: Path) -> Result:
    """Return what an evaluation of question answering gives."""
    run = evaluate_task(task, **model_options(segment_length=32), data=str(data), **settings)
    cases, records, metrics = [], [], Result()
    for record in run.records:
        if record["system"] in settings["systems"]:  # and no guess
            case = {"case": record["item"], "document": record["group"], "question": short_hash(record["question"])}
            cases.append(case | pick(record, "gold", "options", "category", "trap"))
            told = pick(record, "prediction", "logprobs", "tokens")
            records.append({"case": record["item"], "system": record["system"], **told})
    found = run.metrics
    if task == "quality":
        note(metrics, "accuracy", "a guess", "all", found["summary"]["chance"])
        for rule in found["measures"]:
            note_comparison(metrics, f"accuracy, {rule}", "all", cells_of(found, rule)["all"])
    else:
        for measure in ("f1", "exact match"):
            for category, comparison in cells_of(found, measure).items():
                note_comparison(metrics, measure, f"category {category}", comparison)
        note_comparison(metrics, "likelihood", "all", cells_of(found, "likelihood")["all"])
    for system in settings["systems"]:
        note(metrics, "encoded tokens", system, "all", found["costs"]["systems"][system]["encoded_tokens"])
    return run.result(distinct(cases), records, metrics)


# lm-evaluation-harness -----------------------------------------------------------------------------------------------------


def harness(settings: Settings) -> Result:
    """Multiple choice, generation and rolling likelihoods, asked by lm-evaluation-harness."""
    tasks = write_tasks(Path.cwd() / "tasks")
    options = model_options(segment_length=16)
    with patch("lm_eval.evaluator.add_env_info", lambda results: None):  # asks the system for a second
        run = evaluate_task("harness", **options, include_path=str(tasks), **settings)
    cases, records, metrics = [], [], Result()
    for record in run.records:
        case = {"case": record["item"], "question": record["prompt_hash"][:12], **pick(record, "target", "group")}
        cases.append(case)
        answers = {"answers": record["filtered_resps"], "scores": record["metrics"]}
        records.append({"case": record["item"], "system": record["system"], **answers})
    for measure in run.metrics["measures"].values():
        for task, comparison in measure["cells"].items():
            if "interval" in next(iter(comparison["systems"].values())):
                note_comparison(metrics, measure["title"], task, comparison)
            else:
                for system, own in comparison["systems"].items():
                    note(metrics, measure["title"], system, task, own["value"])
    return run.result(distinct(cases), records, metrics)


# Staleness -----------------------------------------------------------------------------------------------------------------


def stale_texts(settings: Settings) -> Result:
    """Real text with a stale memory: what policies lose and cost after each change of the encoder."""
    texts = str(save_texts(Path("texts"), 60, 60, 5))
    fields = {"segment_length": 16, "chunk_size": 2, "memory_layers": [2, 3]}
    options = {**model_options(**fields), "data": texts, "tuning_data": texts}
    # A change of every weight in the place of training, whose steps turn the last bits of a processor into numbers.
    with patch("experiments.staleness.texts.tuned_backbone", moved_backbone):
        run = evaluate(STALENESS / "run_texts.py", **options, **settings)
    records, metrics = [], Result()
    for record in run.records:
        place = {"case": f"{record['text']}, seed {record['seed']}", "axis": f"rate {record['learning_rate']:g}"}
        records.append({**place, **pick(record, "system", "losses", "recalls", "tokens", "gap")})
    for rate, change in run.metrics["changes"].items():
        note(metrics, "gap", "never", f"rate {rate}", change["gap"])
        for system, own in change["systems"].items():
            note(metrics, "loss", system, f"rate {rate}", own["value"], own["interval"])
            measures = pick(own, "gain", "against_fresh", "recall", "tokens")
            note_estimates(metrics, system, f"rate {rate}", **measures)
    return run.result([{"case": each} for each in sorted({each["case"] for each in records})], records, metrics)


def moved_backbone(backbone: Any, *_: Any, learning_rate: float, **__: Any) -> Any:
    """Return a copy of a backbone, moved as far as a learning rate says."""
    moved = copy.deepcopy(backbone)
    move(moved, 10 * learning_rate)
    return moved


def staleness(experiment: str, settings: Settings, **others: Any) -> Run:
    """Run an experiment of the staleness script, with models that were not trained."""
    task = RecallTask(**settings["recall task"])

    def kept(name: str, given: RecallTask, _: Any, seed: int, folder: Any = None) -> Any:
        return recall_model(name, given, seed)

    with (
        one_thread(),
        patch("experiments.staleness.running.kept_model", kept),
        patch("experiments.staleness.settings.StalenessSettings.task", task),
    ):
        options = {"experiment": experiment, "seeds": settings["seeds"], "num_keys": task.num_keys}
        return evaluate(STALENESS / "run.py", **options, **others)


@contextlib.contextmanager
def one_thread() -> Any:
    """Give the threads back that a script puts down to one."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


def staleness_policies(settings: Settings) -> Result:
    """Every kind of refresh policy on the same questions, by change of the encoder and way of asking."""
    library = {**settings["documents"], **settings["questions"]}
    others = {"regimes": settings["changes"], "askings": settings["askings"], "systems": settings["systems"]}
    run = staleness("policies", settings, library=library, **others)
    eager = {axis_of(record): record["bank"] for record in run.records if record["system"] == "eager"}
    records, metrics = [], Result()
    for record in run.records:
        told = pick(record, "system", "losses", "right", "found", "tokens", "mapped", "gains", "neighbours")
        bank = {"bank tokens": record["bank_tokens"], "bank of eager": record["bank"] == eager[axis_of(record)]}
        records.append({"case": f"seed {record['seed']}", "axis": axis_of(record)[1], **told, **bank})
    names = ("loss", "accuracy", "found", "recovered", "recovered_later", "cost")
    for axis, table in run.metrics["tables"].items():
        for system, own in table["systems"].items():
            note_estimates(metrics, system, axis, **pick(own, *names))
    cases = [{"case": f"seed {seed}"} for seed in settings["seeds"]]
    return run.result(cases, records, metrics)


def axis_of(record: Mapping[str, Any]) -> tuple[int, str]:
    """Return the seed of a record, and what changed and how was asked."""
    return record["seed"], f"{record['regime']}/{record['asking']}"


def staleness_learning(settings: Settings) -> Result:
    """Learning beside a writer that stands still or moves, and what a reader's training does to old banks."""
    others = {"learning_systems": settings["systems"], "decoupled_steps": settings["decoupled_steps"]}
    learning = pick(settings, "steps", "distance", "num_documents")
    sizes = pick(settings, "distance", "num_documents")
    with patch("experiments.staleness.decoupled.measure_freshness", partial(measure_freshness, **sizes)):
        run = staleness("learning", settings, learning=learning, **others)
    told = ("answers", "curve", "losses", "drift", "aged_drift", "same_encoder", "changed_numbers", "stored_numbers")
    records, metrics = [], Result()
    for record in run.records:
        records.append({"case": f"seed {record['seed']}", "system": record["system"], **pick(record, *told)})
    found = run.metrics
    kinds = ("fresh", "aged", "first", "off", "windowed", "drift")
    for system, own in found["summary"]["systems"].items():
        note_estimates(metrics, system, "all", **pick(own, *kinds))
    for kind, values in found["decoupled"]["losses"].items():
        note_estimates(metrics, "old banks", kind, loss=values)
    return run.result([{"case": f"seed {seed}"} for seed in settings["seeds"]], records, metrics)


def staleness_content(settings: Settings) -> Result:
    """Superseded content, read by age priors, superseded, deleted or written anew."""
    sizes = pick(settings, "num_banks", "distance")
    with patch("experiments.staleness.running.superseded_content", partial(superseded_content, **sizes)):
        run = staleness("content", settings)
    records, metrics = [], Result()
    for record in run.records:
        # Of many questions the numbers of those that got the newest value, or an older one.
        numbers = {kind: [n for n, right in enumerate(record[kind]) if right] for kind in ("right", "older")}
        questions = {"questions": len(record["right"])}
        records.append({"case": f"seed {record['seed']}", "system": record["system"], **questions, **numbers})
    for system, own in run.metrics["summary"]["systems"].items():
        note_estimates(metrics, system, "all", **pick(own, "right", "older"))
    return run.result([{"case": f"seed {seed}"} for seed in settings["seeds"]], records, metrics)


# Checks that are functions ---------------------------------------------------------------------------------------------------


def recall_check(settings: Settings) -> Result:
    """The learned-recall check with a backbone that was not trained: which of its questions each system answers."""
    sizes = RecallSettings(
        practice_distance=settings["distance"], **pick(settings, "side_steps", "distance", "num_documents")
    )
    task, seed = RecallTask(**settings["recall task"]), settings["seed"]
    with one_thread(), patch("experiments.learned_recall.check.train_backbone", lambda *_: recall_backbone(task, seed)):
        found = check_recall(seed, sizes, task, residual="substitute", init="backbone")
    metrics = Result()
    for system, value in found.accuracy.items():
        note(metrics, "accuracy", system, "all", value)
    records = [{"case": "all", "system": system, "right": right} for system, right in found.answers.items()]
    return {"cases": [{"case": "all", "chance": task.chance}], "records": records, "metrics": metrics}


def calibration(settings: Settings) -> Result:
    """The gap that a recall allows, measured on the way from one encoder to another."""
    model = tiny_longmem(Path("backbone"))
    ids = torch.randint(0, 250, (4 * 32,), generator=torch.Generator().manual_seed(1))
    found = calibrate_gap(model, changed(model, 0.3), ids, **settings)
    records = [{"case": f"share {point.share:g}", **vars(point)} for point in found.points]
    metrics = {"gap": {"all": {"all": {"mean": found.gap, "is reached": found.is_reached}}}}
    return {"cases": [{"case": record["case"]} for record in records], "records": records, "metrics": metrics}


ADAPTERS: dict[str, Callable[[Settings], Result]] = {
    "documents": documents,
    "one-document": one_document,
    "books": books,
    "recall": recall,
    "recall-together": recall_together,
    "longeval": longeval,
    "in-context": in_context,
    "in-context-one-set": in_context,
    "squad": squad,
    "chapterbreak": chapterbreak,
    "quality": quality,
    "quality-letters": quality,
    "locomo": locomo,
    "harness": harness,
    "stale-texts": stale_texts,
    "staleness-policies": staleness_policies,
    "staleness-learning": staleness_learning,
    "staleness-content": staleness_content,
    "recall-check": recall_check,
    "calibration": calibration,
}


def main() -> None:
    """Record results again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="default: all")
    parser.add_argument("--write", action="store_true", required=True, help="replace what is recorded")
    parser.add_argument("--parts", nargs="+", help="replace these parts alone, such as tables and figures")
    arguments = parser.parse_intermixed_args()
    for kind in arguments.kinds or ADAPTERS:
        result = result_of(kind)
        if arguments.parts:
            result = {**read(kind), **{name: result[name] for name in arguments.parts if name in result}}
        write(kind, result)
        print(kind)


if __name__ == "__main__":
    main()
