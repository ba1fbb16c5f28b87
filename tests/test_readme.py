"""What README, guides and docstrings say of the house is true: paths, links, the tree, and the example of an evaluation."""

from __future__ import annotations

import importlib.util
import io
import json
import re
from functools import cache
from pathlib import Path

import pytest
from rich.console import Console
from tiny_models import save_tiny_backbone

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs" / "examples" / "new_evaluation.py"
CODE = ("longmem", "experiments", "train", "eval", "benchmarks", "tests", "docs/examples")
# The changelog names what is gone; the names below are not of this repository.
HISTORY = {"CHANGELOG.md"}
FOREIGN = {"docs/milvus_lite.md", "docs/limitations.md"}

A_PATH = re.compile(
    r"(?<![\w./-])(?:longmem|experiments|train|eval|benchmarks|tests|configs|docs)/[\w./-]*\.(?:py|yaml|md)\b"
)
A_MODULE = re.compile(r"(?<![\w./])longmem((?:\.(?!__)\w+)+)")
A_LINK = re.compile(r"\]\(([^)\s]+)\)")
A_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@cache
def pages() -> list[Path]:
    """Return the Markdown files that are written by hand."""
    own = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.md")]
    own += (ROOT / "experiments").rglob("*.md")
    return sorted(path for path in own if path.name not in HISTORY)


@cache
def code() -> list[Path]:
    """Return the Python files and the settings."""
    found = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    return sorted([*found, *(ROOT / "configs").rglob("*.yaml"), *(ROOT / "longmem").rglob("*.yaml")])


