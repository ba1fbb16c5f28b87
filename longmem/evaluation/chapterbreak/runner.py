"""Asking every system which suffix follows, at every length of context."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from rich.console import Console

from longmem.console import item_progress
from longmem.evaluation.chapterbreak.baselines import baseline_values
from longmem.evaluation.chapterbreak.data import Example, Split, choose
from longmem.evaluation.chapterbreak.settings import ChapterBreakSettings
from longmem.evaluation.chapterbreak.tokens import Encoder, views
from longmem.evaluation.runs import RunFolder
from longmem.evaluation.systems import Banks, System, make_systems
from longmem.model.modeling import LongMemForCausalLM


def run_chapterbreak(work: Asking, run: RunFolder, console: Console) -> None:
    """Write a record for every example, system and number of tokens that the system uses, and for every baseline.

    A system that uses the same tokens at several lengths of context is asked once; `contexts` of the record says at which.
    """
    if (longest := max(work.lengths)) < max(work.views):
        console.print(f"The longest context has {longest:,} tokens: what `contexts` asks beyond them is not there.")
    run.write(
        {"id": f"{example.name}/{name}", **described(example), "system": name, "contexts": list(work.views)}
        | {"values": values}
        for example, found in baseline_values(work.split.examples, work.examples)
        for name, values in found.items()
        if f"{example.name}/{name}" not in run
    )
    jobs = list(work.jobs())
    with item_progress("examples x systems x contexts", console) as report:
        for done, (number, name, used, contexts) in enumerate(jobs, start=1):
            record_id = f"{work.examples[number].name}/{name}/{used}"
            if record_id not in run:
                run.write([{"id": record_id, **work.ask(number, name, used), "contexts": contexts}])
            report(done, len(jobs))


def described(example: Example) -> dict[str, Any]:
    """Return what a record says of its example."""
    return {"work": example.work, "number": example.number}


class Asking:
    """The systems, and what each is asked.

    Args:
        settings: of the evaluation.
        model: that is evaluated.
        split: from which examples are chosen.

    Raises:
        ValueError: settings, model and data do not go together.
    """

    def __init__(self, settings: ChapterBreakSettings, model: LongMemForCausalLM, split: Split) -> None:
        self.split = split
        # In an order in which the next one is of another work, where that can be.
        self.examples = choose(split.examples, settings.limit)
        self.encoder = Encoder(model.tokenizer, settings.joiner, settings.suffix_tokens)
        room = self.encoder.room
        self.views = views(settings.systems, settings.contexts, window=settings.window, room=room)
        self.local_tokens = settings.window - room
        self.banks = Banks(model)
        made = make_systems(
            settings.systems,
            model,
            window=settings.window,
            local_tokens=self.local_tokens,
            batch_size=settings.batch_size,
            banks=self.banks,
        )
        self.systems: Mapping[str, System] = {system.name: system for system in made}
        self.lengths = [len(self.encoder.context(example)) for example in self.examples]
        self.wrong = self._wrong() if "wrong" in self.systems else {}
        self._encoding_seconds: dict[tuple[int, int], float] = {}
        self.context = lru_cache(maxsize=4)(lambda number: self.encoder.context(self.examples[number]))

    def jobs(self) -> Iterator[tuple[int, str, int, list[int]]]:
        """Yield example, system, tokens it uses, and the lengths of context of which this is the result."""
        asked = set()
        for used_by in self.views.values():
            new = {name: used for name, used in used_by.items() if (name, used) not in asked}
            asked |= set(new.items())
            for number in range(len(self.examples)):
                for name, used in new.items():
                    yield number, name, used, [size for size, own in self.views.items() if own.get(name) == used]

    def ask(self, number: int, name: str, used: int) -> dict[str, Any]:
        """Return the record of a system that uses the last `used` tokens of a context.

        The seconds of a memory include those of encoding it, also where it had been encoded as the wrong one of another
        example.
        """
        example, system = self.examples[number], self.systems[name]
        stream = self.context(number)[-used:]
        instead: list[int] = []
        seconds = 0.0
        if name == "on":
            seconds += self._encode(number, used)[1]
        elif name == "wrong":
            instead, encoding = self._encode(self.wrong[number], used)
            seconds += encoding
        before = system.preparing_seconds + system.answering_seconds
        system.read([stream], instead=[instead])
        (answer,) = system.score([self.encoder.question(example)])
        seconds += system.preparing_seconds + system.answering_seconds - before
        return {
            **described(example),
            "system": name,
            "used": used,
            "context_tokens": len(stream),
            "sums": [each.total for each in answer.candidates],
            "tokens": [len(each.logprobs) for each in answer.candidates],
            "seconds": seconds,
        }

    def _encode(self, number: int, used: int) -> tuple[list[int], float]:
        """Return what of a context is in memory, and the seconds that encoding it took."""
        ids = self.context(number)[-used:][: -self.local_tokens]
        start = time.perf_counter()
        if ids:
            self.banks.of(ids)
        taken = time.perf_counter() - start
        return ids, self._encoding_seconds.setdefault((number, used), taken)

    def _wrong(self) -> dict[int, int]:
        """Return for each example the next one of another work that is too long for the window."""
        found = {}
        count = len(self.examples)
        for number, example in enumerate(self.examples):
            following = (other % count for other in range(number + 1, number + count))
            others = [n for n in following if self.examples[n].work != example.work]
            usable = [n for n in others if self.lengths[n] > self.local_tokens]
            if not usable:
                raise ValueError(
                    "`systems` must leave out `wrong` where no example of another work has a context of more than "
                    f"{self.local_tokens} tokens, got none for {example.name}; or raise `limit`, or take other data."
                )
            found[number] = usable[0]
        return found
