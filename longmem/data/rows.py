"""Rows of data sets that the library datasets opens: of the Hub, of a saved folder, of a folder of files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets

from longmem.data.sources import SAVED_DATASET_FILES
from longmem.errors import did_you_mean


def load_rows(path: str, configuration: str | None, split: str) -> Iterable[dict[str, Any]]:
    """Return the rows of one split.

    Args:
        path: name on the Hub, folder of `Dataset.save_to_disk`, or folder of files that `datasets.load_dataset` reads.
        configuration: where the data set has several.
        split: its name.

    Raises:
        ValueError: there is no such data set or split, or no network to get it.
    """
    folder = Path(path).expanduser()
    if any((folder / name).is_file() for name in SAVED_DATASET_FILES):
        saved = datasets.load_from_disk(str(folder))
        if not isinstance(saved, datasets.DatasetDict) or split not in saved:
            known = list(saved) if isinstance(saved, datasets.DatasetDict) else []
            raise ValueError(
                f"`split` must be one of {', '.join(map(str, known)) or 'those of a DatasetDict, which was not saved here'} "
                f"for {path!r}, got {split!r}.{did_you_mean(split, map(str, known))}"
            )
        return saved[split]
    try:
        return datasets.load_dataset(str(folder) if folder.is_dir() else path, configuration, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"`path` must be a folder or the name of a data set on the Hub with a split {split!r}, got {path!r}, which "
            f"cannot be opened: {error}. Check spelling and network, and that HF_HUB_OFFLINE is not set."
        ) from error
