"""Text and settings from somebody else: a terminal shows them and does not obey, and a file of settings has a size."""

from __future__ import annotations

import io
import json
import warnings

import pytest

from longmem.cli.common import print_json
from longmem.cli.main import main
from longmem.console import PlainTable, SafeConsole
from longmem.errors import printable
from longmem.settings import read_settings
from longmem.training.settings import TrainingSettings

OBEYED = ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\x07", "\x08", "\x00", "\x7f", "\u202e", "\u2066", "\ud800", "\r"]


@pytest.mark.parametrize("text", OBEYED)
def test_what_a_terminal_would_obey_is_shown(text, capsys):
    shown = printable(f"a{text}b")
    assert shown.startswith("a")
    assert shown.endswith("b")
    assert all(each.isprintable() for each in shown)
    written = io.StringIO()
    console = SafeConsole(file=written, width=200, force_terminal=True, color_system=None)
    console.print(f"a{text}b", PlainTable([["name"], [f"a{text}b"]]), markup=False)
    assert all(each.isprintable() or each == "\n" for each in written.getvalue())
    print_json({"name": f"a{text}b"})
    out = capsys.readouterr().out
    assert json.loads(out) == {"name": f"a{text}b"}
    assert all(each.isprintable() or each == "\n" for each in out)


@pytest.mark.parametrize(
    "text", ["naïve 東京 🙂", "line\nline\ttab", "नमस्ते\u200d", "א\u200fב", "👩\u200d🚀", "a\u00a0b"]
)
def test_what_people_write_stays(text):
    assert printable(text) == text


def test_an_error_that_names_a_hostile_file_is_safe(capsys):
    assert main(["report", "results\x1b[2J"]) == 2
    assert "\x1b" not in capsys.readouterr().err


BILLION = "\n".join(["a0: &a0 [1, 1]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BILLION, r"settings must be written out, got the alias `\*a0` in line 2 of '.*run\.yaml'"),
        ("a: &a [*a]", r"got the alias `\*a` in line 1"),
        ("data: &d {train: x}\nmodel: {<<: *d}", r"got the alias `\*d` in line 2"),
        ("[" * 20_000, "must be YAML"),
        ("a: !!python/object/apply:os.system [ls]", "must be YAML"),
        ("output: \x00", "must be YAML"),
        ("seed: 010", r"must have plain decimal numbers, got 010 in line 1 of '.*run\.yaml'"),
        ("seed: 1:30", "must have plain decimal numbers, got 1:30"),
        ("seed: -1:30.5", "must have plain decimal numbers, got -1:30.5"),
        ("seed: !!int x", "must be YAML"),
        ("seed: !!float x", "must be YAML"),
        ("seed: !!timestamp x", "must be YAML"),
        ("seed: 2001-99-99", "must be YAML"),
        ("seed: " + "9" * 5000, "must be YAML"),
        ("? [a]\n: 1", "must be YAML"),
        ("1: 2", "`1` is not a setting of this run"),
        ("null: 2", "`None` is not a setting of this run"),
        ("x" * (1 << 21), "must have at most 1,048,576 bytes"),
    ],
    ids=[
        *("billion", "itself", "merged", "deep", "code", "control", "octal", "sixties", "sixties with a point"),
        *(
            "no integer",
            "no float",
            "no time",
            "no date",
            "digits",
            "key",
            "number for a name",
            "nothing for a name",
            "large",
        ),
    ],
)
def test_settings_are_bounded_and_hold_no_aliases(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_settings(TrainingSettings, path)


def test_warnings_of_a_command_are_safe(tmp_path, monkeypatch):
    before, shown = warnings.formatwarning, []

    def run(_):
        shown.append(warnings.formatwarning(f"there is {OBEYED[0]}", UserWarning, f"{OBEYED[0]}.py", 1, ""))

    monkeypatch.setattr("longmem.cli.report.run", run)
    assert main(["report", str(tmp_path)]) == 0
    assert "there is \\x1b[2J" in shown[0]
    assert "\x1b" not in shown[0]
    assert warnings.formatwarning is before


def test_the_name_of_a_file_that_is_left_out_is_safe(tmp_path, capsys):
    (tmp_path / f"image{OBEYED[0]}.png").write_bytes(b"\x89PNG\0")
    main(["memorize", str(tmp_path), "--bank", str(tmp_path / "bank")])
    assert "\x1b" not in capsys.readouterr().err
