"""`longmem chat`: a talk over a stream, with documents that can be remembered and forgotten."""

from __future__ import annotations

import argparse
import shlex

import pytest
from tiny_models import save_tiny_backbone, some_text

from longmem import LongMemForCausalLM, MemoryBank
from longmem.cli import chat
from longmem.cli.main import main


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    backbone = str(save_tiny_backbone(folder / "backbone"))
    LongMemForCausalLM.from_backbone(backbone, segment_length=64, num_retrieved_tokens=16).save_pretrained(
        folder / "longmem"
    )
    return folder / "longmem"


def conversation(folder, **options):
    model = LongMemForCausalLM.from_pretrained(folder).eval()
    given = argparse.Namespace(**{"max_new_tokens": 10, "temperature": 0.0, "seed": 0} | options)
    return chat.Conversation(model, MemoryBank.for_model(model, capacity_tokens=None), given)


def test_the_stream_holds_the_whole_talk_and_memory_what_left_the_window(model_folder):
    talk, said = conversation(model_folder), []
    for question in ("the cat sat", some_text(12), "on a mat"):
        talk.ask(question, said.append)
    answers = [turn["content"] for turn in talk.turns if turn["role"] == "assistant"]
    assert "".join(said) == "".join(answers)
    (info,) = talk.bank.documents()
    left = talk.bank.token_ids(info.document_id).tolist()
    everything = talk.model.tokenizer.decode([*left, *talk.stream.local_ids.tolist()])
    assert everything == talk.said
    assert talk.said.endswith(answers[-1])
    assert all(turn["content"] in talk.said for turn in talk.turns)


def test_documents_are_remembered_shown_and_forgotten(model_folder, tmp_path):
    talk, answers = conversation(model_folder), []
    (tmp_path / "notes.txt").write_text(some_text(30))
    assert talk.command("/documents") == "nothing yet"
    assert talk.command("/why") == "there is no answer yet"
    assert "remembered notes.txt" in talk.command(f"/remember {tmp_path / 'notes.txt'}")
    for switch in ("/on", "/off"):
        assert talk.command(switch) == f"memory is {switch[1:]}"
        fresh = conversation(model_folder)
        fresh.bank, fresh.uses_memory = talk.bank, talk.uses_memory
        fresh.stream = fresh.model.stream(talk.bank, document_id=f"talk {switch}")
        fresh.ask("the cat sat", lambda _: None)
        answers.append(fresh.turns[-1]["content"])
        assert ("notes.txt" in fresh.why()) == talk.uses_memory
    assert answers[0] != answers[1]
    assert talk.command("/forget notes.txt") == "forgotten: notes.txt"
    assert "/remember FILE" in talk.command("/help")


def test_answers_without_memory_are_drawn_by_the_seed_too(model_folder):
    answers = []
    for seed in (1, 1, 2):
        talk = conversation(model_folder, temperature=5.0, seed=seed)
        talk.uses_memory = False
        talk.ask("the cat sat", lambda _: None)
        answers.append(talk.turns[-1]["content"])
    assert answers[0] == answers[1] != answers[2]


def test_commands_say_what_is_wrong_with_them(model_folder, tmp_path, capsys):
    talk, file = conversation(model_folder), tmp_path / "it's my note.txt"
    file.write_text(some_text(5))
    (tmp_path / "bytes").write_bytes(b"\xff")
    dropped = f"/remember {shlex.quote(str(file))}"
    for line, told in (
        ("/remember", "/remember must have FILE behind it"),
        ("/forget \t", "/forget must have DOC behind it"),
        ("/off please", "/off must have nothing behind it, got 'please'"),
        ("/bye now", "/bye must have nothing behind it"),
        ("/remeber x", "no command '/remeber'. Did you mean `remember`? /help lists them"),
        (" /etc/passwd what is it?", "no command '/etc/passwd'"),
        ("/", "no command '/'"),
        (f"/remember {tmp_path}", "FILE must be one file"),
        ("/remember -", "FILE must be one file"),
        ("/remember 'half", "there is no file 'half"),
        (f"/remember {tmp_path / 'bytes'}", "is not a UTF-8 text file"),
        ("/forget note", "DOC must be a document in memory, got 'note'; /documents lists them"),
        (dropped, ""),
        (dropped, "FILE must have a name that is new to memory"),
        (f"  /forget {file.name}", ""),
        (f"/remember {file}", ""),
        ("/help", ""),
    ):
        chat.talk(talk, iter([line]))
        out, error = capsys.readouterr()
        error = "".join(part for part in error.splitlines() if part.startswith("longmem: "))
        assert told in error
        assert bool(told) == bool(error) != bool(out), line
    assert [info.document_id for info in talk.bank.documents()] == [file.name]
    assert talk.turns == []  # none of them was a question


