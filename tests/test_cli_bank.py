"""`longmem bank`: every action changes, shows or checks a bank on disk, and says in one line what it cannot do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_backbone, some_text

from longmem.cli.main import main
from longmem.cli.texts import read_texts
from longmem.encoder.watch import Encoder
from longmem.memory import MemoryBank
from longmem.memory.index import approximate
from longmem.model.modeling import LongMemForCausalLM


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """Return the folder of a saved model whose windows are short."""
    folder = tmp_path_factory.mktemp("model")
    backbone = str(save_tiny_backbone(folder / "backbone"))
    model = LongMemForCausalLM.from_backbone(backbone, segment_length=32, num_retrieved_tokens=16)
    model.save_pretrained(folder / "longmem")
    return folder / "longmem"


@pytest.fixture
def answer(run):
    """Run a command that succeeds, and return the object that it prints for a program."""

    def run_command(*arguments):
        code, out, error = run(*arguments, "--json")
        assert code == 0, error
        return json.loads(out)

    return run_command


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for seed, path in enumerate(paths):
        path.write_text(some_text(40, seed))
    return paths


@pytest.fixture(scope="module")
def made_once(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("once")
    for seed, name in enumerate(["one.txt", "two.txt"]):
        (folder / name).write_text(some_text(40, seed))
    made = ["bank", "add", folder / "one.txt", folder / "two.txt", "--bank", folder / "bank", "--model", model_folder]
    assert main([str(argument) for argument in made]) == 0
    return folder / "bank"


@pytest.fixture
def bank(made_once, tmp_path):
    return Path(shutil.copytree(made_once, tmp_path / "bank"))


def documents(folder):
    with MemoryBank.open(folder, read_only=True) as bank:
        return {info.document_id: info.num_tokens for info in bank.documents()}


def contents(folder):
    """Return all that a bank holds, in an order of its own."""
    with MemoryBank.open(folder, read_only=True) as bank:
        found = {}
        for layer in bank.memory_layers:
            rows = torch.arange(bank.num_chunks).expand(2, -1)
            keys, values = bank.gather(layer, rows, bank.generation)
            for row, place in enumerate(bank.locate(rows[0])):
                found[(layer, *place)] = keys[:, row].tolist(), values[:, row].tolist()
        return found


def test_documents_get_labels_and_a_new_bank_its_options(model_folder, files, tmp_path, run, answer):
    options = ("--capacity", 400, "--index", "flat", "--eviction", "lru", "--storage-dtype", "int8")
    folder = tmp_path / "new"
    labels = ("--tag", "b", "--tag", "a", "--pin")
    added = answer("memorize", files[0], "--bank", folder, "--model", model_folder, *options, *labels)
    assert added["capacity_tokens"] == 400
    info = answer("bank", "info", "--bank", folder)
    assert (info["index"], info["eviction"], info["storage_dtype"]) == ("flat", "lru", "int8")
    assert (info["tags"], info["pinned_documents"], info["model"]) == (["a", "b"], 1, str(model_folder))
    (listed,) = answer("bank", "list", "--bank", folder)["documents"]
    assert (listed["tags"], listed["is_pinned"]) == (["b", "a"], True)


def test_a_new_bank_has_no_limit(bank, run, answer):
    info = answer("bank", "info", "--bank", bank)
    assert info["capacity_tokens"] is None
    assert info["documents"] == 2
    assert info["tokens"] == sum(documents(bank).values())
    assert info["bytes_on_disk"] > 1000
    assert "no limit" in run("bank", "info", "--bank", bank)[1]


def test_memorize_is_add(model_folder, files, tmp_path, bank, run):
    assert run("memorize", *files, "--bank", tmp_path / "other", "--model", model_folder)[0] == 0
    assert contents(tmp_path / "other") == contents(bank)


def test_an_interrupted_run_keeps_the_documents_that_were_whole(model_folder, files, tmp_path, run, monkeypatch):
    folder, encode, calls = tmp_path / "new", Encoder.encode, []

    def stop_in_the_second_document(self, input_ids, **inputs):
        calls.append(input_ids)
        if len(calls) == len(files[0].read_bytes()) // 32 + 3:
            raise KeyboardInterrupt
        return encode(self, input_ids, **inputs)

    monkeypatch.setattr(Encoder, "encode", stop_in_the_second_document)
    code, _, error = run("memorize", *files, "--bank", folder, "--model", model_folder)
    assert code == 130
    assert "what was finished is on the disk" in error
    assert list(documents(folder)) == ["one.txt"]
    monkeypatch.undo()
    assert run("memorize", *files, "--bank", folder)[0] == 0  # the same command goes on
    code, _, error = run("memorize", *files, "--bank", folder)
    assert code == 2
    assert "'one.txt'; leave it out" in error
    assert documents(folder) == {path.name: len(path.read_bytes()) for path in files}


def test_an_interrupted_import_shows_nothing_that_was_superseded(
    model_folder, bank, tmp_path, run, answer, monkeypatch
):
    run("bank", "supersede", "one.txt", "--by", "two.txt", "--bank", bank)
    out, folder, encode = tmp_path / "out.jsonl", tmp_path / "again", Encoder.encode
    run("bank", "export", out, "--bank", bank)
    (length, *_) = (len(json.loads(line)["text"]) for line in out.read_text().splitlines())
    calls = []

    def stop_in_the_second_document(self, input_ids, **inputs):
        calls.append(input_ids)
        if len(calls) == length // 32 + 3:
            raise KeyboardInterrupt
        return encode(self, input_ids, **inputs)

    monkeypatch.setattr(Encoder, "encode", stop_in_the_second_document)
    assert run("bank", "add", out, "--bank", folder, "--model", model_folder)[0] == 130
    (one,) = answer("bank", "list", "--bank", folder)["documents"]
    assert (one["document_id"], one["is_superseded"], one["superseded_by"]) == ("one.txt", True, None)


def test_appended_files_are_as_if_memorized_at_once(model_folder, bank, files, tmp_path, run, answer):
    more = [tmp_path / "more.txt", tmp_path / "rest.txt"]
    for path, text in zip(more, (" and more", " and the rest"), strict=True):
        path.write_text(text)
    written = answer("bank", "append", *more, "--id", "one.txt", "--bank", bank)["written_tokens"]
    assert written == {"one.txt": 22}
    whole = tmp_path / "whole"
    files[0].write_text(files[0].read_text() + " and more and the rest")
    assert run("memorize", *files, "--bank", whole, "--model", model_folder)[0] == 0
    found, wanted = contents(bank), contents(whole)
    assert found.keys() == wanted.keys()
    for place, tensors in wanted.items():  # windows of other lengths round differently
        torch.testing.assert_close(torch.tensor(found[place]), torch.tensor(tensors), atol=2e-3, rtol=1e-2)
    assert run("bank", "append", more[0], "--id", "one.txt", "--bank", bank)[1].count("9 tokens encoded") == 1


def test_half_an_append_is_none(bank, files, tmp_path, run, monkeypatch):
    def fail(self, input_ids, **inputs):
        if len(calls := [*calls_before, 1]) > 1:
            raise RuntimeError("no more")
        calls_before.extend(calls)
        return encode(self, input_ids, **inputs)

    calls_before, encode, before = [], Encoder.encode, contents(bank)
    (tmp_path / "more.txt").write_text("more")
    monkeypatch.setattr(Encoder, "encode", fail)
    more = (tmp_path / "more.txt", tmp_path / "more.txt")
    code, _, error = run("bank", "append", *more, "--id", "one.txt", "--bank", bank)
    assert (code, error.splitlines()[-1]) == (2, "longmem: no more")
    assert contents(bank) == before


def test_an_update_copies_what_did_not_change(bank, files, run, answer):
    run("bank", "tag", "one.txt", "--tag", "novel", "--bank", bank)
    run("bank", "pin", "one.txt", "--bank", bank)
    text = files[0].read_text()
    files[0].write_text(text[:70] + "#" + text[71:])
    updated = answer("bank", "update", files[0], "--bank", bank)
    tail = len(text) % 32  # the last window is not whole, so it is encoded as well
    assert updated["written_tokens"] == {"one.txt": len(text)}
    assert updated["copied_tokens"] == {"one.txt": len(text) - 32 - tail}
    assert "copied" in run("bank", "update", files[1], "--id", "one.txt", "--bank", bank, "--tag", "other")[1]
    (listed,) = answer("bank", "list", "--bank", bank, "--tag", "other")["documents"]
    assert (listed["document_id"], listed["num_tokens"]) == ("one.txt", len(files[1].read_text()))
    assert listed["is_pinned"]


def test_labels_are_changed_and_documents_listed_by_them(bank, run, answer):
    assert "one.txt" in run("bank", "tag", "one.txt", "--tag", "novel", "--bank", bank)[1]
    assert answer("bank", "pin", "one.txt", "two.txt", "--bank", bank)["pinned"] == ["one.txt", "two.txt"]
    assert answer("bank", "unpin", "two.txt", "--bank", bank)["unpinned"] == ["two.txt"]
    out = run("bank", "list", "--bank", bank)[1]
    assert [("novel" in line, "pinned" in line) for line in out.splitlines()[1:]] == [(True, True), (False, False)]
    assert "two.txt" not in run("bank", "list", "--bank", bank, "--tag", "novel")[1]
    assert "No document has a tag of no" in run("bank", "list", "--bank", bank, "--tag", "no")[1]
    answer("bank", "tag", "one.txt", "--bank", bank)
    assert answer("bank", "list", "--bank", bank)["documents"][0]["tags"] == []


def test_what_no_longer_holds_is_listed_as_such_until_it_is_restored(bank, run, answer, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert "holds" not in run("bank", "list", "--bank", bank)[1]
    assert answer("bank", "supersede", "one.txt", "--by", "two.txt", "--bank", bank)["superseded"] == ["one.txt"]
    with MemoryBank.open(bank) as opened:
        info = opened.info("one.txt")
        assert (info.is_superseded, info.superseded_by) == (True, "two.txt")
        keys, values = opened.gather(opened.memory_layers[0], torch.zeros(2, 1, dtype=torch.int64), opened.generation)
        layers = len(opened.memory_layers)
        opened.add(
            "dated", [keys[:, 0].float()] * layers, [values[:, 0].float()] * layers, dated=86_400, valid_until=864_000
        )
    one, two, dated = run("bank", "list", "--bank", bank)[1].splitlines()[1:]
    assert one.rstrip().endswith("superseded by two.txt")
    assert "superseded" not in two
    assert ("1970-01-02" in dated, "expired 1970-01-11" in dated) == (True, True)
    assert run("bank", "supersede", "two.txt", "--by", "one.txt", "--bank", bank)[0] == 2
    assert answer("bank", "list", "--bank", bank)["documents"][1]["is_superseded"] is False
    run("bank", "restore", "one.txt", "dated", "--bank", bank)
    assert "superseded" not in (out := run("bank", "list", "--bank", bank)[1])
    assert ("1970-01-02" in out, "expired" in out) == (True, False)
    run("bank", "supersede", "two.txt", "--bank", bank)
    assert "withdrawn" in run("bank", "list", "--bank", bank)[1]


def test_deleting_is_all_or_nothing_and_compacting_gives_room_back(bank, run, answer):
    before = contents(bank)
    assert run("bank", "delete", "one.txt", "tow.txt", "--bank", bank)[0] == 2
    assert contents(bank) == before
    assert "deleted one.txt" in run("bank", "delete", "one.txt", "--bank", bank)[1]
    assert documents(bank).keys() == {"two.txt"}
    sizes = answer("bank", "compact", "--bank", bank)
    assert 0 < sizes["bytes_after"] <= sizes["bytes_before"]
    assert answer("bank", "info", "--bank", bank)["bytes_that_compact_gives_back"] == 0
    assert contents(bank) == {place: each for place, each in before.items() if place[1] == "two.txt"}
    assert answer("bank", "delete", "two.txt", "--bank", bank) == {"deleted": ["two.txt"], "bank_tokens": 0}
    assert "The bank is empty." in run("bank", "list", "--bank", bank)[1]


def test_info_knows_what_compacting_will_give_back(model_folder, files, tmp_path, run, answer):
    folder = tmp_path / "new"
    with MemoryBank.for_model(LongMemForCausalLM.from_pretrained(model_folder), folder=folder) as bank:
        model = LongMemForCausalLM.from_pretrained(model_folder)
        with bank.transaction():
            model.memorize(bank, "a short text, and", "a")
            model.memorize(bank, files[0].read_text(), "b")
        bank.delete("a")
    info = answer("bank", "info", "--bank", folder)
    sizes = answer("bank", "compact", "--bank", folder)
    given = sizes["bytes_before"] - sizes["bytes_after"]
    assert 0 < info["bytes_that_compact_gives_back"] < 2 * given
    assert "MB before" in run("bank", "compact", "--bank", folder)[1]


def test_verify_finds_one_changed_byte(bank, run, answer):
    assert answer("bank", "verify", "--bank", bank)["files"] == 1 + len(list((bank / "segments").iterdir()))
    assert "every byte is as it was written" in run("bank", "verify", "--bank", bank)[1]
    segment = next((bank / "segments").iterdir())
    content = segment.read_bytes()
    segment.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, _, error = run("bank", "verify", "--bank", bank)
    assert code == 2
    assert segment.name in error


def test_an_export_is_a_data_set_and_can_be_memorized_again(model_folder, bank, files, tmp_path, run, answer):
    run("bank", "tag", "two.txt", "--tag", "novel", "--bank", bank)
    run("bank", "pin", "two.txt", "--bank", bank)
    run("bank", "supersede", "one.txt", "--by", "two.txt", "--bank", bank)
    out = tmp_path / "out.jsonl"
    assert answer("bank", "export", out, "--bank", bank)["documents"] == 2
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["text"] for line in lines] == [path.read_text() for path in files]
    for line in lines:
        assert (line["num_tokens"], line["first_resident_token"]) == (len(line["text"]), 0)
        assert len(line["token_ids"]) == line["num_tokens"]
    assert run("bank", "add", out, "--bank", tmp_path / "again", "--model", model_folder)[0] == 0
    (one, _) = answer("bank", "list", "--bank", tmp_path / "again")["documents"]
    assert (one["is_superseded"], one["superseded_by"]) == (True, "two.txt")  # it is not found again by a detour
    for folder in (bank, tmp_path / "again"):
        run("bank", "restore", "one.txt", "--bank", folder)
    assert contents(tmp_path / "again") == contents(bank)
    assert [info["tags"] for info in answer("bank", "list", "--bank", tmp_path / "again")["documents"]] == [
        [],
        ["novel"],
    ]
    assert answer("bank", "info", "--bank", tmp_path / "again")["pinned_documents"] == 1

    from datasets import load_dataset

    data = load_dataset("json", data_files=str(out), cache_dir=str(tmp_path / "cache"), split="train")
    assert data["document_id"] == ["one.txt", "two.txt"]
    assert list(data["tags"]) == [[], ["novel"]]

    assert answer("bank", "export", out, "--bank", bank, "--tag", "novel")["documents"] == 1
    assert "two.txt" in out.read_text()
    assert "one.txt" not in out.read_text()


def test_only_exports_are_taken_apart(bank, tmp_path, run):
    plain, broken, blank = (tmp_path / name for name in ("plain.jsonl", "broken.jsonl", "blank.jsonl"))
    plain.write_text('{"text": "a line"}\n')
    broken.write_text('{"document_id": "a", "first_resident_token": 0}\n')
    blank.write_text('{"document_id": "a", "tags": [], "is_pinned": false, "first_resident_token": 0, "text": null}\n')
    assert run("bank", "add", plain, "--bank", bank)[0] == 0
    assert documents(bank)["plain.jsonl"] == 19
    assert "broken.jsonl, line 1, is not a document" in run("bank", "add", broken, "--bank", bank)[2]
    assert "the text of 'a' is not known" in run("bank", "add", blank, "--bank", bank)[2]


def test_tuning_measures_recommends_and_applies(bank, tmp_path, run, answer, monkeypatch):
    (tmp_path / "new.txt").write_text(some_text(30, seed=7))
    options = ("--bank", bank, "--queries", tmp_path / "new.txt")
    code, out, error = run("bank", "tune", *options)
    assert (code, error) == (0, "")
    assert 'index="auto" (the bank is so small' in out
    assert "…" not in out  # a narrow terminal breaks names and cuts nothing
    monkeypatch.setattr(approximate, "EXACT_BELOW", 10)
    pytest.importorskip("matplotlib")
    measured = answer("bank", "tune", *options, "--output", tmp_path / "tuning", "--num-queries", 20, "--recall", 0.01)
    assert measured["recommended"] in {each["index"] for each in measured["results"]} | {"flat"}
    assert max(each["recall"] for each in measured["results"]) > 0.5
    assert json.loads((tmp_path / "tuning" / "tuning.json").read_text())["results"] == measured["results"]
    assert measured["recommended"] in (tmp_path / "tuning" / "tuning.md").read_text() + "flat"
    assert (tmp_path / "tuning" / "tuning.png").stat().st_size > 10_000
    assert answer("bank", "info", "--bank", bank)["index"] == "auto"


def test_a_tuned_index_stays_with_the_bank(bank, run, answer, monkeypatch):
    chosen = "longmem.memory.index.tuning.recommended_index"
    monkeypatch.setattr(chosen, lambda results, recall: "ivf:probed_share=0.5")
    code, out, error = run("bank", "tune", "--bank", bank, "--layer", 2, "--num-queries", 8, "--apply")
    assert code == 0
    assert "layer 2" in out
    assert "the bank uses it now" in out
    assert "queries from stored text find themselves" in error
    assert answer("bank", "info", "--bank", bank)["index"] == "ivf:probed_share=0.5"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add", "{one}", "--bank", "{bank}", "--index", "flat"], "`--index` is set when a bank is made"),
        (["add", "{one}", "--bank", "{bank}", "--storage-dtype", "int8"], "`--storage-dtype` is set when"),
        (["add", "{one}", "--bank", "{new}", "--index", "flta"], "Did you mean `flat`"),
        (["add", "{one}", "--bank", "{new}", "--eviction", "ttl:minutes=3"], "seconds"),
        (["append", "{one}", "--id", "tow.txt", "--bank", "{bank}"], "two.txt"),
        (["append", "{one}", "--id", "a", "--bank", "{new}"], "there is no bank in"),
        (["update", "{one}", "--id", "three", "--bank", "{bank}"], "three"),
        (["update", "{one}", "--bank", "{new}"], "there is no bank in"),
        (["tag", "one.txt", "--tag", "", "--bank", "{bank}"], "tag"),
        (["pin", "three", "--bank", "{bank}"], "three"),
        (["verify", "--bank", "{new}"], "there is no bank in"),
        (["compact", "--bank", "{new}"], "there is no bank in"),
        (["tune", "--bank", "{new}"], "there is no bank in"),
        (["tune", "--bank", "{bank}", "--layer", "0"], "`--layer` must be a memory layer of the bank"),
        (["tune", "--bank", "{bank}", "--num-queries", "0"], "`--num-queries` must be at least 1"),
        (["tune", "--bank", "{bank}", "--recall", "2"], "`--recall` must be above 0"),
        (["tune", "--bank", "{bank}", "--queries", "{new}"], "new"),
    ],
)
def test_errors_are_one_line_and_change_nothing(arguments, message, bank, files, tmp_path, run):
    before = documents(bank)
    places = {"bank": bank, "one": files[0], "new": tmp_path / "new"}
    code, _, error = run("bank", *(argument.format(**places) for argument in arguments))
    assert code == 2
    assert len([line for line in error.splitlines() if line.startswith("longmem: ")]) == 1
    assert message in error
    assert "Traceback" not in error
    assert documents(bank) == before
    assert not Path(tmp_path / "new").exists()


def test_names_are_printed_as_they_are(tmp_path, run):
    names = ["notes[draft].txt", "[/x].txt", "[bold]y", ":smile:", "-dash", "long " * 40 + "end"]
    tensors = [torch.randn(1, 4, 4)]
    with MemoryBank.create(tmp_path / "[b]bank", memory_layers=[0], chunk_size=4) as bank:
        for name in names:
            bank.add(name, tensors, tensors, tags=["[red]tag"])
    place = ("--bank", tmp_path / "[b]bank")
    code, out, _ = run("bank", "list", *place)
    assert code == 0
    assert all(name in out for name in names[:-1])
    assert "[red]tag" in out
    assert out.count("long") == 40, "no part of a long name is left out"
    assert "[red]tag" in run("bank", "info", *place)[1]
    assert "[b]bank: pinned -dash;" in run("bank", "pin", *place, "--", "-dash")[1]
    assert "[b]bank" in run("bank", "compact", *place)[1]
    assert "[o].jsonl: 6 documents" in run("bank", "export", tmp_path / "[o].jsonl", *place)[1]


def test_a_document_whose_name_looks_like_markup_is_memorized(model_folder, files, tmp_path, run):
    place = ("--bank", tmp_path / "new", "--model", model_folder)
    code, out, error = run("memorize", files[0], "--id", "[/b]", *place)
    assert code == 0, error
    assert "[/b]" in out
    assert documents(tmp_path / "new").keys() == {"[/b]"}


def test_an_export_that_another_program_wrote_anew_is_read(tmp_path):
    line = {"document_id": "a", "tags": [], "is_pinned": False, "first_resident_token": 0, "text": "one\u2028two\x85"}
    path = tmp_path / "documents.jsonl"
    path.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [text.text for text in read_texts([path])] == ["one\u2028two\x85"]


def test_a_reader_that_has_seen_enough_is_no_error(bank):
    command = [sys.executable, "-m", "longmem.cli.main", "bank", "list", "--bank", bank, "--json"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, cwd=Path(__file__).parents[1], check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_find_shows_passages_by_heads_and_by_words(bank, answer, run):
    found = answer("bank", "find", "house dog", "--bank", bank, "--count", 2)
    assert list(found) == ["heads", "words"]
    assert all(len(passages) == 2 and passages[0]["score"] >= passages[1]["score"] for passages in found.values())
    assert {"house", "dog"} & set(found["words"][0]["text"].split())
    assert answer("bank", "find", "zebra", "--bank", bank, "--by", "words") == {"words": []}
    code, out, _ = run("bank", "find", "house", "--bank", bank, "--by", "words", "--count", 1)
    assert code == 0
    assert "two.txt, tokens" in out or "one.txt, tokens" in out
    code, _, error = run("bank", "find", "?", "--bank", bank)
    assert code == 2
    assert "`text` must have a word" in error


@pytest.mark.parametrize(
    "command",
    [
        *(f"{name} --bank" for name in ("bank tune", "bank staleness", "bank refresh", "bank verify", "chat")),
        "serve --banks",
        "cluster start notes --folder",
    ],
)
def test_commands_that_work_on_folders_say_so_of_a_bank_on_a_cluster(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main([*command.split(), "ray://notes"])
    assert "works on folders, got ray://notes" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
