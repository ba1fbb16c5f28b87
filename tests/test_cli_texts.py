"""What commands read and say: folders, standard input, encodings, documents, long texts, errors, narrow terminals."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tracemalloc
import types
import zipfile
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from kept_fast import fast
from rich.console import Console
from tiny_models import save_tiny_backbone, some_text

from longmem.cli.main import main
from longmem.cli.texts import find_files, looks_like_text, read_text, read_texts, readable_name
from longmem.console import PlainTable
from longmem.evaluation.intervals import clustered_mean, perplexity_estimate
from longmem.memory import MemoryBank
from longmem.serving.engine import chat_text


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_backbone(tmp_path_factory.mktemp("backbone")))


@pytest.fixture
def bank(tmp_path, backbone, run) -> Path:
    (tmp_path / "one.txt").write_text(some_text(30))
    assert (
        run("memorize", tmp_path / "one.txt", "--bank", tmp_path / "bank", "--model", backbone, "--tag", "cats")[0] == 0
    )
    return tmp_path / "bank"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with two files of one name, source code, hidden files and bytes."""
    folder = tmp_path / "project"
    for name in ("README.md", "docs/README.md", "src/main.py", ".git/config"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"This is {name}.\n")
    (folder / "logo.png").write_bytes(b"\x89PNG\r\n\0\0\xff")
    return folder


def documents(folder: Path) -> dict[str, str | None]:
    with MemoryBank.open(folder, read_only=True) as bank:
        return {info.document_id: bank.text(info.document_id) for info in bank.documents()}


def test_a_folder_becomes_documents_named_by_their_paths(project, tmp_path, backbone, run):
    code, _, told = run("memorize", project, "--bank", tmp_path / "bank", "--model", backbone)
    assert code == 0
    assert "1 files hold no text and are left out" in told
    assert documents(tmp_path / "bank").keys() == {"README.md", "docs/README.md", "src/main.py"}
    code, _, _ = run("memorize", project, "--glob", "*.py", "--bank", tmp_path / "code", "--model", backbone)
    assert code == 0
    assert documents(tmp_path / "code") == {"src/main.py": "This is src/main.py.\n"}


def test_files_of_one_name_bear_their_paths(project, monkeypatch):
    monkeypatch.chdir(project)
    found, _ = find_files([Path("README.md"), Path("docs/README.md"), Path("src/main.py")])
    assert [name for _, name in found] == ["README.md", "docs/README.md", "main.py"]


def test_standard_input_is_a_file(bank, run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"told by another program")))
    assert run("memorize", "-", "--id", "piped", "--bank", bank)[0] == 0
    assert documents(bank)["piped"] == "told by another program"


@pytest.mark.parametrize(
    ("raw", "encoding", "text"),
    [
        (b"\xef\xbb\xbfmarked", None, "marked"),
        ("Übung".encode(), None, "Übung"),
        ("Übung".encode("latin-1"), "latin-1", "Übung"),
        ("Übung".encode("utf-16"), "utf-16", "Übung"),
    ],
)
def test_encodings(raw, encoding, text, tmp_path):
    (tmp_path / "a.txt").write_bytes(raw)
    assert read_text(tmp_path / "a.txt", encoding) == text


@pytest.mark.parametrize(
    ("name", "raw", "encoding", "words"),
    [
        ("a.txt", "Übung".encode("latin-1"), None, "is not a UTF-8 text file"),
        ("a.txt", b"text\0with a zero", None, "zero bytes"),
        ("a.txt", "text".encode("utf-16"), None, "--encoding"),
        ("a.txt", b"text", "latin-x", "must be one that Python knows"),
        ("a.txt", b"text", "", "must be one that Python knows"),
        ("a.txt", b" \n", None, "holds no text"),
        ("a.bin", b"\x7fELF\xff", None, "is not a UTF-8 text file"),
        ("a.pdf", b"%PDF-1.4", None, "longmem-lm[files]"),
        ("a.docx", b"PK\3\4", None, "longmem-lm[files]"),
        ("a.ipynb", b"{}", None, "longmem-lm[files]"),
        ("a.html", b"<p>text</p>", None, "longmem-lm[files]"),
    ],
)
def test_what_is_no_text_is_refused(name, raw, encoding, words, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "markitdown", None)
    (tmp_path / name).write_bytes(raw)
    with pytest.raises((ValueError, ImportError), match=words.replace("[", r"\[")):
        read_text(tmp_path / name, encoding)


