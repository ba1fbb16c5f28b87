"""What `load_corpus` says about sources that it cannot read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from longmem.data import load_corpus


@pytest.mark.parametrize("missing", ["books.txt", "./books", Path("books"), "lines.jsonl"])
def test_missing_path(tmp_path, monkeypatch, tokenizer, missing):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"`source` must exist, got '(\./)?\w+(\.\w+)?'.* neither a file nor a folder"):
        load_corpus(missing, tokenizer)


def test_no_name(tokenizer):
    with pytest.raises(ValueError, match=r"`source` must name a file, a folder, a dataset or 'python-manual', got ''"):
        load_corpus("", tokenizer)


def test_name_without_a_bound(tokenizer):
    with pytest.raises(
        ValueError, match=r"'my/books' is neither a file nor a folder, .* give `num_documents` or `max_t"
    ):
        load_corpus("my/books", tokenizer)


def test_name_without_a_network(tokenizer):
    message = r"'my/books' is neither a file nor a folder, and cannot .* `split` 'train': .*Offline.* HF_HUB_OFFLINE"
    with pytest.raises(ValueError, match=message):
        load_corpus("my/books", tokenizer, num_documents=3)


def test_empty_folder(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"`source` must hold documents, got the folder '.*', which holds no files"):
        load_corpus(tmp_path, tokenizer)


def test_folder_that_nothing_reads(tmp_path, tokenizer):
    (tmp_path / "x.bin").write_bytes(b"12")
    with pytest.raises(ValueError, match=r"holds no .txt or .jsonl files, and `datasets.load_dataset` cannot open it"):
        load_corpus(tmp_path, tokenizer)


def test_unknown_configuration(tmp_path, tokenizer):
    datasets.Dataset.from_dict({"text": ["one"]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(
        ValueError, match=r"with `configuration` 'french' and `split` 'train': .*Available: \['default'\]"
    ):
        load_corpus(f"{tmp_path}:french", tokenizer)


def test_two_kinds_of_files(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"\.txt or \.jsonl files, not both, got '.*' with 1 and 1; move one kind"):
        load_corpus(tmp_path, tokenizer)


def test_other_kind_of_file(tmp_path, tokenizer):
    (tmp_path / "a.csv").write_text("text")
    with pytest.raises(ValueError, match=r"must be a \.txt or \.jsonl file .* got '.*a\.csv'; .* name the folder"):
        load_corpus(tmp_path / "a.csv", tokenizer)


@pytest.mark.parametrize(
    ("content", "split", "message"),
    [
        ([{"file": "a.txt", "split": "train"}], "dev", r"`split` must be one of \['train'\], those of .*, got 'dev'"),
        ([{"name": "a.txt"}], "train", "must be a JSON list of objects that have `file` and `split`"),
        ({"file": "a.txt", "split": "train"}, "train", "must be a JSON list of objects that have `file` and `split`"),
        ([{"file": "none.txt", "split": "train"}], "train", r"must list files that are there, .* got '.*none\.txt'"),
        (
            [{"file": name, "split": "x"} for name in ("a.txt", "b.jsonl")],
            "x",
            r"all \.txt or all \.jsonl, got '.*b\.jsonl'",
        ),
        ([{"file": "a.csv", "split": "train"}], "train", r"all \.txt or all \.jsonl, got '.*a\.csv'"),
    ],
)
def test_a_list_that_is_none(tmp_path, tokenizer, content, split, message):
    for name in ("a.txt", "b.jsonl", "a.csv"):
        (tmp_path / name).write_text('{"text": "some"}')
    (tmp_path / "list.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_corpus(tmp_path / "list.json", tokenizer, split=split)
    with pytest.raises(ValueError, match="`source` must exist, got 'other.json'"):
        load_corpus("other.json", tokenizer)


def test_no_text_at_all(tmp_path, tokenizer):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"`source` must hold text, got '.*' with 2 documents, none of which has any"):
        load_corpus(tmp_path, tokenizer)


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_other_encoding(tmp_path, tokenizer, suffix):
    (tmp_path / f"good.{suffix}").write_text('{"text": "good"}\n')
    (tmp_path / f"latin.{suffix}").write_bytes('{"text": "café"}\n'.encode("latin-1"))
    with pytest.raises(
        ValueError, match=rf"latin\.{suffix} must be text in UTF-8, got other bytes \(.*0xe9.*convert it"
    ):
        load_corpus(tmp_path, tokenizer)


@pytest.mark.parametrize("line", ['{"text": "open', "[1, 2]", "text"])
def test_line_that_is_no_object(tmp_path, tokenizer, line):
    (tmp_path / "x.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2, must be one JSON object, got '"):
        load_corpus(tmp_path, tokenizer)


def test_half_a_character(tmp_path, tokenizer):
    (tmp_path / "x.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n{"text": "\\ud83d"}')
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2, must hold whole characters in 'text', got half of one"):
        load_corpus(tmp_path, tokenizer)


def test_unknown_column(tmp_path, tokenizer):
    (tmp_path / "x.jsonl").write_text(json.dumps({"id": 1, "texts": "good"}))
    with pytest.raises(ValueError, match=r"got 'text' for .*line 1, which has id, texts\. Did you mean `texts`\?"):
        load_corpus(tmp_path, tokenizer)


def test_unknown_column_of_a_dataset(tmp_path, tokenizer):
    saved = datasets.Dataset.from_dict({"document_id": ["a"], "input_ids": [[1]]})
    saved.save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=r"row 1, which has document_id, input_ids; .* `datasets.load_from_disk`"):
        load_corpus(tmp_path, tokenizer)


def test_column_of_something_else(tmp_path, tokenizer):
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": ["a", "b"]}))
    with pytest.raises(ValueError, match=r"must name a column of text, got 'text' with \['a', 'b'\] in .*line 1"):
        load_corpus(tmp_path, tokenizer)


def test_unknown_split(tmp_path, tokenizer):
    datasets.DatasetDict(validation=datasets.Dataset.from_dict({"text": ["a"]})).save_to_disk(tmp_path)
    with pytest.raises(
        ValueError, match=r"`split` must be one of validation .* 'validatoin'\. Did you mean `validation`"
    ):
        load_corpus(tmp_path, tokenizer, split="validatoin")


@pytest.mark.parametrize("option", [{"split": "test"}, {"text_column": "body"}])
def test_option_without_effect(tokenizer, option: dict[str, Any]):
    (name, value), *_ = option.items()
    with pytest.raises(ValueError, match=f"`{name}` must be left out for 'python-manual', .* got '{value}'"):
        load_corpus("python-manual", tokenizer, **option)


@pytest.mark.parametrize("bound", ["max_tokens", "num_documents"])
def test_bound_of_nothing(tokenizer, bound):
    with pytest.raises(ValueError, match=f"`{bound}` must be at least 1, got 0; leave it out to read everything"):
        load_corpus("python-manual", tokenizer, **{bound: 0})


def test_cache_that_is_no_folder(tmp_path, tokenizer):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`cache_dir` must be a folder that can be written, got '.*file/sub'"):
        load_corpus("python-manual", tokenizer, cache_dir=tmp_path / "file" / "sub")
