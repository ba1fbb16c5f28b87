"""What a refresh policy is: what a bank does when the encoder that reads it is not the one that wrote it.

A policy decides three things: what happens when the encoder has changed (`on_encoder_change`), which chunks a read may
return (`readable`, `on_read`), and what is done between reads (`on_idle`). What it may not read is masked: a search finds other
chunks instead, and nothing where there are none.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from longmem.encoder.stamp import EncoderStamp
from longmem.errors import name_known
from longmem.memory.index import Ranked
from longmem.memory.refresh.refresher import Lags, Refresher, RefreshState
from longmem.plugins import PLUGINS, Setting, parse_name

Search = Callable[[Tensor | None], Ranked]


class RefreshPolicy:
    """What a bank does with entries of an earlier encoder; a new policy is one class, registered by its name.

    The default reads what the current encoder wrote and masks the rest.

    >>> from longmem.plugins import register
    >>> @register("refresh", "skip-unknown")
    ... class SkipUnknown(RefreshPolicy):
    ...     def readable(self, lags):
    ...         return torch.cat([torch.ones(len(lags.is_fresh) - 1, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)])
    >>> refresh_name({"name": "skip-unknown"})
    'skip-unknown'
    >>> del PLUGINS["refresh"]["skip-unknown"]
    """

    # Settings that may follow the name, as in "bounded:max_lag=4,clock=gap"; `chosen` holds their values.
    settings: ClassVar[Mapping[str, Setting]] = {}
    needs_sketch: ClassVar[bool] = False  # whether every version of the encoder is sketched, for the clock "gap"

    encodes_on_read: ClassVar[bool] = False  # whether a search may encode again what it finds

    def __init__(self, **chosen: Any) -> None:
        self.chosen = {name: setting.default for name, setting in self.settings.items()} | chosen

    @property
    def map_gain(self) -> float | None:
        """Return the least share of the distance that a map has taken away; None for a policy that fits none."""
        return None

    def admit(self, known: EncoderStamp, stamp: EncoderStamp) -> None:
        """Raise StaleMemoryError if another encoder must not read the bank at all."""

    def on_encoder_change(self, refresher: Refresher) -> None:
        """Act on a new encoder, once, before anything is read with it."""

    def on_open(self, refresher: Refresher) -> None:
        """Act before each call of a model that reads the bank, where something in it is stale or wanted."""

    def readable(self, lags: Lags) -> Bool[Tensor, " versions"]:
        """Return for each version whether what it wrote may be read as it is; the last entry is the unknown encoder's."""
        return lags.is_fresh

    def reads_mapped(self) -> bool:
        """Return whether entries that a map has moved to the current encoder may be read."""
        return False

    def readable_as_is(self, lags: Lags, versions: Int[Tensor, "2 _rows"]) -> Bool[Tensor, " _rows"]:
        """Return for each row whether it may be read as it is; `versions` as of `Ledger.versions`."""
        readable = self.readable(lags)[versions[0]]
        # What a map has moved is no longer what any encoder wrote, also when the encoder that once wrote it comes back.
        good = (versions[1] == lags.encoders.current) & self.reads_mapped()
        return torch.where(versions[1] >= 0, good, readable)

    def mask(self, state: RefreshState) -> Bool[Tensor, " rows"] | None:
        """Return for each live row of a bank whether it may be read as it is, None if all may."""
        with state.table.lock:
            lags = state.lags()
            if len(lags.encoders.versions) <= 1 and bool(self.readable(lags).all()):
                return None
            readable = self.readable_as_is(lags, state.table.ledger.versions)
        return None if readable.all() else readable

    def on_read(self, refresher: Refresher | None, search: Search, rows: Tensor | None, readable: Tensor) -> Ranked:
        """Return what a `search` of `rows` (None: all) finds, where not every live row is `readable`.

        `refresher`: None where no encoder is known, or the bank can't be written to.
        """
        return search(readable_rows(rows, readable))

    def on_idle(self, refresher: Refresher, budget_tokens: int | None) -> None:
        """Encode again what is stale, oldest first, up to so many tokens: the sweep in the background."""
        refresher.reencode(refresher.stale(), budget_tokens)


def readable_rows(rows: Tensor | None, readable: Bool[Tensor, " live"]) -> Tensor:
    """Return those of the rows that may be read."""
    return readable.nonzero().flatten() if rows is None else rows[readable[rows]]


def refresh_name(refresh: object) -> str:
    """Return a policy's name with its settings, as a bank keeps it. Raises ValueError for what is not known.

    >>> refresh_name({"name": "bounded", "max_lag": 0.001, "clock": "gap"})
    'bounded:max_lag=0.001,clock=gap'
    """
    if isinstance(refresh, Mapping):
        if "name" not in refresh:
            known = name_known("", PLUGINS["refresh"])
            raise ValueError(f"`refresh` must have a `name`, got {dict(refresh)!r}; {known}")
        settings = ",".join(f"{name}={value}" for name, value in refresh.items() if name != "name")
        refresh = f"{refresh['name']}:{settings}" if settings else refresh["name"]
    make_policy(refresh)
    return str(refresh)


def make_policy(refresh: object) -> RefreshPolicy:
    """Return the policy that `refresh` names, with the settings it gives. Raises ValueError for what is not known.

    >>> make_policy("bounded:max_lag=2").chosen["max_lag"]
    2.0
    """
    kind, chosen = parse_name("refresh", refresh)
    return kind(**chosen)