def test_documents_are_read_by_their_reader(tmp_path, monkeypatch):
    class Converter:
        def convert(self, file: BinaryIO, info: object) -> object:
            if (name := Path(file.name).name) == "broken.pdf":
                raise KeyError("xref\ntable")
            if name == "none.pdf":
                raise ModuleNotFoundError(name)
            return types.SimpleNamespace(markdown=f"# {name}  \n\n\n\nend")

    names = {"PdfConverter": Converter, "HtmlConverter": Converter}
    library = {"StreamInfo": dict, "MissingDependencyException": ModuleNotFoundError}
    library["converters"] = types.SimpleNamespace(**names)
    monkeypatch.setitem(sys.modules, "markitdown", types.SimpleNamespace(**library))
    for name in ("paper.pdf", "broken.pdf", "none.pdf", "PAGE.HTM"):
        (tmp_path / name).write_bytes(b"<p>bytes</p>")
    assert read_text(tmp_path / "paper.pdf") == "# paper.pdf\n\nend"
    assert read_text(tmp_path / "PAGE.HTM") == "# PAGE.HTM\n\nend"
    assert looks_like_text(tmp_path / "paper.pdf")
    assert read_text(tmp_path / "PAGE.HTM", "utf-8") == "<p>bytes</p>"  # as it stands
    with pytest.raises(ValueError, match=r"broken.pdf can't be read as .pdf: KeyError: 'xref"):
        read_text(tmp_path / "broken.pdf")
    with pytest.raises(ImportError, match=r"what reads .pdf is not installed"):
        read_text(tmp_path / "none.pdf")


def in_zip(path: Path, parts: dict[str, str]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def a_docx(path: Path, text: str) -> None:
    main, package = (
        "http://schemas.openxmlformats.org/wordprocessingml/2006/main",
        "http://schemas.openxmlformats.org/package/2006",
    )
    kind = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"
    paragraphs = "".join(f"<w:p><w:r><w:t>{line}</w:t></w:r></w:p>" for line in text.splitlines())
    types = '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    types += f'<Override PartName="/word/document.xml" ContentType="{kind}"/>'
    in_zip(
        path,
        {
            "[Content_Types].xml": f'<Types xmlns="{package}/content-types">{types}</Types>',
            "_rels/.rels": f'<Relationships xmlns="{package}/relationships">'
            f'<Relationship Id="r" Type="{office}" Target="word/document.xml"/></Relationships>',
            "word/document.xml": f'<w:document xmlns:w="{main}"><w:body>{paragraphs}</w:body></w:document>',
        },
    )


def an_epub(path: Path, text: str) -> None:
    opf = "http://www.idpf.org/2007/opf"
    item = '<item id="a" href="a.xhtml" media-type="application/xhtml+xml"/>'
    in_zip(
        path,
        {
            "mimetype": "application/epub+zip",
            "META-INF/container.xml": '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
            '<rootfile full-path="book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>',
            "book.opf": f'<package xmlns="{opf}"><metadata/><manifest>{item}</manifest>'
            '<spine><itemref idref="a"/></spine></package>',
            "a.xhtml": f'<html xmlns="http://www.w3.org/1999/xhtml"><body><p>{text}</p></body></html>',
        },
    )


def a_pdf(path: Path, text: str) -> None:
    drawn = "BT /F 12 Tf 72 720 Td 14 TL " + " ".join(f"({line}) Tj T*" for line in text.splitlines()) + " ET"
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        "<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R/Resources<</Font<</F 5 0 R>>>>>>",
        f"<</Length {len(drawn)}>>\nstream\n{drawn}\nendstream",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    written, places = "%PDF-1.4\n", []
    for number, each in enumerate(objects, start=1):
        places.append(len(written))
        written += f"{number} 0 obj\n{each}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = f"xref\n0 6\n0000000000 65535 f \n{table}trailer\n<</Size 6/Root 1 0 R>>\nstartxref\n{len(written)}\n%%EOF\n"
    path.write_text(written + end)


def a_notebook(path: Path, text: str) -> None:
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": text.splitlines(keepends=True)},
        {"cell_type": "code", "metadata": {}, "source": ["boats = 7"], "outputs": [], "execution_count": 1},
    ]
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))


