"""`longmem bank staleness` and `longmem bank refresh`, and what other commands say of a bank that is stale."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from changed_encoder import changed, tiny_longmem
from tiny_models import some_text

from longmem.cli.main import main
from longmem.encoder.watch import Encoder
from longmem.memory import MemoryBank
from longmem.model.modeling import LongMemForCausalLM


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a folder with models "old" and "new" (its encoder moved), and a bank that the old one wrote."""
    folder = tmp_path_factory.mktemp("once")
    model = tiny_longmem(folder / "backbone")
    model.save_pretrained(folder / "old")
    twin = changed(model, 0.2)
    twin.backbone.save_pretrained(folder / "new-backbone")
    model.tokenizer.save_pretrained(folder / "new-backbone")
    twin.config.backbone_name_or_path = str(folder / "new-backbone")
    twin.save_pretrained(folder / "new")
    for seed, name in enumerate(["one.txt", "two.txt"]):
        (folder / name).write_text(some_text(40, seed))
    made = ["memorize", folder / "one.txt", folder / "two.txt", "--bank", folder / "bank", "--model", folder / "old"]
    assert main([str(argument) for argument in made]) == 0
    return folder


@pytest.fixture
def bank(folders, tmp_path):
    return Path(shutil.copytree(folders / "bank", tmp_path / "bank"))


@pytest.fixture
def tokens(folders):
    return sum(len((folders / name).read_bytes()) for name in ("one.txt", "two.txt"))


@pytest.fixture
def answer(run):
    """Run a command that succeeds, and return the object that it prints for a program."""

    def run_command(*arguments):
        code, out, error = run(*arguments, "--json")
        assert code == 0, error
        return json.loads(out)

    return run_command


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def versions(folder):
    """Return the encoder versions of each document's segments."""
    with MemoryBank.open(folder, read_only=True) as bank:
        return {
            info.document_id: {each.version for each in bank.segments(info.document_id)} for info in bank.documents()
        }


def test_a_fresh_bank_is_said_to_be_fresh(folders, bank, run, answer):
    code, out, error = run("bank", "staleness", "--bank", bank)
    assert (code, error) == (0, "")
    assert out.startswith("Fresh: all ")
    assert "the bank's current encoder." in out.splitlines()[0]
    assert (
        f"were written by {folders / 'old'}." in run("bank", "staleness", "--bank", bank, "--model", folders / "old")[1]
    )
    found = answer("bank", "staleness", "--bank", bank, "--probe")
    assert (found["is_fresh"], found["stale_share"], found["model"]) == (True, 0, str(folders / "old"))
    assert [each["document_id"] for each in found["documents"]] == ["one.txt", "two.txt"]


def test_what_another_model_finds_stale_is_said_and_nothing_changes(folders, bank, tokens, run, answer):
    before = files(bank)
    options = ("--bank", bank, "--model", folders / "new")
    out = run("bank", "staleness", *options)[1]
    summary = out.splitlines()[0]
    assert summary.startswith("Stale: ")
    assert "the encoders differ in weights." in summary
    assert "The refresh policy is frozen: the bank is refused." in summary
    assert f"`longmem bank refresh --bank {bank} --model {folders / 'new'}` encodes {tokens:,} tokens again." in summary
    assert [line.split()[0] for line in out.splitlines()[-2:]] == ["one.txt", "two.txt"]
    found = answer("bank", "staleness", *options, "--probe")
    assert (found["stale_share"], found["differs"], found["tokens_to_encode"]) == (1, ["weights"], tokens)
    assert found["summary"] == summary
    assert 0 < found["gap_max"] < 1
    assert 0 < found["probe_drift"] < 2
    assert files(bank) == before


def test_a_figure_is_drawn(folders, bank, run):
    pytest.importorskip("matplotlib")
    plot = bank.parent / "staleness.png"
    assert run("bank", "staleness", "--bank", bank, "--model", folders / "new", "--plot", plot)[0] == 0
    assert plot.stat().st_size > 10_000


