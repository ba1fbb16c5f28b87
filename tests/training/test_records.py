"""The log of a run: what is written is read, what was cut off is dropped, a resumed run writes on as if never stopped."""

from __future__ import annotations

import dataclasses
import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from longmem.training.progress import training_progress
from longmem.training.records import RunLog, StepRecord, ValidationRecord, read_log


def step(number: int, **changes: object) -> StepRecord:
    values = dict(step=number, epoch=number / 10, loss=2.5 - number / 100, backbone_loss=2.75, gain=0.25 + number / 100)
    values |= dict(learning_rate=2e-4, gradient_norm=0.9, tokens=4096, memory_tokens=8192.0, memory_share=0.125)
    values |= dict(bias_mean=-1.0, seconds=2.0, tokens_per_second=2048.0)
    return StepRecord(**(values | changes))


def validation(number: int) -> ValidationRecord:
    return ValidationRecord(number, 2.75, 2.74, 2.6, 2.8, 4096)


RECORDS = [
    step(1),
    step(2),
    validation(2),
    step(3),
    step(4, backbone_loss=None, gain=None, memory_share=None),
    validation(4),
]


def write(folder, records, **options):
    with RunLog(folder, **options) as log:
        for record in records:
            log.write(record)
    return folder / "log.jsonl"


def test_what_is_written_is_read(tmp_path):
    path = write(tmp_path, RECORDS)
    log = read_log(path)
    assert log.steps == [record for record in RECORDS if isinstance(record, StepRecord)]
    assert log.validations == [validation(2), validation(4)]
    assert read_log(tmp_path) == log


def test_a_line_is_there_when_write_returns(tmp_path):
    with RunLog(tmp_path / "new" / "run") as log:
        for count, record in enumerate(RECORDS[:2], start=1):
            log.write(record)
            assert len(read_log(tmp_path / "new" / "run").steps) == count


def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path):
    whole = write(tmp_path / "whole", RECORDS).read_text()
    folder = tmp_path / "resumed"
    stopped = write(folder, [*RECORDS[:4], step(4, loss=9.0)])  # the step after the checkpoint comes again
    write(folder, RECORDS[3:], resume_at=3)
    assert stopped.read_text() == whole
    assert [path.name for path in folder.iterdir()] == ["log.jsonl"]
    write(folder, [], resume_at=1)
    assert stopped.read_text() == ""