def an_archive() -> bytes:
    with zipfile.ZipFile(written := io.BytesIO(), "w") as archive:
        archive.writestr("a.txt", "a text")
    return written.getvalue()


WRITERS = {
    ".html": lambda path, text: path.write_text(f"<html><body><script>code()</script><p>{text}</p></body></html>"),
    ".ipynb": a_notebook,
    ".docx": a_docx,
    ".epub": an_epub,
    ".pdf": a_pdf,
}


@pytest.mark.parametrize("ending", WRITERS)
def test_a_real_document_is_read_and_a_broken_one_refused_in_a_sentence(ending, tmp_path):
    pytest.importorskip("markitdown")
    lines = ["My locker code is 4417.", "The ferry leaves at nine."]
    document = tmp_path / f"note{ending}"
    WRITERS[ending](document, "\n".join(lines))
    text = read_text(document)
    assert all(line in text for line in lines)
    assert "code()" not in text
    assert "PK" not in text
    whole = document.read_bytes()
    for broken in (
        b"",
        b"\0\0",
        b"\x7fELF\0\0\xff",
        *([] if ending == ".html" else [whole[: len(whole) // 3], b"a text", b"PK\3\4no", an_archive()]),
    ):
        document.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"note\{ending}") as refused:
            read_text(document)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["documents.jsonl", "documents.json", "backup"])
def test_an_export_is_one_whatever_it_is_called(name, bank, tmp_path, backbone, run):
    assert run("bank", "export", tmp_path / name, "--bank", bank)[0] == 0
    assert run("memorize", tmp_path / name, "--bank", tmp_path / "again", "--model", backbone)[0] == 0
    assert documents(tmp_path / "again") == documents(bank)


def test_a_long_text_is_looked_at_and_not_copied(tmp_path):
    from longmem.cli.memorize import pieces_of

    (tmp_path / "long.txt").write_text("a line of text\n" * 500_000)
    size = (tmp_path / "long.txt").stat().st_size
    tracemalloc.start()
    try:
        (text,) = read_texts([tmp_path / "long.txt"])
        assert sum(stop - start for start, stop in pieces_of(text.text)) == size
        assert tracemalloc.get_traced_memory()[1] < 2.5 * size  # the bytes and the text
    finally:
        tracemalloc.stop()


def test_a_long_text_is_committed_in_pieces_and_gone_on_with(tmp_path, backbone, run, monkeypatch):
    from longmem.cli import memorize
    from longmem.model.modeling import LongMemForCausalLM

    monkeypatch.setattr(memorize, "PIECE", 400)
    text = "\n".join(some_text(10, seed) for seed in range(40))
    (tmp_path / "long.txt").write_text(text)
    command = ("memorize", tmp_path / "long.txt", "--bank", tmp_path / "bank", "--model", backbone, "--quiet")
    encode, calls = LongMemForCausalLM.memorize, []

    def stopped(self, *given, **options):
        calls.append(options)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, *given, **options)

    monkeypatch.setattr(LongMemForCausalLM, "memorize", stopped)
    assert run(*command)[0] == 130
    kept = documents(tmp_path / "bank")["long.txt"]
    assert 0 < len(kept) < len(text)
    assert text.startswith(kept)
    assert run(*command)[0] == 0
    assert documents(tmp_path / "bank") == {"long.txt": text}
    assert len(calls) < 2 * len(list(memorize.pieces_of(text)))
    code, _, error = run(*command)
    assert code == 2
    assert "already holds a document 'long.txt'" in error


@pytest.mark.parametrize(
    ("option", "value", "other"),
    [("capacity", 40_000, 80_000), ("index", "flat", "auto"), ("eviction", "lru", "fifo"), ("refresh", "lazy", "eager")]
    + [("storage-dtype", "float32", "int8")],
)
def test_the_command_that_made_a_bank_goes_on_with_it(tmp_path, backbone, run, option, value, other):
    texts = [tmp_path / name for name in ("a.txt", "b.txt")]
    for path in texts:
        path.write_text(some_text(9))
    command = ("--bank", tmp_path / "bank", "--model", backbone, f"--{option}")
    assert run("memorize", texts[0], *command, value)[0] == 0
    assert run("memorize", *texts, *command, value)[0] == 0
    assert len(documents(tmp_path / "bank")) == 2
    code, _, error = run("memorize", *texts, *command, other)
    assert code == 2
    assert f"`--{option}` is set when a bank is made, and is {value} of the one that is there, got {other}" in error


