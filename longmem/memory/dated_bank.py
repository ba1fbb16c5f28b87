"""What a user does with a bank by dates: supersede, restore, expire, let age count."""

from __future__ import annotations

from longmem.memory.age_prior import AgePrior, make_age_prior
from longmem.memory.checks import validate_known
from longmem.memory.persistence import PersistentBank
from longmem.memory.reader import BankReader
from longmem.memory.visibility import has_expired, validate_date


class DatedBank(BankReader, PersistentBank):
    """The content clock of `MemoryBank`: what was superseded or has expired is kept, shown, and found by no search."""

    def supersede(self, document_id: str, by: str | None = None) -> None:
        """Hide a document whose text no longer holds, from searches of the bank and of all views on it.

        It stays, with its text, and `info` shows what took its place; it takes room, and is evicted, as before. To have it
        forgotten, `delete` it.

        Args:
            document_id: the old document.
            by: the new one, whose name is followed when it is renamed and remembered when it is deleted; None: the text
                is withdrawn, and nothing takes its place.

        Raises:
            ValueError: an unknown id, or a `by` that was itself superseded, in the end, by the old document.
        """
        document = self._document("document_id", document_id)
        if by is not None:
            self._refuse_circle(document_id, by)
        with self.transaction(), self._lock:
            self._ledger.supersede(document, True, by, document.valid_until)

    def restore(self, document_id: str) -> None:
        """Let searches find a document again that was superseded or has expired; it then is valid without end.

        A `valid_until` that is still to come stays.
        """
        document = self._document("document_id", document_id)
        has_ended = has_expired(document, self._clock.moment)
        with self.transaction(), self._lock:
            self._ledger.supersede(document, False, None, None if has_ended else document.valid_until)

    def expire(self, now: float | None = None) -> list[str]:
        """Return the documents whose `valid_until` has come, and hide by the same moment from now on.

        A search hides by itself what has expired when it runs. With `now`, seconds since 1970, searches are done as at that
        moment, whatever the time, until the next call: so runs can be repeated. The moment is not saved with the bank.
        """
        self._clock.stop_at(None if now is None else validate_date("now", now))
        self._ledger.note_change()
        moment = self._clock.moment
        return [name for name, each in self._ledger.documents.items() if has_expired(each, moment)]

    @property
    def age_prior(self) -> AgePrior | None:
        """Return how age counts when the bank is read, None if it does not."""
        return self._clock.prior

    def use_age_prior(self, age_prior: AgePrior | str | None) -> None:
        """Let age count in another way from now on; given as for the class."""
        chosen = make_age_prior(age_prior)
        with self.transaction():
            self._clock.use(chosen)
            self._ledger.note_change()

    def _refuse_circle(self, document_id: str, by: str) -> None:
        documents = self._ledger.documents
        validate_known("by", by, documents)
        follower: str | None = by
        seen: set[str] = set()
        while follower in documents and follower not in seen:
            if follower == document_id:
                raise ValueError(
                    f"`by` must be another document, which {document_id!r} has not superseded itself, got {by!r}; "
                    f"`restore({by!r})` first."
                )
            seen.add(follower)
            follower = documents[follower].superseded_by