def test_a_refreshed_bank_is_as_if_the_new_model_had_written_it(folders, bank, tokens, run, answer, tmp_path):
    done = answer("bank", "refresh", "--bank", bank, "--model", folders / "new")
    assert (done["tokens"], done["documents"], done["tokens_left"], done["refresh"]) == (tokens, 2, 0, "frozen")
    assert done["stale_tokens_before"] == tokens
    assert done["tokens_per_second"] > 0
    info = answer("bank", "info", "--bank", bank)
    assert (info["model"], info["refresh"], info["tokens_of_other_encoders"]) == (str(folders / "new"), "frozen", 0)
    assert len(set(info["encoders"])) == 2
    assert info["encoders"][-1] == info["fingerprint"]
    assert run("generate", "--bank", bank, "--prompt", "the cat", "--max-new-tokens", 2)[0] == 0
    assert answer("bank", "staleness", "--bank", bank, "--model", folders / "new")["is_fresh"]
    again = answer("bank", "refresh", "--bank", bank)
    assert (again["tokens"], again["model"]) == (0, str(folders / "new"))

    texts = [folders / "one.txt", folders / "two.txt"]
    run("memorize", *texts, "--bank", tmp_path / "fresh", "--model", folders / "new")
    with MemoryBank.open(bank) as one, MemoryBank.open(tmp_path / "fresh") as other:
        assert torch.equal(one.search_keys(2), other.search_keys(2))


def test_a_budget_is_kept_and_the_next_run_goes_on(folders, bank, tokens, run, answer):
    place = ("bank", "refresh", "--bank", bank)
    out = run(*place, "--model", folders / "new", "--budget-tokens", 64)[1]
    assert "64 tokens encoded again" in out
    left = f"{tokens - 64:,} tokens are left; `longmem bank refresh --bank {bank} --model {folders / 'new'}` goes on."
    assert left in out
    assert answer("bank", "info", "--bank", bank)["tokens_of_other_encoders"] > 0
    summary = run("bank", "staleness", "--bank", bank)[1].splitlines()[0]
    assert "The refresh policy is frozen: " in summary
    assert "refused" not in summary, "the rest of it can be read"
    assert answer(*place)["tokens"] == tokens - 64
    assert answer("bank", "staleness", "--bank", bank)["is_fresh"]