@pytest.mark.parametrize("wrong", [("--id", ""), ("--tag", "")])
def test_wrong_labels_make_no_bank(tmp_path, backbone, run, wrong):
    (tmp_path / "a.txt").write_text("the cat")
    assert run("memorize", tmp_path / "a.txt", "--bank", tmp_path / "bank", "--model", backbone, *wrong)[0] == 2
    assert not (tmp_path / "bank").exists()


def test_a_folder_that_holds_its_own_bank(tmp_path, backbone, run):
    (tmp_path / "notes.txt").write_text("the cat sat")
    (tmp_path / "in").mkdir()
    for name in ("bank", "in/bank"):
        assert run("memorize", tmp_path / "notes.txt", "--bank", tmp_path / name, "--model", backbone)[0] == 0
    for pattern in (None, "*"):
        found, passed_over = find_files([tmp_path], pattern)
        assert ([name for _, name in found], passed_over) == (["notes.txt"], [])
    for pattern, words in (("*.json", "must hold"), ("", "must hold"), ("/etc/*", "`--glob` must be a pattern")):
        with pytest.raises(ValueError, match=words):
            find_files([tmp_path], pattern)


def test_a_tilde_is_the_home_folder_in_every_place_that_is_named(tmp_path, monkeypatch, backbone, run):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (home / "a.txt").write_text(some_text(20))
    (home / "model").symlink_to(backbone)
    assert run("memorize", "~/a.txt", "--bank=~/bank", "--model=~/model")[0] == 0
    asked = ("generate", "--bank=~/bank", "--prompt-file=~/a.txt", "--max-new-tokens", "1", "--explain=~/why.html")
    assert run(*asked)[0] == 0
    assert run("bank", "export", "~/out.jsonl", "--bank=~/bank")[0] == 0
    assert {"a.txt", "bank", "why.html", "out.jsonl"} <= {path.name for path in home.iterdir()}
    (home / "eval.yaml").write_text("output: ~/results\nmodel: ~/absent\n")
    assert str(home / "absent") in run("eval", "recall", "--config=~/eval.yaml")[2]
    assert not list(here.iterdir())


