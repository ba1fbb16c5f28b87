"""Corpora: what each kind of source holds, and that it is read once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pytest
from byte_tokenizers import byte_tokenizer

from longmem.data import corpus as corpus_module
from longmem.data import load_corpus
from longmem.data.sample_texts import python_manual
from longmem.data.sources import files_of_split, load_rows


def write_files(folder: Path, texts: Mapping[str, str]) -> Path:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def json_lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def texts_of(corpus: datasets.Dataset, tokenizer: Any) -> dict[str, str]:
    return {row["document_id"]: tokenizer.decode(row["input_ids"]) for row in corpus}


BOOKS = {"b.txt": "second", "a.txt": "first text", "sub/c.txt": "third, é"}
NAMED = {"a": "first text", "b": "second", "sub/c": "third, é"}


def test_folder_of_texts(tmp_path, tokenizer):
    corpus = load_corpus(write_files(tmp_path, BOOKS), tokenizer)
    assert texts_of(corpus, tokenizer) == NAMED
    assert corpus["document_id"][:] == list(NAMED), "files are sorted"
    assert corpus.features == corpus_module.FEATURES


def test_one_text(tmp_path, tokenizer):
    path = str(write_files(tmp_path, BOOKS) / "a.txt")
    assert texts_of(load_corpus(path, tokenizer), tokenizer) == {"a": "first text"}


def test_listed_files(tmp_path, tokenizer):
    entries = [
        {"file": name, "split": split} for name, split in (("b.txt", "test"), ("sub/c.txt", "train"), ("a.txt", "test"))
    ]
    manifest = write_files(tmp_path, {**BOOKS, "list.json": json.dumps(entries)}) / "list.json"
    corpus = load_corpus(manifest, tokenizer, split="test")
    assert list(texts_of(corpus, tokenizer)) == ["b", "a"], "in the order of the list"
    assert texts_of(load_corpus(str(manifest), tokenizer), tokenizer) == {"sub/c": "third, é"}
    assert files_of_split(manifest, "test") == [tmp_path / "b.txt", tmp_path / "a.txt"]
    lines = {"x.jsonl": json_lines({"body": "one"}), "list.json": json.dumps([{"file": "x.jsonl", "split": "train"}])}
    corpus = load_corpus(write_files(tmp_path, lines) / "list.json", tokenizer, text_column="body")
    assert texts_of(corpus, tokenizer) == {"1": "one"}


def test_lines_have_their_id_or_their_number(tmp_path, tokenizer):
    rows = [{"id": 7, "text": "one"}, {"text": "two", "more": [1]}]
    write_files(tmp_path, {"x.jsonl": json_lines(rows[0]) + "\n" + json_lines(rows[1])})
    assert texts_of(load_corpus(tmp_path / "x.jsonl", tokenizer), tokenizer) == {"7": "one", "3": "two"}


def test_folder_of_lines(tmp_path, tokenizer):
    lines = {
        "x.jsonl": json_lines({"body": "one"}),
        "y.jsonl": json_lines({"body": "two"}, {"id": "i", "body": "three"}),
    }
    corpus = load_corpus(write_files(tmp_path, lines), tokenizer, text_column="body")
    assert texts_of(corpus, tokenizer) == {"x:1": "one", "y:1": "two", "i": "three"}


def test_ids_become_unique(tmp_path, tokenizer):
    rows = [{"id": name, "text": "text"} for name in ("a", "a#2", "a", "a", "b")]
    write_files(tmp_path, {"x.jsonl": json_lines(*rows)})
    corpus = load_corpus(tmp_path / "x.jsonl", tokenizer)
    assert corpus["document_id"][:] == ["a", "a#2", "a#3", "a#4", "b"]


@pytest.mark.parametrize("with_splits", [False, True])
def test_saved_dataset(tmp_path, tokenizer, with_splits):
    dataset = datasets.Dataset.from_dict({"id": ["x", "y"], "text": ["one", "two"]})
    other = datasets.Dataset.from_dict({"id": ["z"], "text": ["three"]})
    saved = datasets.DatasetDict(train=other, test=dataset) if with_splits else dataset
    saved.save_to_disk(tmp_path / "saved")
    corpus = load_corpus(tmp_path / "saved", tokenizer, split="test" if with_splits else "train")
    assert texts_of(corpus, tokenizer) == {"x": "one", "y": "two"}


def test_folder_that_datasets_reads(tmp_path, tokenizer):
    datasets.Dataset.from_dict({"text": ["one", "two", "three"]}).to_parquet(tmp_path / "train.parquet")
    assert texts_of(load_corpus(tmp_path, tokenizer), tokenizer) == {"1": "one", "2": "two", "3": "three"}
    assert len(load_corpus(tmp_path, tokenizer, num_documents=2)) == 2


def test_folder_with_a_configuration(tmp_path, tokenizer):
    datasets.Dataset.from_dict({"text": ["une"]}).to_parquet(tmp_path / "fr.parquet")
    datasets.Dataset.from_dict({"text": ["one"]}).to_parquet(tmp_path / "en.parquet")
    head = (
        "---\nconfigs:\n- config_name: en\n  data_files: en.parquet\n- config_name: fr\n  data_files: fr.parquet\n---\n"
    )
    (tmp_path / "README.md").write_text(head)
    for name, text in (("en", "one"), ("fr", "une")):
        assert texts_of(load_corpus(f"{tmp_path}:{name}", tokenizer), tokenizer) == {"1": text}


def test_hub_dataset_is_streamed_as_far_as_needed(tmp_path, tokenizer, monkeypatch):
    """A local folder stands in for the Hub: what is asked of `datasets.load_dataset`, and how many rows are taken."""
    write_files(tmp_path, {"test.jsonl": json_lines(*({"text": f"document {number}"} for number in range(500)))})
    load_dataset = datasets.load_dataset
    asked, taken = [], []

    def load_local(name: str, configuration: str, **options: Any) -> datasets.IterableDataset:
        asked.append((name, configuration, options))
        return load_dataset(str(tmp_path), **options).map(lambda row: taken.append(row) or row)

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    settings = {"split": "test", "num_documents": 3}
    corpus = load_corpus("owner/books:english", tokenizer, **settings)
    assert asked == [("owner/books", "english", {"split": "test", "streaming": True})]
    assert texts_of(corpus, tokenizer) == {str(number + 1): f"document {number}" for number in range(3)}
    assert len(taken) == 3

    monkeypatch.undo()  # as later without a network
    monkeypatch.setenv("LONGMEM_CACHE", str(Path(corpus.cache_files[0]["filename"]).parents[2]))
    assert load_corpus("owner/books:english", tokenizer, **settings)[:] == corpus[:]
    with pytest.raises(ValueError, match="cannot be opened"):
        load_corpus("owner/books:french", tokenizer, **settings)


def test_python_manual(tokenizer):
    corpus = load_corpus("python-manual", tokenizer, max_tokens=5_000)
    assert corpus["document_id"][:] == ["python-manual"]
    assert corpus[0]["input_ids"] == tokenizer([python_manual()[:5_000]])["input_ids"][0][:5_000]


def test_bounds(tmp_path, tokenizer):
    write_files(tmp_path, BOOKS)
    assert list(texts_of(load_corpus(tmp_path, tokenizer, num_documents=2), tokenizer)) == ["a", "b"]
    cut = load_corpus(tmp_path, tokenizer, max_tokens=13)
    assert texts_of(cut, tokenizer) == {"a": "first text", "b": "sec"}
    exact = load_corpus(tmp_path, tokenizer, max_tokens=len("first text"))
    assert texts_of(exact, tokenizer) == {"a": "first text"}


def test_same_corpus_in_small_batches(tmp_path, tokenizer, monkeypatch):
    write_files(tmp_path, {f"{number:02}.txt": "word " * (number + 1) for number in range(20)})
    whole = load_corpus(tmp_path, tokenizer)
    monkeypatch.setattr(corpus_module, "BATCH_DOCUMENTS", 3)
    monkeypatch.setattr(corpus_module, "BATCH_CHARACTERS", 150)
    pieces = load_corpus(tmp_path, tokenizer, cache_dir=tmp_path / "other")
    assert len(pieces.data["input_ids"].chunks) > len(whole.data["input_ids"].chunks) == 1
    assert pieces[:] == whole[:]


def test_documents_without_text_are_left_out(tmp_path, tokenizer):
    write_files(tmp_path, {**BOOKS, "0.txt": " \n", "d.txt": ""})
    with pytest.warns(UserWarning, match=r"without text were left out: 2, the first is '0'"):
        corpus = load_corpus(tmp_path, tokenizer)
    assert texts_of(corpus, tokenizer) == NAMED


def test_second_call_tokenises_nothing(tmp_path, tokenizer):
    folder = write_files(tmp_path / "books", BOOKS)
    first = load_corpus(folder, tokenizer)
    again = load_corpus(folder, tokenizer)
    assert tokenizer.num_texts == 3
    assert again[:] == first[:]
    assert again.cache_files == first.cache_files != [], "memory-mapped"
    with pytest.MonkeyPatch.context() as patch:  # an equal tokenizer is the same, whatever it did before
        equal = byte_tokenizer()
        equal(["some text"], truncation=True, max_length=3)
        patch.setattr(type(equal), "__call__", lambda *_, **__: pytest.fail("tokenised again"))
        load_corpus(folder, equal)


@pytest.mark.parametrize("change", ["content", "name", "tokenizer", "bound"])
def test_another_corpus_is_read_anew(tmp_path, tokenizer, change):
    folder = write_files(tmp_path / "books", BOOKS)
    first = load_corpus(folder, tokenizer)
    options: dict[str, Any] = {}
    if change == "content":
        (folder / "a.txt").write_text("FIRST TEXT")
    elif change == "name":
        (folder / "a.txt").rename(folder / "0.txt")
    elif change == "tokenizer":
        tokenizer = byte_tokenizer(last_token=60)
    else:
        options["num_documents"] = 2
    other = load_corpus(folder, tokenizer, **options)
    assert other[:] != first[:]
    assert tokenizer.num_texts > (0 if change == "tokenizer" else 3)


def test_threads_make_one_corpus(tmp_path, tokenizer):
    folder = write_files(tmp_path / "books", BOOKS)
    with ThreadPoolExecutor(4) as pool:
        corpora = list(pool.map(lambda _: load_corpus(folder, tokenizer), range(4)))
    assert tokenizer.num_texts == 3
    assert all(texts_of(corpus, tokenizer) == NAMED for corpus in corpora)


@pytest.mark.slow
def test_two_processes_make_one_corpus(tmp_path, tokenizer):
    folder = write_files(tmp_path / "books", {f"{number}.txt": "some text " * 1_000 for number in range(20)})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    code = (
        "import sys; from transformers import AutoTokenizer; from longmem.data import load_corpus; "
        "print(len(load_corpus(sys.argv[1], AutoTokenizer.from_pretrained(sys.argv[2]), cache_dir=sys.argv[3])))"
    )
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "tokenizer"), str(tmp_path / "cache")]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) for _ in range(2)]
    assert [run.communicate(timeout=120)[0].strip() for run in runs] == ["20", "20"]
    assert sum(path.is_dir() for path in (tmp_path / "cache").iterdir()) == 1
    assert len(load_corpus(folder, tokenizer, cache_dir=tmp_path / "cache")) == 20


def test_what_fails_leaves_nothing_behind(tmp_path, tokenizer):
    write_files(tmp_path, {"x.jsonl": json_lines({"text": "good"}) + "{bad\n"})
    with pytest.raises(ValueError):
        load_corpus(tmp_path / "x.jsonl", tokenizer, cache_dir=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    write_files(tmp_path, {"x.jsonl": json_lines({"text": "good"})})
    assert len(load_corpus(tmp_path / "x.jsonl", tokenizer, cache_dir=tmp_path / "cache")) == 1


def test_what_is_kept_of_texts_is_private(tmp_path, tokenizer):
    before = os.umask(0o022)
    try:
        load_corpus(write_files(tmp_path / "texts", BOOKS), tokenizer, cache_dir=tmp_path / "cache")
    finally:
        os.umask(before)
    kept = list((tmp_path / "cache").rglob("*.*"))
    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "cache", *kept) if path.suffix != ".lock"} == {0}
    assert any(path.name == corpus_module.FILE for path in kept)


def test_rows_of_a_folder_are_copied_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")  # which others may read
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "train.csv").write_text("text,label\nmine,1\n")
    assert list(load_rows(str(tmp_path / "own"), None, "train")) == [{"text": "mine", "label": 1}]
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and b"mine" in path.read_bytes()]
