"""What is packed: configurations, types, and a description whose links lead somewhere."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RELATIVE = re.compile(r"\]\((?!https?:|#)[^)]*\)")


def described(source: str | None) -> str:
    describe = runpy.run_path(str(ROOT / "setup.py"))["description"]
    return describe((ROOT / "README.md").read_text(encoding="utf-8"), source)


def test_the_description_has_no_link_that_leads_nowhere() -> None:
    assert RELATIVE.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert not RELATIVE.search(described(None))
    assert "docs/install.md" in described(None)
    assert "method.svg" not in described(None)


def test_with_a_repository_links_lead_there() -> None:
    told = described("https://example.org/longmem/")
    assert not RELATIVE.search(told)
    assert "](https://example.org/longmem/blob/main/docs/install.md)" in told
    assert "](https://example.org/longmem/raw/main/docs/pictures/method.svg)" in told


@pytest.mark.slow
def test_the_wheel_holds_what_is_needed(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".*", "*.egg-info", "build", "tests", "runs"))
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "-w", str(tmp_path), str(checkout)], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(next(name for name in names if name.endswith("METADATA"))).decode()
    needed = {path.relative_to(ROOT).as_posix() for path in (ROOT / "longmem").rglob("*.yaml")} | {"longmem/py.typed"}
    assert needed <= names
    assert not any(name.startswith("tests") for name in names)
    assert not RELATIVE.search(metadata)
    assert "Project-URL: Paper, https://arxiv.org/abs/2306.07174" in metadata