@pytest.mark.parametrize("place", ["{folder}", "{folder}/absent/why.html", "", "{bank}/catalogue.sqlite", "{bank}/new"])
@pytest.mark.parametrize("command", [("generate", "--prompt", "x", "--explain"), ("bank", "export")])
def test_where_a_page_cant_be_written_is_told_before_the_work(bank, tmp_path, run, place, command, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(*command, place.format(folder=tmp_path, bank=bank), "--bank", bank)
    assert "it must name a file" in capsys.readouterr().err


def test_pieces_are_the_text(monkeypatch):
    from longmem.cli import memorize

    monkeypatch.setattr(memorize, "PIECE", 50)
    for text in (some_text(200), "x" * 333, "a" + " " * 500 + "b", "a\n" * 99, "a" * 60 + " " * 200):
        pieces = list(memorize.pieces_of(text))
        assert "".join(text[start:stop] for start, stop in pieces) == text
        assert not any(text[start:stop].isspace() for start, stop in pieces)


def test_generate_reads_what_it_is_told(bank, tmp_path, run):
    (tmp_path / "two.txt").write_text(some_text(30, 1))
    assert run("memorize", tmp_path / "two.txt", "--bank", bank, "--tag", "dogs")[0] == 0
    asked = ("generate", "--bank", bank, "--prompt", "the cat", "--max-new-tokens", 8, "--json")
    whole, first, second = (json.loads(run(*asked, *more)[1]) for more in ((), ("--id", "one.txt"), ("--tag", "dogs")))
    assert len({each["text"] for each in (whole, first, second)}) > 1
    reads = json.loads(run(*asked, "--tag", "dogs", "--show-reads")[1])["reads"]
    assert {read["document_id"] for read in reads} == {"two.txt"}
    letter = whole["text"][2]
    stopped = json.loads(run(*asked, "--stop", letter)[1])["text"]
    assert stopped == whole["text"][: whole["text"].index(letter) + 1]


def test_a_message_is_continued_in_the_form_of_a_talk(bank, run):
    """The tiny tokenizer has no chat template: so a talk is lines that name who speaks, as in `chat` and `serve`."""
    asked = ("generate", "--bank", bank, "--max-new-tokens", "12", "--json")
    by_hand = chat_text(types.SimpleNamespace(chat_template=None), [{"role": "user", "content": "the cat"}])
    answers = [
        json.loads(run(*asked, "--prompt", prompt, *more)[1])["text"]
        for prompt, *more in (["the cat", "--chat"], [by_hand], ["the cat"])
    ]
    assert answers[0] == answers[1] != answers[2]
    shown = [run(*asked[:-1], "--prompt", "the cat", *more)[1] for more in (["--chat"], [])]
    assert shown[0].strip().startswith(answers[0].strip()[:4])
    assert "the cat" not in shown[0]
    assert shown[1].startswith("the cat")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "nan"], "`--temperature` must be 0 or more"),
        (["--temperature", "inf"], "`--temperature` must be 0 or more"),
        (["--temperature", "1e-40"], "`--temperature` must be 0 or more"),
        (["--stop", "\udce9"], "`--stop` must be text in the encoding of this terminal"),
        (["--tag", "dgs"], "`tags` must be one of the known names"),
        (["--id", "one.tx"], "Did you mean `one.txt`?"),
        (["--stop", ""], "`--stop` must be some text"),
        (["--max-new-tokens", "0"], "`--max-new-tokens` must be at least 1"),
        (["--device", "cuda:99"], "`--device` must be a device of this machine"),
        (["--encoding", "latin-1"], "`--encoding` must come with `--prompt-file`"),
        (["--seed", str(2**70)], "`--seed` must be an integer"),
    ],
)
def test_wrong_options_of_generate(arguments, words, bank, run):
    code, out, error = run("generate", "--bank", bank, "--prompt", "a", *arguments, "--json")
    assert code == 2
    assert words in error
    assert error.count("\n") <= 1 + error.count("Loading")
    assert words in json.loads(out)["error"]


def test_errors_are_json_for_a_program(tmp_path, run, capsys):
    code, out, error = run("bank", "list", "--bank", tmp_path / "none", "--json")
    assert code == 2
    assert json.loads(out) == {"error": error.removeprefix("longmem: ").rstrip("\n")}
    with pytest.raises(SystemExit) as stop:
        main(["bank", "list", "--json"])
    assert stop.value.code == 2
    out, error = capsys.readouterr()
    assert json.loads(out)["error"].endswith("the following arguments are required: --bank")
    assert error.startswith("usage: longmem bank list")


@pytest.mark.parametrize("wrong", ["ome.txt", "ONE.TXT", "gone.txt"])
def test_a_file_that_is_not_there_is_offered_by_its_right_name(wrong, bank, run):
    (bank.parent / "gone.txt").symlink_to("away.txt")
    code, _, error = run("memorize", bank.parent / wrong, "--bank", bank)
    assert code == 2
    assert ("away.txt, to which the link" if wrong == "gone.txt" else "Did you mean `one.txt`?") in error


@pytest.mark.parametrize("raised", [IndexError("index out of range"), MemoryError(), AssertionError(), KeyError("x")])
def test_no_traceback_without_debug(raised, bank, run, monkeypatch):
    from longmem.cli import common

    def fail(*given, **options):
        raise raised

    monkeypatch.setattr(common, "open_bank", fail)
    code, _, error = run("bank", "info", "--bank", bank)
    assert code == (2 if isinstance(raised, MemoryError) else 1)
    assert error.startswith("longmem: ")
    assert "Traceback" not in error
    with pytest.raises(type(raised)):
        run("bank", "info", "--bank", bank, "--debug")


def test_quiet_prints_results_alone(bank, run):
    assert run("bank", "pin", "one.txt", "--bank", bank, "--quiet") == (0, "", "")
    assert "one.txt" in run("bank", "list", "--bank", bank, "--quiet")[1]


