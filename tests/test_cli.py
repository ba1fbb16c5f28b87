from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import save_tiny_backbone, some_text
from tiny_trained import NAME, save_tiny_trained

import longmem
from longmem.cli.main import main
from longmem.memory import MemoryBank

ACTIONS = "add append update list info delete tag pin unpin verify compact export tune staleness refresh".split()  # noqa: SIM905
COMMANDS = [
    ["demo"],
    ["memorize"],
    ["generate"],
    ["train"],
    ["report"],
    ["bank"],
    *(["bank", action] for action in ACTIONS),
]
COMMANDS += [["official"], ["official", "convert"], ["official", "compare"]]


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory):
    return str(save_tiny_backbone(tmp_path_factory.mktemp("backbone")))


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for seed, path in enumerate(paths):
        path.write_text(some_text(30, seed))
    return paths


@pytest.fixture(scope="module")
def made_once(backbone_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("once")
    for seed, name in enumerate(["one.txt", "two.txt"]):
        (folder / name).write_text(some_text(30, seed))
    made = ["memorize", folder / "one.txt", folder / "two.txt", "--bank", folder / "bank", "--model", backbone_folder]
    assert main([str(argument) for argument in made]) == 0
    return folder / "bank"


@pytest.fixture
def bank(made_once, tmp_path):
    return Path(shutil.copytree(made_once, tmp_path / "bank"))


def documents(folder):
    return {info.document_id: info.num_tokens for info in MemoryBank.load(folder).documents()}


def test_files_become_documents(bank, files):
    assert documents(bank) == {path.name: len(path.read_bytes()) for path in files}


def test_a_bank_is_extended_by_the_model_that_wrote_it(bank, files, run):
    files[0].write_text("Something new, of another length.")
    code, out, _ = run("memorize", files[0], "--bank", bank, "--id", "three", "--json")
    assert code == 0
    assert json.loads(out)["written_tokens"] == {"three": 33}
    assert documents(bank)["three"] == 33
    assert len(documents(bank)) == 3


def test_a_known_document_is_refused_or_replaced(bank, files, run):
    before = documents(bank)
    files[0].write_text("A new version.")
    code, _, error = run("memorize", files[0], "--bank", bank)
    assert code == 2
    assert "already holds a document 'one.txt'; leave it out, use `--replace`" in error
    assert documents(bank) == before
    assert run("memorize", files[0], "--bank", bank, "--replace")[0] == 0
    assert documents(bank) == {**before, "one.txt": 14}


def test_a_full_bank_says_what_it_dropped(backbone_folder, files, tmp_path, run):
    folder = tmp_path / "small"
    code, _, error = run("memorize", *files, "--bank", folder, "--model", backbone_folder, "--capacity", 160)
    assert code == 0
    assert "the bank is full at 160 tokens" in error
    infos = {info.document_id: info for info in MemoryBank.load(folder).documents()}
    assert infos["two.txt"].first_resident_token == 0
    assert "one.txt" not in infos or infos["one.txt"].first_resident_token > 0


def test_generate_streams_or_answers_a_program(bank, run):
    options = ("--prompt", "the cat", "--max-new-tokens", 6, "--bank", bank)
    code, out, _ = run("generate", *options, "--json", "--show-reads")
    assert code == 0
    result = json.loads(out)
    assert result["new_tokens"] == 6
    assert result["reads"][0]["document_id"] in ("one.txt", "two.txt")
    assert 0 < result["reads"][0]["share"] < 1
    code, out, _ = run("generate", *options, "--show-reads")
    assert code == 0
    assert out.startswith("the cat" + result["text"])
    assert "Read most" in out
    warm = ("--json", "--temperature", 1.5, "--seed", 3)
    again = [json.loads(run("generate", *options, *warm)[1])["text"] for _ in range(2)]
    assert again[0] == again[1] != result["text"]


def test_a_saved_side_network_is_a_model(backbone_folder, files, tmp_path, run):
    from longmem.model.modeling import LongMemForCausalLM

    model = LongMemForCausalLM.from_backbone(backbone_folder, chunk_size=2, segment_length=32)
    model.save_pretrained(tmp_path / "model")
    assert run("memorize", files[0], "--bank", tmp_path / "bank", "--model", tmp_path / "model")[0] == 0
    assert MemoryBank.load(tmp_path / "bank").chunk_size == 2
    (tmp_path / "prompt.txt").write_text("the cat")
    prompt = ("--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 2)
    assert run("generate", "--bank", tmp_path / "bank", *prompt)[0] == 0
    code, _, error = run("generate", "--bank", tmp_path / "bank", *prompt, "--model", backbone_folder)
    assert code == 2
    assert "differ for good: `chunk_size` 2 and 4" in error


def test_the_default_model_is_the_trained_side_network(files, tmp_path, run, monkeypatch):
    """Its bank remembers the packaged name; what an untrained side network with other settings wrote is refused."""
    from longmem.model.modeling import LongMemForCausalLM

    monkeypatch.chdir(tmp_path)
    trained = save_tiny_trained(tmp_path, monkeypatch, segment_length=64, memory_layers=[1, 2])
    assert run("memorize", files[0], "--bank", "bank")[0] == 0
    assert json.loads(Path("bank/model.json").read_text()) == {"model": NAME}
    trained.save_pretrained(NAME)  # a folder of that name is another thing
    assert run("memorize", files[1], "--bank", "bank", "--model", NAME)[0] == 0
    assert json.loads(Path("bank/model.json").read_text()) == {"model": NAME}
    code, out, _ = run("generate", "--bank", "bank", "--prompt", "the cat", "--max-new-tokens", 4, "--json")
    assert code == 0
    with MemoryBank.open("bank", trained, read_only=True) as bank:
        ids = trained.tokenizer("the cat", return_tensors="pt")["input_ids"]
        found = trained.generate(ids, memory=bank, max_new_tokens=4, do_sample=False)
    # Saved in bfloat16, so that not every token need be the same.
    assert json.loads(out)["text"][0] == trained.tokenizer.decode(found[0, ids.shape[1] :])[0]

    untrained = LongMemForCausalLM.from_backbone(NAME)
    with MemoryBank.for_model(untrained, folder="old") as bank:
        untrained.memorize(bank, "the cat sat on a mat", "a")
    Path("old/model.json").write_text(json.dumps({"model": NAME}))
    code, _, error = run("generate", "--bank", "old", "--prompt", "the cat", "--max-new-tokens", 4)
    assert code == 2
    for words in ("differ for good: ", "`memory_layers` ", "longmem bank export"):
        assert words in error
    assert run("bank", "export", "old.jsonl", "--bank", "old")[0] == 0
    assert run("bank", "add", "old.jsonl", "--bank", "new")[0] == 0
    assert documents("new").keys() == {"a"}
    assert run("generate", "--bank", "new", "--prompt", "the cat", "--max-new-tokens", 4)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["memorize", "none.txt", "--bank", "{bank}"], "none.txt"),
        (["memorize", "{blank}", "--bank", "{bank}"], "blank.txt holds no text"),
        (["memorize", "{binary}", "--bank", "{bank}"], "is not a UTF-8 text file"),
        (["memorize", "{one}", "{one}", "--bank", "{bank}"], "must have different names, got one.txt twice"),
        (["memorize", "{one}", "{two}", "--bank", "{bank}", "--id", "a"], "`--id` names one document, got 2"),
        (["memorize", "{one}", "--bank", "{bank}", "--capacity", "64"], "`--capacity` is set when a bank is made"),
        (["memorize", "{one}", "--bank", "{new}", "--model", "{new}"], "new"),
        (["generate", "--bank", "{new}", "--prompt", "a"], "there is no bank in"),
        (["generate", "--bank", "{bank}", "--prompt", " "], "the prompt must hold some text"),
        (["generate", "--bank", "{bank}", "--prompt", "a", "--max-new-tokens", "0"], "`--max-new-tokens` must be"),
        (["generate", "--bank", "{bank}", "--prompt", "a", "--temperature", "-1"], "`--temperature` must be 0 or more"),
        (["bank", "list", "--bank", "{new}"], "`longmem memorize FILE --bank"),
        (["bank", "delete", "one.txt", "--bank", "{new}"], "there is no bank in"),
    ],
)
def test_errors_are_one_line_and_change_nothing(arguments, message, bank, files, tmp_path, run):
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    places = {"bank": bank, "one": files[0], "two": files[1], "new": tmp_path / "new"}
    places |= {"blank": tmp_path / "blank.txt", "binary": tmp_path / "binary.txt"}
    before = documents(bank)
    code, _, error = run(*(argument.format(**places) for argument in arguments))
    assert code == 2
    assert error.startswith("longmem: ") or "\nlongmem: " in error
    assert message in error
    assert "Traceback" not in error
    assert documents(bank) == before
    assert not (tmp_path / "new").exists()


