"""Plug-ins: one name for one thing of a kind, and what other packages bring."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from longmem import plugins
from longmem.plugins import PLUGINS, Setting, find, parse_name, register


class Numbered:
    settings = {"number": Setting(2, "how many", 1, 9)}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_names: None) -> Path:
    """Return a folder of packages that are installed, whose plug-ins nobody has looked for yet."""
    monkeypatch.syspath_prepend(tmp_path)
    plugins.import_plugins_of_packages.cache_clear()
    yield tmp_path
    plugins.import_plugins_of_packages.cache_clear()


def install(site: Path, package: str, code: str) -> None:
    """Write a package with one module, which its entry point names."""
    (site / f"{package}.py").write_text(code)
    about = site / f"{package}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[longmem.plugins]\nany-name = {package}\n")


def test_a_plugin_is_found_by_its_kind_and_name(new_names):
    assert register("index", "numbered")(Numbered) is Numbered
    assert find("index", "numbered") is Numbered
    assert parse_name("index", "numbered") == (Numbered, {})
    assert parse_name("index", "numbered:number=3") == (Numbered, {"number": 3})
    with pytest.raises(ValueError, match=r"`eviction` must be one of the known kinds, got 'numbered'"):
        find("eviction", "numbered")


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("index", "numbered", r"`name` must be new, got 'numbered', which is .*Numbered"),
        ("indexes", "mine", r"`kind` must be one of index, .*, got 'indexes'. Did you mean `index`"),
        ("index", "mine:1", "without a colon"),
        ("index", "", "without a colon"),
    ],
)
def test_what_cannot_be_registered(kind, name, message, new_names):
    register("index", "numbered")(Numbered)
    before = {kind: dict(known) for kind, known in PLUGINS.items()}
    with pytest.raises(ValueError, match=message):
        register(kind, name)(object())
    assert before == PLUGINS


@pytest.mark.parametrize("name", ["numberd", 3, None])
def test_an_unknown_name_is_refused_with_those_that_are_known(name, new_names):
    register("system", "numbered")(Numbered)
    with pytest.raises(ValueError, match=r'`system` must be .*, got .*; known: "numbered"') as caught:
        find("system", name)
    assert ("Did you mean `numbered`?" in str(caught.value)) == (name == "numberd")


def test_another_package_brings_plugins_which_are_imported_when_a_name_is_unknown(site):
    install(
        site,
        "longmem_of_others",
        "from longmem.memory.eviction import EvictionPolicy\n"
        "from longmem.plugins import register\n"
        '@register("eviction", "largest")\n'
        "class LargestFirst(EvictionPolicy):\n"
        "    def order(self, runs):\n"
        "        return sorted(runs, key=lambda run: -len(run.document.rows))\n",
    )
    from longmem.memory import MemoryBank

    MemoryBank(memory_layers=[1], chunk_size=4, eviction="lru")
    assert "longmem_of_others" not in sys.modules
    bank = MemoryBank(memory_layers=[1], chunk_size=4, eviction="largest")
    assert bank.eviction == "largest"
    assert "longmem_of_others" in sys.modules


def test_packages_are_asked_once(site, monkeypatch):
    asked = []
    monkeypatch.setattr(plugins.importlib.metadata, "entry_points", lambda group: asked.append(group) or [])
    for name in ("one", "two"):
        with pytest.raises(ValueError, match="known kinds"):
            find("task", name)
    assert asked == ["longmem.plugins"]


def test_a_package_that_is_broken_is_named_and_stops_no_other(site):
    install(site, "a_broken_package", "raise OSError('no such device')")
    install(site, "b_whole_package", "from longmem.plugins import register\nregister('task', 'whole')(object)\n")
    with pytest.warns(UserWarning, match=r"plug-ins of a_broken_package can't be imported .*no such device"):
        assert find("task", "whole") is object