@pytest.mark.parametrize("encoding", fast(0, ["ascii", "latin-1", "cp1252", "utf-8"]))
def test_the_encoding_of_the_terminal_changes_nothing_that_is_done(encoding, bank, tmp_path, backbone):
    names = ["猫.txt", "café.txt", "🐱.txt"]
    for name in names:
        (tmp_path / name).write_text(some_text(5))
    code = (
        "import sys; from longmem.cli.main import main\n"
        f"names, bank = {names!r}, {str(bank)!r}\n"
        "for line in (['memorize', *names, '--bank', bank], ['bank', 'list', '--bank', bank],"
        " ['bank', 'pin', *names, '--bank', bank],"
        " ['bank', 'list', '--json', '--bank', bank]):\n"
        "    if code := main(line):\n        sys.exit(code)\n"
    )
    env = {**os.environ, "PYTHONIOENCODING": encoding, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"one.txt", *names} == documents(bank).keys()
    listed = json.loads("{" + done.stdout.decode(encoding).partition("\n{")[2])
    assert {each["document_id"] for each in listed["documents"]} == {"one.txt", *names}


def test_a_name_that_is_no_text_is_written_out():
    assert readable_name(os.fsdecode(b"caf\xe9.txt")) == r"caf\xe9.txt"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_rows_show_their_names_at_any_width(width):
    systems = ["the backbone alone, with its own window", "the side network, with a wrong memory", "on"]
    rows = [["", *(f"measure {number}, in percent" for number in range(6))]]
    rows += [[name, *("12.345 (11.111 to 13.333)" for _ in range(6))] for name in systems]
    out = io.StringIO()
    Console(file=out, width=width, soft_wrap=True, highlight=False).print(PlainTable(rows))
    told = out.getvalue()
    words = " ".join(told.split())
    assert words.count("12.345 (11.111 to 13.333)") == 18
    assert all(name.split()[-1] in told for name in systems)
    if width >= 80:
        assert all(name in told for name in systems)
        assert max(map(len, told.splitlines())) <= width