def lines_of(path: Path) -> list[tuple[str, str]]:
    """Return the lines of a file with their place."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(f"{path.relative_to(ROOT)}:{number}", line) for number, line in enumerate(lines, start=1)]


def missing_paths(path: Path) -> list[str]:
    """Return the paths that a file names and that are not there."""
    named = [(place, found) for place, line in lines_of(path) for found in A_PATH.findall(line)]
    return [f"{place}: {found}" for place, found in named if found not in FOREIGN and not (ROOT / found).exists()]


def missing_modules(path: Path) -> list[str]:
    """Return the modules and names `longmem.a.b` that a file names and that are not there."""
    named = [(place, found) for place, line in lines_of(path) for found in A_MODULE.findall(line)]
    return [f"{place}: longmem{found}" for place, found in named if not module_exists(found.split(".")[1:])]


def module_exists(parts: list[str]) -> bool:
    """Return whether the parts lead to a module, or to a word that the package where they end contains."""
    place = ROOT / "longmem"
    for part in parts:
        if (place / part).is_dir():
            place = place / part
        elif (place / f"{part}.py").is_file():
            return True
        else:
            return re.search(rf"\b{part}\b", (place / "__init__.py").read_text(encoding="utf-8")) is not None
    return True


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = A_HEADING.findall(path.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def tree() -> list[str]:
    """Return the folders of the README's map, as paths from the root."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Map of the code")[2]
    block = text.partition("```")[2].partition("```")[0]
    folders: list[str] = []
    above: list[str] = []
    for line in block.splitlines():
        found = re.match(r"( *)([\w/]+)/ ", line)
        if found:
            above = above[: len(found[1]) // 2]
            folders.append("/".join([*above, found[2]]))
            above.append(found[2])
    return folders


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_resolves(path: Path) -> None:
    broken = []
    for link in A_LINK.findall(path.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        page = (path.parent / target).resolve() if target else path
        if not page.exists() or (anchor and anchor not in anchors(page)):
            broken.append(link)
    assert broken == []


def test_every_path_that_is_named_exists() -> None:
    assert [line for path in (*pages(), *code()) for line in missing_paths(path)] == []


def test_every_module_that_is_named_exists() -> None:
    assert [line for path in (*pages(), *code()) for line in missing_modules(path)] == []


def test_no_page_uses_an_old_name_of_a_bank() -> None:
    from longmem.memory.bank import MOVED, RENAMED

    old = re.compile(rf"\b(?:bank|MemoryBank)\.({'|'.join({**MOVED, **RENAMED})})\b")
    used = [f"{place}: {line}" for path in (*pages(), *code()) for place, line in lines_of(path) if old.search(line)]
    assert [line for line in used if not line.startswith("tests/")] == []  # which also test the old names


def test_every_evaluation_and_run_that_a_page_names_can_be_started() -> None:
    from longmem.evaluation import TASKS

    configs = (ROOT / "longmem" / "training" / "configs").glob("*.yaml")
    known = {"eval": {*TASKS, "TASK", "NAME"}, "train": {*(path.stem for path in configs), "CONFIG"}}
    named = [
        (place, *found)
        for path in pages()
        for place, line in lines_of(path)
        for found in re.findall(r"longmem (eval|train) ([\w-]+)", line)
        if not found[1].startswith("-")
    ]
    assert {"eval", "train"} == {command for _, command, _ in named}
    assert [each for each in named if each[2] not in known[each[1]]] == []


def test_a_wrong_path_or_module_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = "longmem/memory/" + "nothing.py", "longmem.memory." + "nothing"
    page = tmp_path / "page.md"
    page.write_text(
        f"`longmem/memory/bank.py` and `{gone[0]}`;\n`longmem.memory.bank` and `{gone[1]}`\n", encoding="utf-8"
    )
    (tmp_path / "longmem" / "memory").mkdir(parents=True)
    for name in ("bank.py", "__init__.py"):
        (tmp_path / "longmem" / "memory" / name).touch()
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert missing_paths(page) == [f"page.md:1: {gone[0]}"]
    assert missing_modules(page) == [f"page.md:2: {gone[1]}"]


def test_the_tree_names_every_package_and_nothing_else() -> None:
    folders = tree()
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []
    assert len(set(folders)) == len(folders)
    packages = {f"longmem/{path.parent.name}" for path in (ROOT / "longmem").glob("*/__init__.py")}
    assert packages == {folder for folder in folders if re.fullmatch(r"longmem/\w+", folder)}
    top = {"longmem", "experiments", "train", "eval", "configs", "benchmarks", "tests", "docs"}
    assert {folder for folder in folders if "/" not in folder} == top


def test_the_readme_is_short_and_begins_with_code() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 210
    assert "from_backbone" in "\n".join(lines[:30])


def test_every_page_is_listed() -> None:
    listed = A_LINK.findall((ROOT / "docs" / "README.md").read_text(encoding="utf-8"))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} <= set(listed)


def test_the_example_of_an_evaluation_is_short_and_shown() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert f"```python\n{text}```" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_example_of_an_evaluation_runs(tmp_path: Path) -> None:
    from longmem.evaluation.runner import evaluate

    spec = importlib.util.spec_from_file_location("new_evaluation", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    settings = example.BoxSettings(
        output=str(tmp_path / "run"),
        model=str(save_tiny_backbone(tmp_path / "backbone")),
        config={"num_retrieved_tokens": 8},
        systems=("backbone", "on", "wrong"),
        window=64,
        distances=(2, 4),
    )
    metrics = evaluate(example.Boxes(settings), Console(file=io.StringIO())).metrics
    cells = metrics["measures"]["accuracy"]["cells"]
    assert list(cells) == ["all", "2", "4"]
    assert cells["all"]["systems"]["on"]["items"] == 16
    lines = (tmp_path / "run" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    records = {record["id"]: record for record in map(json.loads, lines)}
    assert len(records) == 3 * 16
    one = {name: records[f"0/4/{name}"]["logprobs"] for name in ("backbone", "on", "wrong")}
    assert len(one["on"]) == 5
    assert one["on"] != one["backbone"]  # the memory is read
    assert one["on"] != one["wrong"]