def test_an_interrupted_refresh_keeps_whole_documents_and_goes_on(folders, bank, tokens, run, answer, monkeypatch):
    encode, calls = Encoder.encode, []
    of_first = -(-len((folders / "one.txt").read_bytes()) // 32)

    def stop_in_the_second_document(self, input_ids, **inputs):
        calls.append(input_ids)
        if len(calls) == of_first + 2:
            raise KeyboardInterrupt
        return encode(self, input_ids, **inputs)

    monkeypatch.setattr(Encoder, "encode", stop_in_the_second_document)
    code, _, error = run("bank", "refresh", "--bank", bank, "--model", folders / "new")
    assert code == 130
    assert "what was finished is on the disk" in error
    monkeypatch.undo()
    assert versions(bank) == {"one.txt": {1}, "two.txt": {0}}
    assert answer("bank", "refresh", "--bank", bank, "--model", folders / "new")["tokens"] < tokens
    assert versions(bank) == {"one.txt": {1}, "two.txt": {1}}


@pytest.mark.parametrize("action", ["generate", "memorize", "append", "tune"])
def test_a_stale_bank_is_refused_with_the_command_that_helps(folders, bank, run, action):
    commands = {
        "generate": ("generate", "--prompt", "the cat"),
        "memorize": ("memorize", folders / "one.txt", "--id", "three"),
        "append": ("bank", "append", folders / "one.txt", "--id", "one.txt"),
        "tune": ("bank", "tune", "--num-queries", 4),
    }
    before = files(bank)
    code, _, error = run(*commands[action], "--bank", bank, "--model", folders / "new")
    assert code == 2
    assert f"`longmem bank refresh --bank {bank}`" in error
    assert "differ in weights" in error
    assert "Traceback" not in error
    assert files(bank) == before


def test_a_policy_that_acts_lets_commands_read(folders, bank, run, answer):
    with MemoryBank.open(bank) as opened:
        opened.freshness.use("eager")
    options = ("--bank", bank, "--model", folders / "new", "--prompt", "the cat", "--max-new-tokens", 2)
    assert run("generate", *options)[0] == 0
    assert versions(bank) == {"one.txt": {1}, "two.txt": {1}}
    before = files(bank)
    assert run("generate", *options)[0] == 0
    assert files(bank) == before, "what is fresh is only read"


def test_a_new_bank_is_given_a_policy(folders, tmp_path, run, answer):
    place = ("--bank", tmp_path / "new")
    code, _, error = run("memorize", folders / "one.txt", *place, "--model", folders / "old", "--refresh", "lazzy")
    assert code == 2
    assert "Did you mean `lazy`?" in error
    assert run("memorize", folders / "one.txt", *place, "--model", folders / "old", "--refresh", "lazy")[0] == 0
    assert answer("bank", "info", *place)["refresh"] == "lazy"
    assert run("memorize", folders / "one.txt", *place, "--refresh", "lazy")[0] == 2  # nothing is new
    code, _, error = run("memorize", folders / "two.txt", *place, "--refresh", "eager")
    assert code == 2
    assert "`--refresh` is set when a bank is made" in error


def test_documents_that_stay_stale_are_named(folders, bank, run, answer):
    with MemoryBank.open(bank) as opened:
        model = LongMemForCausalLM.from_pretrained(folders / "old")
        tensors = ([each[0] for each in part] for part in model.encode(torch.arange(32)[None]))
        opened.add("[bold]no ids", *tensors)
    out = run("bank", "refresh", "--bank", bank, "--model", folders / "new")[1]
    assert "1 document can't be encoded again as a whole" in out
    assert "('[bold]no ids')" in out
    code, out, _ = run("bank", "staleness", "--bank", bank)
    assert (code, out.splitlines()[-1].split()[0]) == (0, "[bold]no")
    summary = run("bank", "staleness", "--bank", bank)[1].splitlines()[0]
    assert "frozen: 8 of " in summary
    assert "chunks are not read as they are." in summary
    assert "refresh --bank" not in summary, "it would not help"


def test_a_bank_that_differs_for_good_is_told_apart(folders, bank, tmp_path, run):
    tiny_longmem(tmp_path / "backbone", chunk_size=8).save_pretrained(tmp_path / "other")
    before = files(bank)
    options = ("--bank", bank, "--model", tmp_path / "other")
    out = run("bank", "staleness", *options)[1]
    assert out.startswith(f"Not for {tmp_path / 'other'}: it and the bank differ in chunk_size")
    code, _, error = run("bank", "refresh", *options, "--policy", "lazy")
    assert code == 2
    assert "`chunk_size` 4 and 8" in error
    assert files(bank) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["staleness", "--bank", "{new}"], "there is no bank in"),
        (["refresh", "--bank", "{new}"], "there is no bank in"),
        (["refresh", "--bank", "{bank}", "--budget-tokens", "0"], "`--budget-tokens` must be at least 1"),
        (["refresh", "--bank", "{bank}", "--policy", "eagre"], "Did you mean `eager`?"),
    ],
)
def test_errors_are_one_line_and_change_nothing(arguments, message, bank, tmp_path, run):
    before = files(bank)
    code, _, error = run("bank", *(argument.format(bank=bank, new=tmp_path / "new") for argument in arguments))
    assert code == 2
    assert message in error
    assert len(error.splitlines()) == 1
    assert files(bank) == before
