"""The staleness report: what in a bank another encoder wrote, how far that is behind, and what can be done about it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from longmem.encoder.history import UNKNOWN, Encoders
from longmem.encoder.stamp import differs_for_life, refuse_other_recipe
from longmem.errors import StaleMemoryError
from longmem.memory.protocols import Writer
from longmem.memory.refresh.policy import RefreshPolicy
from longmem.memory.refresh.refresher import Lags, Refresher, RefreshState
from longmem.memory.rows.documents import Document
from longmem.memory.rows.table import Table


@dataclass(frozen=True)
class VersionStaleness:
    """What one encoder has written that is still in the bank."""

    version: int  # -1: nobody knows which encoder
    digest: str | None  # its fingerprint
    tokens: int
    lag: int | None  # changes of the encoder since, 0 for the one compared with; None for the unknown one
    gap: float | None  # how far the weights have moved since, relative to their norm; None if not known
    drift: float | None  # how far keys have moved, relative to their length, on a sample; None unless probed
    differs: tuple[str, ...]  # in what that encoder and the one compared with differ (`EncoderStamp.diff`)

    @property
    def is_fresh(self) -> bool:
        """Return whether this is the encoder that is compared with."""
        return self.lag == 0


@dataclass(frozen=True)
class DocumentStaleness:
    """How stale one document is."""

    document_id: str
    entries: int
    tokens: int
    tokens_of: Mapping[int, int]  # of them, by version of the encoder that wrote them
    stale_share: float
    lag_max: int  # of the versions that are known
    age: float  # seconds since it was written, the mean of its chunks
    masked: int
    mapped: int
    is_unreachable: bool  # some of it is stale and can't be encoded again: ids, or the tokens before, are not known


@dataclass(frozen=True)
class StalenessReport:
    """How stale a bank is, for a model or for its own current encoder; entries are resident chunks."""

    entries: int
    tokens: int  # in the entries
    stale_share: float  # of the entries, those that another, known encoder wrote
    unknown_share: float  # those that nobody knows the encoder of
    masked: int  # entries that the policy does not let be read as they are; all, if it would refuse the bank
    mapped: int  # entries that a map has moved to the encoder compared with
    unreachable: int  # documents of which something is stale and can't be encoded again
    tokens_to_encode: int  # to bring the bank up to date; without what a map has moved, if the policy reads that
    lag_mean: float  # changes of the encoder since, over the entries whose encoder is known
    lag_max: int
    gap_max: float | None  # how far the weights have moved since the oldest entries; None if not known of all
    age_mean: float  # seconds since an entry was written
    probe_drift: float | None  # relative distance of stored keys to those encoded now, the largest; None unless probed
    tokens_reencoded: int  # since the bank was made or opened
    seconds: float  # that this took
    map_gain: float | None  # the least share of the distance that a map of the policy takes away; None if it fits none
    differs: tuple[str, ...]  # in what the encoders of stale entries differ from the one compared with
    differs_for_good: tuple[str, ...]  # what no encoding again would put right
    versions: tuple[VersionStaleness, ...]  # the encoders that wrote what is there, oldest first
    documents: tuple[DocumentStaleness, ...]  # in the order in which they were added

    @property
    def is_fresh(self) -> bool:
        """Return whether the encoder compared with wrote every entry, and could write more."""
        return not (self.stale_share or self.unknown_share or self.differs_for_good)


def report_staleness(
    state: RefreshState, policy: RefreshPolicy, writer: Writer | None = None, *, probe: bool = False
) -> StalenessReport:
    """Return how stale a bank is under a policy, for a writer or for its own current encoder; see `Freshness.report`."""
    table, ledger = state.table, state.table.ledger
    with table.lock:
        table.drop_expired()
        own, encoders = table.encoders, encoders_for(table.encoders, writer)
        known = own.stamp
        for_good = () if known is None or encoders.stamp is None else tuple(differs_for_life(known, encoders.stamp))
        fresh = Lags(encoders).is_fresh
        drifts: dict[int, float] = {}
        if probe:
            if writer is None:
                raise ValueError(
                    "`probe` needs a model that encodes, got `model=None`; give the model that is to read the bank."
                )
            refuse_other_recipe(known, writer.stamp())
            # How far the keys of each earlier encoder are from what the writer makes of the same tokens.
            drifts = Refresher(state, [writer]).probe_versions(is_readable=fresh.tolist())
        versions = ledger.versions
        # What was probed before is of the bank's own encoder.
        probed = drifts or ({} if known is None or known.digest != encoders.versions[-1].stamp.digest else state.probed)
        readable = would_be_readable(policy, own, encoders, probed, versions)
        of_versions = version_reports(encoders, drifts, versions, ledger.sizes(torch.arange(ledger.num_rows)))
        documents = tuple(document_report(table, each, encoders, fresh, readable) for each in ledger.documents.values())
        refresher = Refresher(state, [])
        reads_mapped = policy.reads_mapped() and encoders.current == own.current
        targets = [] if for_good else refresher.stale(fresh.tolist(), mapped_is_fresh=reads_mapped)
        tokens = ledger.num_tokens
    entries = max(1, ledger.num_rows)
    counts = {each.version: int((versions[0] == each.version).sum()) for each in of_versions}
    known_lags = {each.version: each.lag for each in of_versions if each.lag is not None}
    gaps = [each.gap for each in of_versions]
    return StalenessReport(
        entries=ledger.num_rows,
        tokens=tokens,
        stale_share=sum(counts[version] for version, lag in known_lags.items() if lag) / entries,
        unknown_share=counts.get(UNKNOWN, 0) / entries,
        masked=int((~readable).sum()),
        mapped=sum(each.mapped for each in documents),
        unreachable=sum(each.is_unreachable for each in documents),
        tokens_to_encode=refresher.num_tokens(targets),
        lag_mean=sum(counts[version] * lag for version, lag in known_lags.items())
        / max(1, sum(counts[version] for version in known_lags)),
        lag_max=max(known_lags.values(), default=0),
        gap_max=None if None in gaps else max((gap for gap in gaps if gap is not None), default=0.0),
        age_mean=sum(each.age * each.entries for each in documents) / entries,
        probe_drift=max(drifts.values(), default=None),
        tokens_reencoded=state.refreshed.tokens,
        seconds=state.refreshed.seconds,
        map_gain=policy.map_gain,
        differs=tuple(dict.fromkeys(name for each in of_versions for name in each.differs)),
        differs_for_good=for_good,
        versions=of_versions,
        documents=documents,
    )


def encoders_for(own: Encoders, writer: Writer | None) -> Encoders:
    """Return the history of a bank's encoders as it would be if this writer's model read the bank now; its own stays."""
    encoders = own.copy()
    if writer is not None:
        stamp = writer.stamp()
        is_known = encoders.stamp is not None and encoders.stamp.digest == stamp.digest
        sketched = is_known and encoders.versions[-1].sketch is not None
        encoders.enter(stamp, None if sketched else writer.sketch())
    return encoders


def would_be_readable(
    policy: RefreshPolicy,
    own: Encoders,
    encoders: Encoders,
    probed: Mapping[int, float],
    versions: Int[Tensor, "2 _rows"],
) -> Bool[Tensor, " _rows"]:
    """Return for each row whether a policy would let the current one of these encoders read it as it is.

    `own`: the encoders of the bank, `encoders`: those it would have.
    """
    known, stamp = own.stamp, encoders.stamp
    if known is None or stamp is None:  # nobody checks a bank that names no encoder
        return torch.ones(versions.shape[1], dtype=torch.bool)
    if known.digest != stamp.digest:
        try:
            refuse_other_recipe(known, stamp)
            policy.admit(known, stamp)
        except StaleMemoryError:
            return torch.zeros(versions.shape[1], dtype=torch.bool)
    return policy.readable_as_is(Lags(encoders, "version", probed), versions)


def version_reports(
    encoders: Encoders, drifts: Mapping[int, float], versions: Int[Tensor, "2 _rows"], sizes: Int[Tensor, " _rows"]
) -> tuple[VersionStaleness, ...]:
    """Return what each encoder has written that is there; `sizes`: tokens of each row."""
    lags, gaps = encoders.lags(), encoders.gaps()
    found = []
    for version in versions[0].unique().tolist():
        tokens = int(sizes[versions[0] == version].sum())
        if version == UNKNOWN:
            found.append(VersionStaleness(UNKNOWN, None, tokens, None, None, drifts.get(UNKNOWN), ()))
            continue
        assert encoders.stamp is not None
        stamp, lag = encoders.versions[version].stamp, lags[version]
        differs = tuple(stamp.diff(encoders.stamp)) if lag else ()
        found.append(VersionStaleness(version, stamp.digest, tokens, lag, gaps[version], drifts.get(version), differs))
    return tuple(found)


def document_report(
    table: Table,
    document: Document,
    encoders: Encoders,
    fresh: Bool[Tensor, " versions"],
    readable: Bool[Tensor, " _rows"],
) -> DocumentStaleness:
    """Return how stale a document is; `fresh` for each version, `readable` for each row of the bank."""
    rows, now = document.rows.values, time.time()
    (versions, mapped_to), sizes = table.ledger.versions[:, rows], table.ledger.sizes(rows)
    counts = {version: int(sizes[versions == version].sum()) for version in versions.unique().tolist()}
    lags = encoders.lags()
    is_stale = ~fresh[versions]
    ages = sum(run.num_chunks * (now - run.written_at) for run in document.runs)
    has_ids = document.source_or_stored is not None
    return DocumentStaleness(
        document_id=document.document_id,
        entries=len(rows),
        tokens=int(sizes.sum()),
        tokens_of=counts,
        stale_share=float(is_stale.sum()) / max(1, len(rows)),
        lag_max=max((lags[version] for version in counts if version != UNKNOWN), default=0),
        age=ages / max(1, len(rows)),
        masked=int((~readable[rows]).sum()),
        mapped=int((is_stale & (mapped_to == encoders.current) & (mapped_to >= 0)).sum()),
        is_unreachable=any(not fresh[each.version] and not (each.is_known and has_ids) for each in document.segments),
    )
