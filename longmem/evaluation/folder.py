"""The folder of an evaluation: settings, raw predictions as they come, then metrics, table and figures."""

import dataclasses
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from longmem.configuration import LongMemConfig
from longmem.encoder.path import hash_tensors
from longmem.evaluation.settings import EvaluationSettings
from longmem.files import append_lines, make_folder, new_contents, not_opened, open_regular, read_json, write_file
from longmem.memory.folder.foreign import fits
from longmem.model.modeling import LongMemForCausalLM
from longmem.settings.environment import environment
from longmem.settings.nested import leaves

CONFIG, PREDICTIONS, SESSIONS = "config.json", "predictions.jsonl", "sessions.jsonl"
MAY_CHANGE = ("output", "batch_size")  # settings that change no number: a run that goes on may get them anew
PLACE = "_name_or_path"  # where transformers' configurations say they are from


class RunFolder:
    """A run that can be stopped at any time and goes on where it was: what `predictions.jsonl` has is not asked again.

    Used as a context manager, which records how long each session took. The folder is made if missing; `config` is all that the
    predictions depend on, but for versions and hardware (`describe`). Raises ValueError if the folder holds a run with another.
    """

    def __init__(self, folder: str | Path, config: Mapping[str, Any]) -> None:
        self.path = Path(folder)
        claim_folder(self.path, config)
        self._records: dict[str, dict[str, Any]] = {}
        if os.path.lexists(path := self.path / PREDICTIONS):
            self._records = {record["id"]: record for record in read_lines(path, {"id": str})}
            append_lines(path, [])  # cuts off what a killed process left of a last line
        self._start: float | None = time.perf_counter()  # None once the session is on record

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        seconds = self._seconds()
        self._start = None
        session = {"seconds": round(seconds, 1), "predictions": len(self._records), "stopped": kind is not None}
        append_lines(self.path / SESSIONS, [json.dumps(session) + "\n"])

    def __contains__(self, record_id: str) -> bool:
        return record_id in self._records

    @property
    def records(self) -> list[dict[str, Any]]:
        """Return all predictions, in the order in which they were written."""
        return list(self._records.values())

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append predictions, each with an "id" of its own; they are on the disk when the call returns.

        Raises ValueError if an id was written before; OSError where there is no room. Then none of them is of the run.
        """
        new: dict[str, dict[str, Any]] = {}
        for record in records:
            if record["id"] in self._records or record["id"] in new:
                raise ValueError(f"`records` must have ids that are new to the run, got {record['id']!r} again.")
            new[record["id"]] = dict(record)
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in new.values()]
        append_lines(self.path / PREDICTIONS, lines)
        self._records |= new

    def finish(self, *, title: str, metrics: Mapping[str, Any], table: str, seed: int) -> None:
        """Write `metrics.json`, `table.md` and `environment.json`, from which a report is made.

        `metrics` may have a `summary`, which reports draw: `measure`, a word for what is measured, and `systems`: for each the
        `value` and its `interval`. `table` is Markdown.
        """
        path, seconds = self.path / SESSIONS, self._seconds()
        if path.exists():
            seconds += sum(session["seconds"] for session in read_lines(path, {"seconds": float}))
        found = {"title": title, **environment(), "seed": seed, "wall_seconds": round(seconds, 1)}
        contents = {"metrics.json": as_json(metrics), "table.md": table, "environment.json": as_json(found)}
        with new_contents(self.path) as draft:
            for name, content in contents.items():
                (draft / name).write_text(content, encoding="utf-8")

    def _seconds(self) -> float:
        """Return the seconds of this session that are not on record."""
        return 0.0 if self._start is None else time.perf_counter() - self._start


def read_lines(
    path: Path,
    form: Mapping[str, Any],
    parse: Callable[[Any], Any] = dict,
    what: str = "an object as the run wrote it",
) -> list[Any]:
    """Return what `parse` makes of each object in a JSONL file of a run; a last line that is not whole is left out.

    Raises ValueError, which names the line and `what` it must be, if one of them is damaged or has not this form (`fits`), or
    the file is none of the run's own.
    """
    found: list[Any] = []
    try:
        with open(open_regular(path, follow=False), "rb") as file:
            text = file.read().decode("utf-8", "replace")
    except OSError as error:
        raise not_opened(path, error) from error
    lines = text.split("\n")[:-1]  # not `splitlines`: a text may hold other line ends
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
            if not fits(value, form):
                raise ValueError(f"it must have {', '.join(form)}")
            found.append(parse(value))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            place = f"line {number} of {str(path)!r}"
            raise ValueError(f"{place} must be {what}, got {line[:80]!r}; delete the line.") from error
    return found


def describe(
    settings: EvaluationSettings,
    model: LongMemForCausalLM,
    data: Mapping[str, Any] | None = None,
    *,
    may_change: Collection[str] = MAY_CHANGE,
) -> dict[str, Any]:
    """Return the configuration of a run: settings but for those that change no number, model, weights, digests of the data."""
    weights = ((name, each.detach().cpu().contiguous()) for name, each in model.side_network.named_parameters())
    config = model.config.to_dict()
    for part in (config, config["backbone_config"]):
        part.pop(PLACE, None)  # digests say which weights these are, wherever they lie
    return {
        "settings": {name: each for name, each in dataclasses.asdict(settings).items() if name not in may_change},
        "data": dict(data or {}),
        "dtype": {"backbone": str(model.backbone.dtype), "side_network": str(model.side_network.dtype)},
        "encoder": model.encoder_fingerprint(),
        "side_network": hash_tensors(weights),
        "model": config,
    }


def digest(content: Any) -> str:
    """Return a hash of what JSON can write."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def claim_folder(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `config.json` to a new folder; one that has it must be of a run with the same settings (ValueError)."""
    text, path, known = as_json(config), folder / CONFIG, None
    if path.exists():
        try:
            known = read_json(path)
        except ValueError as error:
            if (folder / PREDICTIONS).exists():
                raise ValueError(f"{error} Whose answers {folder} holds is not known; name another folder.") from error
            warnings.warn(f"{error} Nothing was answered yet, so it is written anew.", stacklevel=3)
    if known is None:
        make_folder(folder)
        write_file(path, text)
        return
    before, now = (dict(leaves(each)) for each in (known, json.loads(text)))
    # Runs of earlier versions have places, and lack fields that the model's configuration got since, which have their defaults.
    fields = (field for field in dataclasses.fields(LongMemConfig) if field.default is not dataclasses.MISSING)
    usual = {f"model.{field.name}": field.default for field in fields}
    names = [name for name in {**before, **now} if not name.endswith(f".{PLACE}")]
    changed = [name for name in names if before.get(name, usual.get(name)) != now.get(name, usual.get(name))]
    if changed:
        name, too = changed[0], f"; {', '.join(changed[1:6])} differ too" if changed[1:] else ""
        raise ValueError(
            f"`output` must be a new folder or that of a run with the same settings, but {folder} has {name} = "
            f"{before.get(name)!r} and not {now.get(name)!r}{too}. Name another folder, or delete this one."
        )


def spread(count: int, limit: int | None) -> list[int]:
    """Return the numbers of at most `limit` of `count` items, evenly spread over them and always the same.

    >>> spread(10, 4)
    [0, 2, 5, 7]
    """
    if limit is None or limit >= count:
        return list(range(count))
    return [number * count // limit for number in range(limit)]


def as_json(content: Mapping[str, Any]) -> str:
    """Return the text of a JSON file for people and programs; what JSON does not know is written as text."""
    return json.dumps(content, indent=2, default=str) + "\n"
