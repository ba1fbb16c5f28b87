"""What a training run writes down: a JSON object per line in `log.jsonl`, and the same for TensorBoard if asked."""

import dataclasses
import json
from os import PathLike
from pathlib import Path
from typing import NamedTuple, Self

from longmem.evaluation.folder import read_lines
from longmem.files import append_lines, make_folder, refuse_link, write_file

FILE = "log.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One optimizer step, over all processes; losses are in nats per token, from before the step.

    Steps count from 1. `gain` is what the side network saves against the backbone alone on the same tokens,
    `backbone_loss`; both are None where that was not computed. `tokens` were read in this step, `memory_tokens` were in a
    lane's own memory, on average. `memory_share` is the mean weight of memory in the attention of the reading
    layers, None where nothing was read, and `bias_mean` the mean memory bias (or gate) over these layers and their heads.
    With `exchange.every_steps`, `gradient_norm` and, between averages, `bias_mean` are the first process's own.
    """

    step: int
    epoch: float
    loss: float
    backbone_loss: float | None
    gain: float | None
    learning_rate: float
    gradient_norm: float
    tokens: int
    memory_tokens: float
    memory_share: float | None
    bias_mean: float
    seconds: float
    tokens_per_second: float


@dataclasses.dataclass(frozen=True)
class ValidationRecord:
    """Losses after `step` steps on the same `tokens`, in nats per token, by system as in `longmem.evaluation.perplexity`.

    `on` is None for a run that never reads.
    """

    step: int
    backbone: float
    off: float
    on: float | None
    wrong: float | None
    tokens: int


Record = StepRecord | ValidationRecord
KINDS: dict[str, type[Record]] = {"step": StepRecord, "validation": ValidationRecord}


class TrainingLog(NamedTuple):
    """What a log holds, in the order it was written."""

    steps: list[StepRecord]
    validations: list[ValidationRecord]


class RunLog:
    """Write the records of one run, each as a line that is complete when `write` returns.

    Only one process of a run may have one, in a `with` block, at whose end files are closed. The run's folder is made if
    missing. `tensorboard`: write the same numbers into `tensorboard/` there. `resume_at`: the step that will be run next, from
    which on records are dropped, with a last line that was cut off; None: a new run.

    Raises ValueError if the folder has a log and this is a new run, or if that log is damaged; ImportError if there is no
    tensorboard to write for.
    """

    def __init__(self, folder: str | PathLike[str], tensorboard: bool = False, resume_at: int | None = None) -> None:
        folder = Path(folder)
        self.path = folder / FILE
        if resume_at is None and self.path.exists():
            raise ValueError(
                f"`folder` must have no {FILE} when a run begins, got {str(folder)!r}, which holds the log of another "
                "run; resume that run, or choose another folder."
            )
        try:
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "`logging.tensorboard` needs the package tensorboard, which is not installed; run `pip install "
                "tensorboard`, or set `logging.tensorboard=false`: log.jsonl has the same numbers."
            ) from error
        make_folder(folder)
        refuse_link(folder / TENSORBOARD_FOLDER)
        if resume_at is not None and self.path.exists():
            kept = [_to_line(record) for record in _read_records(self.path) if record.step < resume_at]
            write_file(self.path, "".join(kept))
        board = str(folder / TENSORBOARD_FOLDER)
        self._tensorboard = SummaryWriter(board, purge_step=resume_at) if tensorboard else None

    def write(self, record: Record) -> None:
        """Add one record."""
        append_lines(self.path, [_to_line(record)])
        if self._tensorboard is None:
            return
        section = "validation" if isinstance(record, ValidationRecord) else "training"
        for name, value in dataclasses.asdict(record).items():
            if name != "step" and value is not None:
                self._tensorboard.add_scalar(f"{section}/{name}", value, record.step)
        self._tensorboard.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()


def read_log(path: str | PathLike[str]) -> TrainingLog:
    """Return the records in a `log.jsonl`, or in that of a run's folder; a last line that was cut off is left out.

    Raises ValueError if there is no log, or another line than the last is damaged.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"`path` must be a {FILE} or the folder of a run, got {str(path)!r}, which is no file.")
    records = _read_records(path)
    steps = [record for record in records if isinstance(record, StepRecord)]
    return TrainingLog(steps, [record for record in records if isinstance(record, ValidationRecord)])


def _to_line(record: Record) -> str:
    kind = next(kind for kind, each in KINDS.items() if type(record) is each)
    return json.dumps({"kind": kind, **dataclasses.asdict(record)}) + "\n"


def _read_records(path: Path) -> list[Record]:
    return read_lines(
        path, {"kind": str}, lambda values: KINDS[values.pop("kind")](**values), "a record of a training run"
    )
