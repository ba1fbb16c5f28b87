"""`longmem eval`: what is listed, what a run leaves, and evaluations and systems that are registered."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from tiny_models import save_tiny_backbone

from longmem.evaluation import TASKS
from longmem.plugins import register

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_backbone(tmp_path_factory.mktemp("backbone")))


@pytest.fixture
def letters(new_names):
    """Register an evaluation and a system, as another package would."""
    from longmem.evaluation.settings import EvaluationSettings
    from longmem.evaluation.systems import BackboneSystem
    from longmem.evaluation.task import Case, Item, Measure, Task, best

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Settings(EvaluationSettings):
        questions: int = 2
        systems: tuple[str, ...] = ("backbone", "forgetful")

    @register("system", "forgetful")
    class Forgetful(BackboneSystem):
        """The backbone, to which nothing is told."""

    @register("task", "letters")
    class Letters(Task):
        """which letter comes next

        In a text that has nothing to say about it.
        """

        name, title, kind = "letters", "letters", Settings
        measures = {"accuracy": Measure("accuracy", has_chance=True)}

        def cases(self, model):
            items = [
                Item(name=str(n), token_ids=[97 + n], candidates=[[98], [99]], about={"right": 0})
                for n in range(self.settings.questions)
            ]
            return [Case(name="one", group="one", memory=[[100] * 40], items=items)]

        def score(self, record):
            return {"accuracy": float(best(record["logprobs"]) == record["right"])}


def test_the_list_names_every_evaluation(run, letters):
    code, out, error = run("eval", "--list")
    assert (code, error) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == [*TASKS, "letters"]
    assert lines[-1].endswith("which letter comes next")
    code, out, _ = run("eval", "--list", "--json")
    assert list(json.loads(out)["tasks"]) == [*TASKS, "letters"]


def test_an_evaluation_leaves_a_folder_and_goes_on(run, model, letters, tmp_path):
    settings = (f"model={model}", f"output={tmp_path / 'results'}", "window=16", "config={segment_length: 16}")
    code, out, error = run("eval", "letters", *settings, "--json")
    assert code == 0, error
    result = json.loads(out)
    assert (result["task"], result["output"]) == ("letters", str(tmp_path / "results"))
    assert list(result["metrics"]["measures"]) == ["accuracy"]
    for name in ("config.json", "metrics.json", "table.md", "accuracy.png", "predictions.jsonl"):
        assert (tmp_path / "results" / name).stat().st_size > 0
    records = (tmp_path / "results" / "predictions.jsonl").read_text()
    assert len(records.splitlines()) == 4
    code, out, _ = run("eval", "letters", *settings)
    assert code == 0
    assert "forgetful" in out
    assert f"In {tmp_path / 'results'}: " in out
    assert (tmp_path / "results" / "predictions.jsonl").read_text() == records


def test_settings_may_stand_in_a_file_of_ones_own(run, model, letters, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(f"{{model: {model}, window: 16, questions: 3, config: {{segment_length: 16}}}}")
    code, out, error = run("eval", "letters", f"output={tmp_path / 'mine'}", "--config", config, "--json")
    assert code == 0, error
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["settings"]["questions"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "`longmem eval --list` shows all"),
        (["qualty"], "Did you mean `quality`?"),
        (["quality"], "`data` must be given"),
        (["recall", "window=one"], "`window` must be an integer"),
        (["recall", "windows=1024"], "Did you mean `window`?"),
        (["recall", "systems=[backbone, bm52]"], "got 'bm52'. Did you mean `bm25`?"),
        (["recall", "--config", "none.yaml"], "got 'none.yaml', which is no file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = run("eval", *arguments)
    assert code == 2
    assert error.startswith("longmem: ")
    assert message in error
    assert not list(Path().iterdir())
