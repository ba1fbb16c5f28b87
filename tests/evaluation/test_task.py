"""A new evaluation is one small class; the runner, the summary, tables and figure do the rest."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from longmem.evaluation import TASKS
from longmem.evaluation.perplexity import Perplexity
from longmem.evaluation.registry import default_settings, task_class
from longmem.evaluation.runner import evaluate
from longmem.evaluation.settings import EvaluationSettings, load_evaluation
from longmem.evaluation.summary import summarize
from longmem.evaluation.tables import markdown, tables_of
from longmem.evaluation.task import Axis, Case, Item, Measure, Task, best
from longmem.plots import plot_evaluation

WINDOW = 32


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(97, 123, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


class Letters(Task):
    """Which of two letters follows: two sets, of which one is asked at two sizes, each with two draws."""

    name, title, kind = "letters", "letters", EvaluationSettings
    axes = (Axis("set", "panel"), Axis("size"), Axis("draw", "repeat"))
    measures = {"accuracy": Measure("accuracy", has_chance=True), "margin": Measure("margin", "nats", baseline="off")}
    baselines = {"first": "the first letter"}
    pool = "panels"
    asked_at_once = 2

    def cases(self, model: Any) -> list[Case]:
        """Return three cases for each draw."""
        return [
            Case(
                name=f"{name}/{size}/{draw}",
                subject=name,
                group=name,
                memory=[ids(size, seed), ids(3, seed)],
                local_tokens=4,
                prefix=ids(2, 9),
                items=[
                    Item(
                        name=str(n),
                        token_ids=ids(3, n),
                        candidates=[[98], [99]],
                        about={"right": n % 2},
                        guesses={"first": {"choice": 0}},
                    )
                    for n in range(3 + seed)
                ],
                axes={"set": name, "size": size, "draw": draw},
                stage=f"{name}, {size} tokens",
            )
            for seed, (name, size) in enumerate((("a", 20), ("a", 40), ("b", 20)))
            for draw in (1, 2)
        ]

    def wrong(self, case: Case, cases: Sequence[Case]) -> Case:
        """Return the first case of the other set."""
        return next(other for other in cases if other.group != case.group)

    def score(self, record: Mapping[str, Any]) -> dict[str, float]:
        """Return whether the right letter is likelier, and by how much."""
        if "choice" in record:
            return {"accuracy": float(record["choice"] == record["right"])}
        logprobs = record["logprobs"]
        margin = logprobs[record["right"]] - logprobs[1 - record["right"]]
        return {"accuracy": float(best(logprobs) == record["right"]), "margin": margin}


class Told(Letters):
    """The same with hooks that say what they are called with."""

    pool = "items"

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.calls: list[Any] = []

    def begin(self, cases: Sequence[Case], console: Console) -> None:
        """Note the stage."""
        self.calls.append(("begin", [case.name for case in cases]))

    def prepare(self, system: Any, case: Case, wrong: Case | None) -> dict[str, Any]:
        """Note what the wrong memory is, and record how much was read."""
        super().prepare(system, case, wrong)
        self.calls.append(("prepare", case.name, system.name, None if wrong is None else wrong.name))
        return {"read_tokens": len(system.stream)}

    def prefix(self, system: Any, case: Case, item: Item) -> Sequence[int]:
        """Let every second question have another prefix."""
        return [*case.prefix, 97] if int(item.name) % 2 else case.prefix

    def score(self, record: Mapping[str, Any]) -> dict[str, float]:
        """Count what was prepared beside the answer."""
        return super().score(record) | ({} if "choice" in record else {"margin": float(record["read_tokens"])})

    def close(self) -> None:
        """Note the end."""
        self.calls.append(("close",))


def run(task: Task, model: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    finished = evaluate(task, Console(file=io.StringIO()), model)
    lines = (finished.folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], finished.metrics


def settings(tmp_path: Path, *systems: str) -> EvaluationSettings:
    return EvaluationSettings(output=str(tmp_path / "run"), systems=systems, window=WINDOW, seed=3)


@pytest.fixture(scope="module")
def results(make_model: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    task = Letters(settings(tmp_path_factory.mktemp("finished"), "backbone", "off", "on", "wrong"))
    return task.settings, *run(task, make_model())


@pytest.fixture
def finished(results: Any) -> Any:
    own, records, metrics = results
    return Letters(own), records, metrics


def test_records_say_what_was_asked_and_what_came_back(finished):
    _, records, _ = finished
    names = {"id", "case", "item", "group", "system", "set", "size", "draw", "right"}
    answer = {"logprobs", "tokens", "seconds", "preparing_seconds", "encoded_tokens"}
    assert {frozenset(record) for record in records} == {frozenset(names | answer), frozenset(names | {"choice"})}
    (one,) = (record for record in records if record["id"] == "a/40/2/3/on")
    place = {"case": "a/40/2", "item": "a/3", "group": "a", "set": "a", "size": 40, "draw": 2, "right": 1}
    assert {name: one[name] for name in place} == place
    assert len(records) == 2 * (3 + 4 + 5) * 5


def test_cells_follow_axes_and_panels_count_the_same(finished):
    task, records, metrics = finished
    cells = metrics["measures"]["accuracy"]["cells"]
    assert list(cells) == ["all", "a", "b", "a, 20", "a, 40", "b, 20"]

    def mean(system: str, **axes: Any) -> float:
        own = [each for each in records if each["system"] == system and axes.items() <= each.items()]
        return 100 * sum(task.score(each)["accuracy"] for each in own) / len(own)

    for system in ("backbone", "off", "on", "wrong", "first"):
        found = {key: cell["systems"][system]["value"] for key, cell in cells.items()}
        assert found["a, 40"] == pytest.approx(mean(system, set="a", size=40))
        assert found["a"] == pytest.approx(mean(system, set="a"))
        assert found["all"] == pytest.approx((found["a"] + found["b"]) / 2)
        draws = [mean(system, set="b", draw=draw) for draw in (1, 2)]
        assert list(cells["b"]["systems"][system]["repeats"].values()) == pytest.approx(draws)
        above = cells["all"]["systems"][system]["above_baseline"]
        assert above == pytest.approx(found["all"] - cells["all"]["systems"]["backbone"]["value"])
    assert cells["all"]["chance"] == 50
    assert cells["a, 20"]["systems"]["on"]["items"] == 3  # however many draws
    margins = metrics["measures"]["margin"]["cells"]["all"]
    assert (margins["baseline"], list(margins["systems"])) == ("off", ["backbone", "off", "on", "wrong"])
    assert "chance" not in margins
    assert metrics["summary"]["systems"]["on"]["value"] == cells["all"]["systems"]["on"]["value"]


def test_a_detail_has_means_alone_and_a_list_of_values_counts_for_each(finished):
    task, records, _ = finished
    task.axes = (Axis("set", "panel"), Axis("size", "detail"))
    cells = summarize(task, [record for record in records if record["draw"] == 1])["measures"]["accuracy"]["cells"]
    assert "interval" not in cells["a, 20"]["systems"]["on"]
    assert "deviation" not in cells["a, 20"]["systems"]["on"]
    task.axes, task.pool = (Axis("size"),), "none"
    at_both = [{**record, "size": [20, 40]} for record in records if record["set"] == "b" and record["draw"] == 1]
    cells = summarize(task, at_both)["measures"]["accuracy"]["cells"]
    assert list(cells) == ["20", "40"]
    assert cells["20"] == cells["40"]


def test_intervals_are_of_the_seed(finished):
    task, records, metrics = finished
    assert summarize(task, records)["measures"] == metrics["measures"]
    task.settings = EvaluationSettings(output="-", systems=task.settings.systems, seed=4)
    other = summarize(task, records)["measures"]["accuracy"]["cells"]["all"]["systems"]["on"]
    own = metrics["measures"]["accuracy"]["cells"]["all"]["systems"]["on"]
    assert own["value"] == other["value"]


def test_hooks_are_called_once_and_not_for_what_is_there(model, tmp_path):
    task = Told(settings(tmp_path, "on", "wrong"))
    records, metrics = run(task, model)
    cases = [case.name for case in task.cases(model)]
    stages = [cases[:2], cases[2:4], cases[4:]]
    calls = iter(task.calls)
    for stage in stages:
        assert next(calls) == ("begin", stage)
        for name in stage:
            assert next(calls) == ("prepare", name, "on", None)
            assert next(calls) == ("prepare", name, "wrong", "b/20/1" if name[0] == "a" else "a/20/1")
    assert next(calls) == ("close",)
    prepared = [record for record in records if "item" not in record]
    assert [record["id"] for record in prepared] == [f"{name}/{system}" for name in cases for system in ("on", "wrong")]
    assert {record["read_tokens"] for record in prepared} == {23, 43}
    assert metrics["measures"]["margin"]["cells"]["a, 40"]["systems"]["on"]["value"] == 43
    assert all(record["encoded_tokens"] == 0 for record in prepared)  # nothing was asked then
    lines = (tmp_path / "run" / "predictions.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    gone = next(number for number, record in enumerate(records) if record["id"] == "a/40/1/2/on")
    (tmp_path / "run" / "predictions.jsonl").write_text("".join([*lines[:gone], *lines[gone + 1 :]]), encoding="utf-8")
    task.calls.clear()
    again, _ = run(task, model)
    assert task.calls == [("begin", ["a/40/1"]), ("prepare", "a/40/1", "on", None), ("close",)]
    assert [record["id"] for record in again[:-1]] == [
        record["id"] for record in [*records[:gone], *records[gone + 1 :]]
    ]
    assert again[-1]["logprobs"] == pytest.approx(records[gone]["logprobs"], rel=1e-4)


def test_questions_with_one_prefix_are_asked_together(model, tmp_path, monkeypatch):
    batches: list[tuple[list[str], int]] = []
    from longmem.evaluation import runner

    answers_of = runner.answers_of

    def watched(task: Task, system: Any, case: Case, items: Sequence[Item], prefix: Sequence[int]) -> Any:
        batches.append(([item.name for item in items], len(prefix)))
        return answers_of(task, system, case, items, prefix)

    monkeypatch.setattr(runner, "answers_of", watched)
    run(Told(settings(tmp_path, "off")), model)
    assert batches[-3:] == [(["0", "2"], 2), (["4"], 2), (["1", "3"], 3)]


def test_another_case_is_the_wrong_memory_if_it_is_alike(model, tmp_path):
    class Plain(Letters):
        axes = (Axis("size"),)
        wrong = Task.wrong  # type: ignore[assignment]

        def cases(self, model: Any) -> list[Case]:
            cases = [(name, size) for name in "abc" for size in (20, 40 if name != "b" else 2)]
            return [
                Case(
                    name=f"{name}{size}",
                    group=name,
                    memory=[ids(size, 1)],
                    local_tokens=4,
                    items=[],
                    axes={"size": size},
                )
                for name, size in cases
            ]

    task = Plain(settings(tmp_path, "wrong"))
    cases = task.cases(model)
    found = {case.name: getattr(task.wrong(case, cases), "name", None) for case in cases if case.name != "b2"}
    assert found == {"a20": "b20", "a40": "c40", "b20": "c20", "c20": "a20", "c40": "a40"}
    with pytest.raises(ValueError, match="must leave out `wrong`"):
        task.wrong(cases[3], cases)


def test_another_configuration_or_other_questions_are_refused(model, tmp_path):
    run(Letters(settings(tmp_path, "off")), model)

    class Others(Letters):
        def cases(self, model: Any) -> list[Case]:
            return super().cases(model)[:-1]

    with pytest.raises(ValueError, match="data.cases"):
        run(Others(settings(tmp_path, "off")), model)
    with pytest.raises(ValueError, match="settings.systems"):
        run(Letters(settings(tmp_path, "on")), model)


def test_tables_have_every_system_panel_and_measure(finished):
    _, _, metrics = finished
    tables = dict(tables_of(metrics))
    assert [heading for heading in tables if heading.startswith("a: accuracy")] == [
        "a: accuracy, %, by size, chance 50.0 %",
        "a: accuracy, %, by size, above backbone, same window",
    ]
    head, *rows = tables["a: accuracy, %, by size, chance 50.0 %"]
    assert head == ["", "all (4 items)", "20 (3 items)", "40 (4 items)"]
    assert [row[0] for row in rows] == list(metrics["systems"].values())
    assert all("±" in cell and "(" in cell for row in rows for cell in row[1:])
    above = tables["a: margin, nats, by size, above LongMem, memory off"]
    assert [row[0] for row in above[1:]] == [
        title for name, title in metrics["systems"].items() if name not in ("off", "first")
    ]
    assert all(cell[0] in "+-" for row in above[1:] for cell in row[1:])
    text = markdown(metrics)
    assert all(f"## {heading}\n" in text for heading in tables)


def test_parity_is_the_share_that_memory_has_of_what_the_window_gains(finished):
    task, records, _ = finished
    right = {"backbone": (), "off": (0,), "on": (0, 1, 2), "context-64": range(5)}
    made = []
    for record in [each for each in records if each["system"] == "backbone"]:
        for system, known in right.items():
            logprobs = [0.0, 0.0]
            logprobs[record["right"] if int(record["item"][-1]) in known else 1 - record["right"]] = 1.0
            made.append({**record, "system": system, "logprobs": logprobs})
    metrics = summarize(task, made)
    parity = {(each["of"], each["measure"]): each for each in metrics["parity"]}
    for name, sets in {"all": "ab", "a": "a", "b": "b"}.items():
        shares = {
            system: sum(
                100 * sum(int(each["item"][-1]) in known for each in own) / len(own) / len(sets)
                for own in ([each for each in made if each["set"] == one and each["system"] == system] for one in sets)
            )
            for system, known in right.items()
        }
        gains = shares["on"] - shares["off"], shares["context-64"] - shares["backbone"]
        own = parity[name, "accuracy, %"]
        assert (own["memory_gain"], own["window_gain"]) == pytest.approx(gains)
        assert own["share_percent"]["value"] == pytest.approx(100 * gains[0] / gains[1])
        assert (
            own["share_percent"]["interval"][0] <= own["share_percent"]["value"] <= own["share_percent"]["interval"][1]
        )
    (rows,) = (rows for heading, rows in tables_of(metrics) if heading.startswith("Parity"))
    assert rows[1][:2] == ["all: accuracy, %", "64"]
    assert summarize(task, [each for each in made if each["system"] != "off"])["parity"] == []
    level = summarize(task, [{**each, "logprobs": [0.0, 1.0]} for each in made])
    assert {each["share_percent"] for each in level["parity"]} == {None}


def test_the_figure_has_lines_along_numbers_and_bars_otherwise(finished, tmp_path, monkeypatch):
    task, records, metrics = finished
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: drawn.append(figure))
    plot_evaluation(tmp_path / "one.png", metrics, title="Letters")
    task.axes = (Axis("set"),)
    task.pool = "items"
    first = [record for record in records if record["draw"] == 1 and record["size"] == 20]
    plot_evaluation(tmp_path / "two.png", summarize(task, first), title="Letters")
    task.axes = ()
    plot_evaluation(tmp_path / "three.png", summarize(task, first), title="Letters")
    lines, bars, alone = drawn
    assert [axes.get_title() for axes in lines.axes] == ["a", "b"]
    assert len(lines.axes[0].containers) == 4  # systems; the baseline and chance are level lines
    value = metrics["measures"]["accuracy"]["cells"]["a, 40"]["systems"]["on"]["value"]
    assert value in [container.lines[0].get_ydata()[-1] for container in lines.axes[0].containers]
    assert [axes.get_title() for axes in bars.axes] == ["all", "a", "b"]
    assert [axes.get_title() for axes in alone.axes] == ["accuracy"]  # the margin has another unit


def test_tasks_are_listed_without_torch():
    code = "import sys, longmem.evaluation as e; print(*e.TASKS); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_settings_of_its_own_kind(name):
    kind = task_class(name)
    assert kind.name == name
    assert issubclass(kind, Task | Perplexity)
    needed = ["data=some-file"] if "data" in kind.kind.__dataclass_fields__ else []
    found = load_evaluation(kind.kind, default_settings(name), needed)
    assert found.output == f"results/{name}"


def test_an_unknown_task_is_told():
    with pytest.raises(ValueError, match="Did you mean `quality`"):
        task_class("qualty")