def test_a_last_line_that_was_cut_off_is_dropped(tmp_path):
    path = write(tmp_path, RECORDS[:4])
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    for end in (len(text) - 1, len(text) - len(lines[-1]) // 2, len(text) - len(lines[-1])):
        path.write_text(text[:end])
        assert read_log(path).steps == RECORDS[:2]
        write(tmp_path, [], resume_at=100)
        assert path.read_text() == "".join(lines[:-1])


def test_a_crash_while_a_log_is_rewritten_leaves_it_as_it_was(tmp_path, monkeypatch):
    path = write(tmp_path, RECORDS)
    before = path.read_text()

    def crash(*_):
        raise OSError("no power")

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(OSError, match="no power"):
        RunLog(tmp_path, resume_at=2)
    assert path.read_text() == before


def test_bad_logs_are_explained(tmp_path):
    path = write(tmp_path, RECORDS)
    with pytest.raises(ValueError, match="holds the log of another run; resume that run"):
        RunLog(tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    for damaged in ("{\n", "[]\n", '{"kind": "other"}\n', '{"kind": "step", "step": 1}\n', lines[1][:20] + "\n"):
        path.write_text("".join([lines[0], damaged, *lines[2:]]))
        with pytest.raises(ValueError, match="line 2 of .* must be a record of a training run"):
            read_log(path)
    with pytest.raises(ValueError, match="which is no file"):
        read_log(tmp_path / "none.jsonl")


def test_tensorboard_gets_the_same_numbers_and_forgets_steps_that_come_again(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, [*RECORDS[:4], step(4, loss=9.0)], tensorboard=True)
    write(tmp_path, RECORDS[3:], tensorboard=True, resume_at=3)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {event.step: event.value for event in events.Scalars("training/loss")}
    assert found == {record.step: pytest.approx(record.loss) for record in read_log(tmp_path).steps}
    assert [event.step for event in events.Scalars("training/gain")] == [1, 2, 3]
    assert [event.step for event in events.Scalars("validation/wrong")] == [2, 4]
    assert {name for name in events.Tags()["scalars"] if "step" in name.split("/")} == set()


def test_without_tensorboard_the_way_out_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        RunLog(tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()
    write(tmp_path / "run", RECORDS)


def show(records, *, terminal, total=100, **options) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=150, color_system=None)
    with training_progress(console, total, **options) as report:
        for record in records:
            report(record)
    return console.file.getvalue()


def test_without_a_terminal_there_is_a_line_now_and_then():
    every = show([step(n) for n in range(1, 11)], terminal=False, total=10, seconds_between_lines=0.0).splitlines()
    assert len(every) == 10
    few = show([step(n) for n in range(1, 11)], terminal=False, total=10).splitlines()
    assert [line.partition(":")[0] for line in few] == ["step 1/10", "step 10/10"]
    assert "loss 2.445, backbone 2.750, gain +0.305, memory 12.5 %, 2,048 tokens/s" in few[-1]
    assert "min left" in few[0]
    assert "min left" not in few[-1]


def test_on_a_terminal_a_bar_moves():
    text = show([step(41), step(42)], terminal=True, done_steps=40)
    assert "42/100" in text
    assert "gain +0.665" in text
    assert "43/100" not in text


def test_means_are_over_the_last_twenty_steps():
    last = show([step(n, loss=float(n > 20)) for n in range(1, 41)], terminal=False, total=40).splitlines()[-1]
    assert "loss 1.000" in last


def test_what_was_not_computed_is_left_out():
    line = show([dataclasses.replace(RECORDS[4], step=1)], terminal=False)
    assert "loss" in line
    assert not any(word in line for word in ("backbone", "gain", "memory"))


@pytest.fixture
def drawn(monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **kwargs: (figures.append(figure), save(figure, *args, dpi=20))
    )
    return figures


def lines_of(figure) -> dict[str, list[float]]:
    return {
        line.get_label(): line.get_ydata()
        for axes in figure.axes
        for line in axes.get_lines()
        if not line.get_label().startswith("_")
    }


def test_the_curve_has_every_line(tmp_path: Path, drawn):
    from longmem.training.curve import plot_training

    plot_training(tmp_path / "curve.png", [step(n) for n in range(1, 6)], [validation(2), validation(4)])
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    lines = lines_of(drawn[0])
    assert lines["side network"] == pytest.approx([2.49, 2.48, 2.47, 2.46, 2.45])
    assert lines["backbone alone"] == pytest.approx([2.75] * 5)
    assert lines["gain"] == pytest.approx([0.26, 0.27, 0.28, 0.29, 0.30])
    assert lines["attention to memory"] == pytest.approx([12.5] * 5)
    assert lines["memory bias"] == pytest.approx([-1.0] * 5)
    assert lines["memory on: 2.600"] == pytest.approx([2.6, 2.6])
    assert {"backbone: 2.750", "memory off: 2.740", "wrong memory: 2.800"} <= set(lines)


def test_a_curve_counts_tokens_of_steps_that_were_not_logged(tmp_path, drawn):
    from longmem.training.curve import plot_training

    plot_training(tmp_path / "curve.png", [step(1), step(11), step(21)], [validation(16)])
    for axes in drawn[0].axes:
        for line in axes.get_lines():
            if line.get_label() == "side network":
                assert list(line.get_xdata()) == [4096, 11 * 4096, 21 * 4096]
            if line.get_label().startswith("memory on"):
                assert list(line.get_xdata()) == [16 * 4096]


def test_a_curve_leaves_out_what_was_not_computed(tmp_path, drawn):
    from longmem.training.curve import plot_training

    plot_training(tmp_path / "curve.png", [RECORDS[4]])
    assert set(lines_of(drawn[0])) == {"side network", "memory bias"}
    with pytest.raises(ValueError, match="at least one step"):
        plot_training(tmp_path / "curve.png", [])


def test_the_running_mean_is_that_of_the_values_before():
    import numpy as np

    from longmem.training.curve import running_mean

    values = np.random.default_rng(0).standard_normal(30)
    naive = [values[max(0, end - 7) : end].mean() for end in range(1, 31)]
    np.testing.assert_allclose(running_mean(values, 7), naive)