def test_debug_shows_where_an_error_came_from(tmp_path, run):
    with pytest.raises(ValueError, match="there is no bank"):
        run("bank", "list", "--bank", tmp_path / "new", "--debug")


def test_two_writers_do_not_meet(bank, files, run):
    with MemoryBank.open(bank):
        code, _, error = run("memorize", files[0], "--bank", bank, "--replace")
        assert run("generate", "--bank", bank, "--prompt", "the cat", "--max-new-tokens", 2)[0] == 0
    assert code == 2
    assert "somebody is writing the bank" in error
    assert run("memorize", files[0], "--bank", bank, "--replace")[0] == 0


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    assert command[0] == "official" or "longmem " + command[0] in told.split("examples:")[1]


ANSWERED_WITHOUT_WORK = {
    "--help": 0,
    "--version": 0,
    "": 2,
    "memorise": 2,
    "generate --bank memory --prompt Chapter --max-token 3": 2,
    "bank tune --help": 0,
    "demo --help": 0,
    "train --help": 0,
    "train python-manuel": 2,
    "eval --list": 0,
    "eval --help": 0,
    "eval": 2,
    "eval qualty data=q.jsonl": 2,
    "report": 2,
}


@pytest.mark.parametrize("line", ANSWERED_WITHOUT_WORK)
def test_what_needs_no_work_is_answered_at_once(line):
    """Nothing heavy is imported, and the whole process takes less than half a second of a core."""
    code = (
        "import sys, time\nfrom longmem.cli.main import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as stop:\n    code = stop.code\n"
        "print(code, time.process_time(), *sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    answer = subprocess.run([sys.executable, "-c", code, *line.split()], capture_output=True, text=True, check=True)
    exit_code, seconds, *modules = answer.stdout.splitlines()[-1].split()
    assert int(exit_code) == ANSWERED_WITHOUT_WORK[line]
    assert "argparse" in modules
    assert not {"torch", "transformers", "rich", "faiss", "numpy", "datasets", "matplotlib"} & set(modules)
    assert float(seconds) < 0.5
    assert "Traceback" not in answer.stderr


WOULD_DO_NOTHING = {
    "chat --json": "--json",
    "bank find cat --bank memory --by words --model smollm2-135m": "--model",
    "cluster start notes --folder shards --refresh lazy": "--refresh",
    "cluster start notes --folder shards --model smollm2-135m": "--model",
    "generate --bank memory --prompt cat --encoding utf-8": "--encoding",
}


@pytest.mark.parametrize("line", WOULD_DO_NOTHING)
def test_an_option_that_would_do_nothing_is_refused(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    assert f"`{WOULD_DO_NOTHING[line]}` must" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


COMPLETED_BY = {
    "bash": """eval "$(register-python-argcomplete longmem)"
        COMP_LINE="longmem mem" COMP_POINT=11 COMP_TYPE=9 COMP_CWORD=1; COMP_WORDS=(longmem mem)
        _python_argcomplete longmem mem longmem; echo "${COMPREPLY[@]}" """,
    "fish": "register-python-argcomplete --shell fish longmem | source; complete -C 'longmem mem'",
    "zsh": """autoload -U compinit && compinit -u -D; eval "$(register-python-argcomplete longmem)"
        _describe() { print -l ${(P)2} }
        words=(longmem mem) CURRENT=2 BUFFER="longmem mem" CURSOR=11 service=longmem; _python_argcomplete longmem""",
}


@pytest.mark.parametrize("shell", COMPLETED_BY)
def test_a_shell_completes_commands(shell):
    pytest.importorskip("argcomplete")
    program = shutil.which(shell)
    folder = Path(sys.executable).parent
    if program is None or not (folder / "longmem").is_file() or not (folder / "register-python-argcomplete").is_file():
        pytest.skip(f"no {shell}, or no installed command")
    found = subprocess.run(
        [program, "-c", COMPLETED_BY[shell]],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
    )
    assert "memorize" in found.stdout, found.stderr


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"longmem {longmem.__version__}\n"
