"""Examples from files and from the Hub, and which of them are asked."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
from test_chapterbreak import examples

from longmem.evaluation.tasks.chapterbreak import Example, choose, file_for, load_split


def as_works(own: list[Example]) -> dict[str, Any]:
    works: dict[str, Any] = {}
    for example in own:
        entry = {"ctx": example.context, "pos": example.suffixes[0], "negs": list(example.suffixes[1:])}
        works.setdefault(example.work, []).append(entry)
    return works


def test_plain_compressed_and_bare_files_hold_the_same(tmp_path):
    own = examples({"a": 2, "b": 1})
    both = {"pg19": as_works(own), "ao3": as_works(own[:1])}
    (tmp_path / "both.json").write_text(json.dumps(both))
    (tmp_path / "bare.json").write_text(json.dumps(both["pg19"]))
    with gzip.open(tmp_path / "one.json.gz", "wt") as file:
        json.dump({"pg19": both["pg19"]}, file)
    assert load_split(str(tmp_path / "both.json"), split="pg19") == ("pg19", own)
    assert load_split(str(tmp_path / "both.json"), split="ao3") == ("ao3", own[:1])
    assert load_split(str(tmp_path / "bare.json")) == ("", own)
    assert load_split(str(tmp_path / "one.json.gz")) == ("pg19", own)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({"x": {"a": []}, "y": {"a": []}}, {}, r"one of \['x', 'y'\].*got None"),
        ({"x": {"a": []}}, {"split": "z"}, "got 'z'"),
        ({"x": {"a": []}}, {}, "at least one example"),
        ({"a": []}, {"split": "x"}, "is a split itself"),
        ({"a": []}, {"file": "x.json"}, "`file` is of a dataset"),
        ([], {}, "got list"),
        ({"x": 1}, {}, "got int in 'x'"),
        ({"x": {"a": [{"ctx": "c", "pos": "p"}]}}, {}, "example 0 of 'a'"),
        ({"x": {"a": [{"ctx": "c", "pos": "p", "negs": []}]}}, {}, "example 0 of 'a'"),
        ({"x": {"a": [{"ctx": "c", "pos": "p", "negs": "text"}]}}, {}, "example 0 of 'a'"),
        ({"x": {"a": [{"ctx": "c", "pos": " ", "negs": ["n"]}]}}, {}, "example 0 of 'a'"),
        ({"x": {"a": ["text"]}}, {}, "example 0 of 'a'"),
    ],
)
def test_other_formats_are_refused(tmp_path, content, options, message):
    (tmp_path / "data.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_split(str(tmp_path / "data.json"), **options)


def test_what_is_no_file_is_looked_for_on_the_hub(monkeypatch, tmp_path):
    own = examples({"a": 1})
    (tmp_path / "found.json").write_text(json.dumps({"pg19": as_works(own)}))
    asked = []

    def fetch(repository: str, file: str, repo_type: str) -> str:
        asked.append((repository, file, repo_type))
        return str(tmp_path / "found.json")

    files = ["README.md", *(f"sub/chapterbreak_ctx_{size}.json" for size in (256, 8192, 2048))]
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repository, repo_type: files)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    assert load_split("someone/stories", longest=1024).examples == own
    assert load_split("someone/stories", file="x.json").examples == own
    assert asked == [("someone/stories", f, "dataset") for f in ("sub/chapterbreak_ctx_2048.json", "x.json")]
    assert file_for(files, 10_000) == "sub/chapterbreak_ctx_8192.json"
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repository, repo_type: ["a.txt"])
    with pytest.raises(ValueError, match="no JSON file with ctx_N in its name, but a.txt"):
        load_split("someone/stories")


def test_without_the_network_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for file in (None, "chapterbreak_ctx_8192.json"):
        with pytest.raises(ValueError, match="give its path as `data`"):
            load_split("someone/stories-that-are-not-there", file=file)
    with pytest.raises(ValueError, match="which is neither"):
        load_split("stories/missing.json")


def test_works_take_turns():
    own = examples({"a": 3, "b": 1, "c": 2})
    assert [e.name for e in choose(own, None)] == ["a/0", "b/0", "c/0", "a/1", "c/1", "a/2"]
    assert [e.name for e in choose(own, 3)] == ["a/0", "c/0", "a/2"]  # spread over the file first