@pytest.mark.slow
def test_intervals_of_many_groups_take_little_memory():
    """Ten thousand groups in ten thousand resamples are 10^8 draws; all at once they would be 800 MB, and several times."""
    code = (
        "import resource, torch\nfrom longmem.evaluation.intervals import clustered_mean\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "mean, low, high = clustered_mean([float(i % 7) for i in range(10_000)], [str(i) for i in range(10_000)])\n"
        "assert low < mean < high\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 200  # MB


def test_batches_of_resamples_are_the_resamples(monkeypatch):
    from longmem.evaluation import intervals

    (whole,) = intervals.resamples(37, seed=3)
    expected = clustered_mean(list(range(60)), [str(i // 3) for i in range(60)])
    monkeypatch.setattr(intervals, "DRAWN_AT_ONCE", 100)
    assert torch.equal(torch.cat([*intervals.resamples(37, seed=3)]), whole)
    assert clustered_mean(list(range(60)), [str(i // 3) for i in range(60)]) == pytest.approx(expected, abs=1e-12)


def test_a_perplexity_beyond_all_numbers_is_infinite():
    assert perplexity_estimate(torch.tensor([800.0, 900.0])) == (float("inf"),) * 3
    assert perplexity_estimate(torch.tensor([0.0, 0.0])) == (1.0, 1.0, 1.0)


# Command lines, with {bank} and {file} that are there and {none} that is not; what is said of each.
WRONG_LINES = {
    "memorize {none} --bank {bank}": "there is no file",
    "memorize - {file} - --bank {bank}": "must be named once, got it 2 times",
    "memorize {file} --bank {bank} --replace --glob *.md": "`--glob` must come with a folder",
    "memorize {file} --bank {bank} --replace --encoding latin-x": "`--encoding` must be one that Python knows",
    "memorize {file} --bank {bank} --replace --device gpu": "`--device` must be a device of this machine",
    "memorize {file} --bank {bank} --replace --index flat": "`--index` is set when a bank is made",
    "memorize {file} --bank {none} --index flatt": "Did you mean `flat`?",
    "memorize {file} --bank {none} --capacity 0": "`capacity_tokens` must be an integer of at least 1",
    "memorize {file} --bank {none} --capacity 1000000000000000000": "`capacity_tokens` must be an integer",
    "memorize {file} --bank {none} --capacity ten": "invalid int value: 'ten'",
    "memorize {file} --bank {none} --eviction lru:x=1": "'lru' has no settings",
    "memorize {file} --bank {none} --eviction ttl:seconds=nan": "`seconds` of eviction 'ttl' must be",
    "memorize {file} --bank {none} --storage-dtype float8": "`storage_dtype` must be one of",
    "memorize {file} --bank {none} --refresh soon": "`refresh` must be one of",
    "memorize {file} --bank": "expected one argument",
    "memorize --bank {bank}": "the following arguments are required: FILE",
    "memorise {file} --bank {bank}": "invalid choice: 'memorise'",
    "bank add {file} {file} --bank {bank}": "must have different names",
    "bank append {none} --id one.txt --bank {bank}": "there is no file",
    "bank append {file} --id two.txt --bank {bank}": "Did you mean `one.txt`?",
    "bank update - --bank {bank}": "`--id` must name the document",
    "bank update {file} --id two.txt --bank {bank}": "Did you mean `one.txt`?",
    "bank delete two.txt --bank {bank}": "Did you mean `one.txt`?",
    "bank tag two.txt --tag x --bank {bank}": "`document_id` must name a document",
    "bank supersede one.txt --by two.txt --bank {bank}": "`by` must name a document",
    "bank supersede one.txt --by one.txt --bank {bank}": "`by` must be another document",
    "bank list --bank {none}": "there is no bank in",
    "bank tune --bank {bank} --recall nan": "`--recall` must be above 0",
    "bank tune --bank {bank} --num-queries 0": "`--num-queries` must be at least 1",
    "bank tune --bank {bank} --layer 9": "`--layer` must be a memory layer",
    "bank tune --bank {bank} --queries {none}": "there is no file",
    "bank refresh --bank {bank} --budget-tokens 0": "`--budget-tokens` must be at least 1",
    "bank refresh --bank {bank} --policy soon": "`refresh` must be one of",
    "generate --bank {bank}": "one of the arguments --prompt --prompt-file is required",
    "generate --bank {bank} --prompt a --max-new-tokens 0": "`--max-new-tokens` must be at least 1",
    "generate --bank {bank} --prompt a --temperature nan": "`--temperature` must be 0 or more",
    "generate --bank {bank} --prompt a --tag x": "`tags` must be one of the known names",
    "generate --bank {bank} --prompt a --id x": "`document_ids` must name a document",
    "generate --bank {bank} --prompt a --device cuda:99": "`--device` must be a device of this machine",
    "generate --bank {bank} --prompt-file {none}": "there is no file",
    "demo --windows 0": "`windows` must be at least 1",
    "demo --file {none}": "`file` must be a text file",
    "demo --device cuda:99": "`--device` must be a device of this machine",
    "heads m step=3 --texts {none} --output {none}": "`step` is not a setting of this run. Did you mean `steps`?",
    "heads m steps --texts {none} --output {none}": "must have the form section.key=value",
    "heads m steps=many --texts {none} --output {none}": "`steps` must be an integer",
    "heads m --texts {none} --output {bank}": "`--output` must be a new folder",
    "eval qualty": "Did you mean `quality`?",
    "eval recall distanc=3": "`distanc` is not a setting",
    "eval recall --config {none}": "must be a YAML file",
    "train books data.lanse=3": "`data.lanse` is not a setting of this run. Did you mean `data.lanes`?",
    "train python-manual data.lanes=many": "`data.lanes` must be an integer",
    "train python-manual optimization.steps=0": "`optimization.steps` must be",
    "train boks": "Did you mean `books`?",
    "report {none}": "must be results of finished evaluations",
}


def test_wrong_command_lines_are_refused_before_a_model_is_opened(bank, tmp_path, run, capsys, monkeypatch):
    from longmem.model import opening

    monkeypatch.setattr(opening, "open_model", None)
    monkeypatch.chdir(tmp_path)
    before, there = documents(bank), sorted(os.listdir())
    answers = {}
    for line, words in WRONG_LINES.items():
        places = {"bank": bank, "file": tmp_path / "one.txt", "none": tmp_path / "none"}
        try:
            code, _, error = run(*(part.format(**places) for part in line.split()))
        except SystemExit as stop:
            code, error = stop.code, capsys.readouterr().err
        told = [each for each in error.splitlines() if each.startswith("longmem")]
        if code != 2 or words not in error or len(told) != 1 or "Traceback" in error:
            answers[line] = code, error
    assert answers == {}
    assert (documents(bank), sorted(os.listdir())) == (before, there)
