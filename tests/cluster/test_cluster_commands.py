"""Commands given `--bank ray://NAME` do and say what they do and say of a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cluster_models import OPTIONS
from local_shards import LocalShards
from tiny_models import save_tiny_backbone, some_text

import longmem.cluster
import longmem.model.opening
from longmem import LongMemForCausalLM, MemoryBank
from longmem.cli.common import open_bank, remember_model
from longmem.cluster import ClusterBank
from longmem.cluster.workers import EncodingWorker

CLUSTER = "ray://notes"
TEXTS = {f"{name}.txt": some_text(14 + place, seed=place) for place, name in enumerate("abcdef")}
# One after another, each in both banks. {new}: a text that was not there. {later}: a.txt as it is later, {longer}: with an end.
COMMANDS = (
    "memorize corpus --tag novel --pin",
    "memorize corpus",
    "memorize later/a.txt --replace",
    "bank update longer/a.txt",
    "bank update corpus/a.txt --tag draft",
    "bank append later/a.txt --id b.txt",
    "bank tag b.txt --tag seen",
    "bank unpin c.txt",
    "bank pin c.txt",
    "bank supersede d.txt",
    "bank restore d.txt",
    "bank supersede d.txt",
    "bank delete e.txt",
    "bank add exported.jsonl",
    "bank compact",
    "bank find dog --by words --count 1",
    "bank find dog --by heads --count 2",
    "bank find dog --tag seen --by words --count 1",
    "generate --prompt dog --max-new-tokens 3 --show-reads",
    "generate --prompt dog --max-new-tokens 3 --tag seen",
)
REFUSED = {
    "bank delete nothing.txt": "nothing.txt",
    "bank update later/a.txt --id nothing.txt": "nothing.txt",
    "bank append later/a.txt --id nothing.txt": "nothing.txt",
    "bank tag nothing.txt": "nothing.txt",
    "memorize later/a.txt": "already holds a document 'a.txt'",
    "generate --prompt dog --id nothing.txt": "nothing.txt",
    "generate --prompt dog --tag nothing": "nothing",
}


class LocalEncoders:
    """An encoding worker in this process, in the place of `Encoders`."""

    def __init__(self, make: Callable[[], Any], count: int | None = None) -> None:
        self.work = SimpleNamespace(remote=EncodingWorker(make).work)

    def __enter__(self) -> LocalEncoders:
        return self

    def __exit__(self, *error: object) -> None: ...

    def run(self, tasks: list[Any], ask: Callable[[Any, Any], Any]) -> Iterator[tuple[Any, Any]]:
        for task in tasks:
            yield task, ask(self, task)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LongMemForCausalLM:
    backbone = save_tiny_backbone(tmp_path_factory.mktemp("backbone"))
    return LongMemForCausalLM.from_backbone(str(backbone), **OPTIONS, chunk_size=4).eval()


@pytest.fixture
def places(model: LongMemForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """Return an empty bank in a folder, and one of three shards; and make the files of the commands."""
    monkeypatch.chdir(tmp_path)
    for folder, texts in {
        "corpus": TEXTS,
        "later": {"a.txt": "an old dog fell. " + TEXTS["a.txt"]},
        "longer": {"a.txt": "an old dog fell. " + TEXTS["a.txt"] + " and rain"},
    }.items():
        Path(folder).mkdir()
        for name, text in texts.items():
            Path(folder, name).write_text(text)
    MemoryBank.for_model(model, folder="one").close()
    folders = [*ClusterBank.create("shards", 3, model), "one"]
    for each in folders:
        remember_model(Path(each), model.backbone.name_or_path)
    shards = LocalShards([Path(each) for each in folders[:-1]])
    # A document that superseded another one, which the hash of its name puts into another shard.
    names = [f"new-{number}.txt" for number in range(9)]
    of = ClusterBank(shards).shard_of
    other = next(name for name in names if of(name) != of(names[0]))
    with MemoryBank.for_model(model, folder="origin") as origin:
        for name in (names[0], other):
            model.memorize(origin, some_text(9, seed=len(name)), name, tags=["new"])
        origin.supersede(names[0], by=other)
    from longmem.cli.main import main

    assert main(["bank", "export", "exported.jsonl", "--bank", "origin", "--quiet"]) == 0
    monkeypatch.setattr(ClusterBank, "connect", classmethod(lambda cls, name, **options: cls(shards)))
    monkeypatch.setattr(longmem.cluster, "Encoders", LocalEncoders)
    monkeypatch.setattr(longmem.model.opening, "open_model", lambda name: model)
    yield "one", CLUSTER
    shards.close()


def held(place: str) -> dict[str, tuple[Any, ...]]:
    """Return what a bank holds, by the names of documents."""
    with open_bank(place if place == CLUSTER else Path(place)) as bank:
        return {
            each.document_id: (bank.text(each.document_id), each.tags, each.is_pinned, each.is_superseded)
            for each in bank.documents()
        }


def told(run: Any, command: str, place: str) -> dict[str, Any]:
    """Return what a command prints for a program, but for times, names of places, and what a cluster does not say."""
    code, out, error = run(*command.split(), "--bank", place, "--json")
    assert code == 0, (command, place, error)
    left_out = ("bank", "seconds", "tokens_per_second", "bytes_before", "bytes_after", "copied_tokens")
    return {name: value for name, value in json.loads(out).items() if name not in left_out}


@pytest.mark.slow
def test_every_command_does_on_a_cluster_what_it_does_on_a_folder(places, run):
    for command in COMMANDS:
        if command == "memorize corpus":  # again: nothing is left to do on a cluster, and a folder says so
            assert told(run, command, CLUSTER)["written_tokens"] == dict.fromkeys(TEXTS, 0)
            continue
        one, other = (told(run, command, place) for place in places)
        assert other == approximately(one), command
        assert held(CLUSTER) == held("one"), command
    exported = []
    for place in places:
        told(run, "bank export out.jsonl", place)
        lines = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
        exported.append({line["document_id"]: line["text"] for line in lines})
        assert {each["document_id"] for each in told(run, "bank list", place)["documents"]} == {*exported[-1]}
        assert told(run, "bank info", place)["documents"] == len(exported[-1])
    assert exported[0] == exported[1]


@pytest.mark.slow
def test_what_a_folder_refuses_a_cluster_refuses(places, run):
    for place in places:
        told(run, "memorize corpus", place)
    before = held(CLUSTER)
    for command, said in REFUSED.items():
        for place in places:
            code, _, error = run(*command.split(), "--bank", place)
            assert code == 2, (command, place, error)
            assert said in error, (command, place, error)
    assert held(CLUSTER) == before


def approximately(content: Any) -> Any:
    """Return content that equals another one whose numbers differ by what sums in another order differ."""
    if isinstance(content, dict):
        return {name: approximately(each) for name, each in content.items()}
    if isinstance(content, list):
        return [approximately(each) for each in content]
    return pytest.approx(content, rel=1e-4) if isinstance(content, float) else content