def test_the_command_talks_over_a_bank_on_disk_and_survives_mistakes(model_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text(some_text(30))
    lines = iter([f"/remember {tmp_path / 'a.txt'}", "/forget nothing", "", "the cat sat", "/why", "/bye", "never"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    given = ["chat", "--bank", tmp_path / "bank", "--model", model_folder, "--max-new-tokens", "4"]
    assert main([str(each) for each in given]) == 0
    out, error = capsys.readouterr()
    assert "remembered a.txt" in out
    assert "a.txt: " in out
    assert "'nothing'" in error
    assert next(lines) == "never"
    with MemoryBank.open(tmp_path / "bank", read_only=True) as bank:
        assert "a.txt" in bank
    monkeypatch.setattr("builtins.input", lambda _: (_ for _ in ()).throw(EOFError))
    assert main(["chat", "--bank", str(tmp_path / "bank")]) == 0  # opened with the model that wrote it


def test_what_was_written_before_ctrl_c_is_part_of_the_talk(model_folder):
    talk, said = conversation(model_folder), []

    def stop(text):
        said.append(text)
        if len(said) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.ask("the cat sat", stop)
    talk.ask("on a mat", lambda _: None)
    assert talk.turns[1] == {"role": "assistant", "content": "".join(said)}
    assert talk.said.count("the cat sat") == 1
    left = [talk.bank.token_ids(each.document_id).tolist() for each in talk.bank.documents()]
    assert talk.model.tokenizer.decode([*sum(left, []), *talk.stream.local_ids.tolist()]) == talk.said


@pytest.mark.parametrize("fails", [UnicodeEncodeError, RuntimeError, ImportError, KeyboardInterrupt])
def test_a_question_that_cant_be_read_leaves_the_talk_as_it_was(model_folder, monkeypatch, capsys, fails):
    talk = conversation(model_folder)
    read, calls = talk.stream.read, []

    def read_all_or_half(ids):
        calls.append(ids)
        if fails is not UnicodeEncodeError and len(calls) == 2:
            read(ids[:3])  # and then the disk is full
            raise fails("no more")
        return read(ids)

    monkeypatch.setattr(talk.stream, "read", read_all_or_half)
    wrong = "caf\udce9" if fails is UnicodeEncodeError else "second"
    chat.talk(talk, iter(["the cat", wrong, "on a mat"]))
    assert [turn["content"] for turn in talk.turns if turn["role"] == "user"] == ["the cat", "on a mat"]
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"] * 2
    assert talk.turns[-1]["content"]
    left = [talk.bank.token_ids(each.document_id).tolist() for each in talk.bank.documents()]
    assert talk.model.tokenizer.decode([*sum(left, []), *talk.stream.local_ids.tolist()]).endswith(talk.said[-20:])
    out, error = capsys.readouterr()
    assert ("stopped" in out) if fails is KeyboardInterrupt else error.startswith("longmem: ")
    if fails is UnicodeEncodeError:  # nothing of it was read
        alone = conversation(model_folder)
        chat.talk(alone, iter(["the cat", "on a mat"]))
        assert alone.said == talk.said


def test_whether_an_answer_has_read_is_told_of_that_answer(model_folder):
    talk = conversation(model_folder)
    talk.model.memorize(talk.bank, some_text(40), "d")
    for said in ("off", "on"):
        talk.command(f"/{said}")
        talk.ask("the cat", lambda _: None)
        for now in ("on", "off"):
            talk.command(f"/{now}")
            assert ("nothing was read" in talk.why()) == (said == "off")


def test_what_a_terminal_would_obey_is_shown(model_folder, monkeypatch, capsys):
    talk = conversation(model_folder)
    monkeypatch.setattr(talk, "_tokens", lambda: iter(talk.model.tokenizer("a\x1b[2Jb")["input_ids"]))
    talk.model.memorize(talk.bank, some_text(20), "\x1b[31mred")
    chat.talk(talk, iter(["the cat", "/documents", "/forget \x1b[31m"]))
    out, error = capsys.readouterr()
    assert "a\\x1b[2Jb" in out
    assert "\\x1b[31mred" in out
    assert "\x1b" not in out + error


@pytest.mark.parametrize("option", [("--temperature", "nan"), ("--max-new-tokens", "0"), ("--seed", str(2**70))])
def test_wrong_options_are_refused_before_a_model_is_opened(option, capsys):
    assert main(["chat", *option]) == 2
    assert option[0] in capsys.readouterr().err
