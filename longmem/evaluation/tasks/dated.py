"""Dated texts, newer than the model that reads them: lists of changes of what is installed here, or a folder of texts.

Asked: which version brought a change, which version is the latest one after an older list was replaced, how a text goes on.
All lists are in one memory, a document each, so that it can be told whether the right one was read.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from longmem.evaluation.folder import digest, spread
from longmem.evaluation.settings import Count
from longmem.evaluation.systems import Banks, MemorySystem, Question, System, tokenize
from longmem.evaluation.task import Axis, Case, Item, Measure, Record, best, per_token
from longmem.evaluation.tasks.facts import ValueSettings, ValueTask, shuffled, value_item
from longmem.memory import MemoryBank
from longmem.memory.finding import span_around
from longmem.memory.protocols import Memory
from longmem.model.modeling import LongMemForCausalLM
from longmem.model.reads import table_of_reads

Kind = Literal["version", "latest", "continuation"]
Age = Literal["new", "old", "undated"]

INSTALLED = "installed"
SUFFIXES = ("", ".md", ".rst", ".txt")
SUPERSEDED = ", superseded"  # what the older list is called where it stays beside the newer one
CONTEXT_TOKENS = 16  # before and after the passage that was read most, so that a line cut in two can still be read

_LOG_NAME = re.compile(r"(change|history|news|release)", re.I)
_VERSION = r"\d+(?:\.\d+)+(?:[.-]?(?:a|b|rc|dev|post|alpha|beta)\.?\d*)?"
_HEAD = re.compile(
    rf"^(?P<mark>#{{1,4}} +|[-=*]{{1,3}} *)?(?P<word>(?:version|release)s? +)?(?:[a-z][\w.-]*[ =]+)?\[?v?"
    rf"(?P<version>{_VERSION})\]?(?P<rest>[^\n]{{0,60}})$",
    re.I | re.M,
)
_RULE = re.compile(r"[-=~^*]{3,}")
_DATES = (
    re.compile(r"(?P<year>(?:19|20)\d\d)[-/.](?P<month>\d\d?)[-/.](?P<day>\d\d?)"),
    re.compile(r"(?P<day>\d{1,2})(?:st|nd|rd|th)?[-. ]+(?P<month>[a-z]{3,9})[-., ]+(?P<year>(?:19|20)\d\d)", re.I),
    re.compile(r"(?P<month>[a-z]{3,9})\.? +(?P<day>\d{1,2})(?:st|nd|rd|th)?,? +(?P<year>(?:19|20)\d\d)", re.I),
)
_MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()  # noqa: SIM905
_BULLET = re.compile(r"^ {0,3}[-*+•] +(.+(?:\n(?! *[-*+•] )(?: +|(?=[a-z]))\S.*)*)", re.M)
_THANKS = re.compile(r"\s*(?:\((?:by |#|issue|:)[^)]*\)|(?:-- )?by @?\S+.*|https?://\S+)")
_DATED_LINE = re.compile(r"^[^\w\n]*(?:date|updated|last[ -](?:updated|modified)|published)\W", re.I | re.M)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatedSettings(ValueSettings):
    """What is read and what is asked; `limit` is of each kind of question."""

    data: str = INSTALLED
    """"installed": lists of changes of the installed packages, in their long descriptions or beside them; or a folder of .md,
    .rst and .txt files: lists of changes, or texts whose name, or a line such as "Date:" near the start, has a date."""

    cutoff: str = "2024-11-01"
    """Day, as YYYY-MM-DD, from which on the backbone cannot have seen anything: that on which its training texts were
    collected or, if that is not known, it was published. Default: SmolLM2 was."""

    kinds: tuple[Kind, ...] = ("version", "latest", "continuation")
    """version: which brought a change; latest: after an older list was replaced; continuation: how a text goes on."""

    ages: tuple[Age, ...] = ("new", "old", "undated")
    """Which questions are asked, by the date of what they are about; the others are counted. old: before `cutoff`."""

    num_texts: Count | None = 16
    """Texts that are read, evenly spread over all that are found; None: all."""

    tokens_per_text: Count = 4096
    """Of each text so many tokens at most are read: of a list of changes the newest, of any other its start."""

    changes_per_text: Count = 8
    """Changes of a list that are asked for, evenly spread over its releases."""

    continuations_per_text: Count = 2
    """Places of a text whose continuation is scored."""

    continuation_tokens: Count = 64
    """Tokens of a continuation that are scored."""

    local_tokens: Count = 448
    """Tokens before a continuation that stand in the window; as many at least are before them, in memory."""

    superseded: Literal["updated", "beside"] = "updated"
    """How a newer list of changes comes into memory: `bank.update` replaces the older one, or it stays beside the newer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if date_in(self.cutoff) != self.cutoff:
            raise ValueError(f"`cutoff` must be a day as YYYY-MM-DD, got {self.cutoff!r}; the default is 2024-11-01.")
        if self.window <= (needed := self.local_tokens + self.continuation_tokens):
            raise ValueError(
                f"`window` must hold more than `local_tokens` and `continuation_tokens`, {needed}, got {self.window}."
            )

    def age(self, date: str) -> Age:
        """Return the flag of a date, of which "" is none.

        >>> [DatedSettings(output="x").age(date) for date in ("2024-10-31", "2024-11-01", "")]
        ['old', 'new', 'undated']
        """
        return "undated" if not date else "old" if date < self.cutoff else "new"


class Release(NamedTuple):
    """A version in a list of changes: its day as YYYY-MM-DD or "", its changes, where in the text it begins."""

    version: str
    date: str
    changes: tuple[str, ...]
    start: int


class DatedText(NamedTuple):
    """A text; a list of changes has releases, the newest first, any other a date of its own, "" for none."""

    name: str
    text: str
    date: str
    releases: tuple[Release, ...] = ()

    def line(self, change: str, release: Release) -> str:
        """Return how a change stands in memory: its version behind it, as it is asked for."""
        return f"[{release.date or 'no date'}] {change} ({self.name} {release.version})\n"


class Dated(ValueTask):
    """Facts and continuations, by their age; a choice is right if the right value is the likeliest per token.

    What was read is seen while the right answer is predicted, of the system `on`: the share of memory's weight that went to the
    right document, whether the passage read most has the answer that was given, and how much of the weight went to what is
    still true.
    """

    name, title, kind = "dated", "dated texts", DatedSettings
    axes = (Axis("kind", "panel", values=get_args(Kind)), Axis("age", values=get_args(Age)))
    sort_by = ("case", "item")
    measures = {
        **ValueTask.measures,
        "likelihood": Measure("log-likelihood of what is right", "nats per token"),
        "source": Measure("source recall, share of memory's weight"),
        "support": Measure("passage read most has the answer"),
        "freshness": Measure("weight on what is still true"),
    }
    notes: Sequence[str] = ()
    _lists: "Mapping[str, Kept]" = {}
    _hash = ""

    def score(self, record: Record) -> Mapping[str, float]:
        found = {"likelihood": per_token(record)[record["right"]]}
        if record["kind"] != "continuation":
            found |= super().score(record)
            said = record.get("prediction") or record["values"][best(per_token(record))]
            version = re.search(_VERSION, said)
            if "passage" in record:
                passage = re.findall(_VERSION, record["passage"])
                found["support"] = float(version is not None and version[0] in passage)
        return found | {name: record[name] for name in ("source", "freshness") if record.get(name) is not None}

    def cases(self, model: LongMemForCausalLM) -> list[Case]:
        """Return the questions about every list, which share a memory, then places of texts in their order."""
        settings = self.settings
        found = read_texts(settings.data)
        texts = [found[number] for number in spread(len(found), settings.num_texts)]
        tokens = functools.partial(tokenize, model.tokenizer, continues=True)
        self._lists = {each.name: kept_of(each, settings.tokens_per_text, tokens) for each in texts if each.releases}
        memory, written = [each.now for each in self._lists.values()], self.max_new_tokens
        cases = []
        for text in texts:
            asked = [*facts_of(text, self._lists[text.name], settings, model)] if text.name in self._lists else []
            for kind in ("version", "latest"):
                items = [item for item in asked if item.about["kind"] == kind]
                about: dict[str, Any] = {"name": f"{kind}/{text.name}", "group": text.name, "stage": "facts"}
                cases.append(Case(items=items, memory=memory, max_new_tokens=written, **about))
            cases += continuations_of(text, tokens, settings)
        cases = [case for case in cases if case.items]
        if not cases:
            raise ValueError(
                f"`data` must hold lists of changes with two versions at least, or long texts, got {len(found)} texts in "
                f"{settings.data!r}, of which nothing of the kinds {', '.join(settings.kinds)} can be asked."
            )
        counts = Counter(item.about["age"] for case in cases for item in case.items)
        self._hash = self._hash_of(cases)
        ages = ", ".join(f"{counts.get(age, 0)} {age}" for age in ("new", "old", "undated"))
        self.notes = [
            f"{len(texts)} texts ({', '.join(each.name for each in texts)}) have {sum(counts.values())} questions: {ages}. "
            f"What is not new, from {settings.cutoff} on, the backbone may have been trained on. Hash of texts and "
            f"questions: {self._hash}."
        ]
        chosen: dict[str, list[Item]] = {}  # of the ages that are asked, `limit` of each kind, by case
        for kind in settings.kinds:
            pairs = [(case.name, item) for case in cases if case.name.startswith(kind) for item in case.items]
            pairs = [(name, item) for name, item in pairs if item.about["age"] in settings.ages]
            for number in spread(len(pairs), settings.limit):
                chosen.setdefault(pairs[number][0], []).append(pairs[number][1])
        if not chosen:
            raise ValueError(f"`ages` must be among those that are there, {dict(counts)}, got {list(settings.ages)}.")
        known = {case.name: case for case in cases}
        return [dataclasses.replace(known[name], items=items) for name, items in chosen.items()]

    def identity(self, cases: Sequence[Case]) -> dict[str, Any]:
        """Return a hash of all texts and questions, and one of those that are asked."""
        return {"dated": self._hash, "asked": self._hash_of(cases)}

    def _hash_of(self, cases: Sequence[Case]) -> str:
        documents = {name: [each.before, each.now] for name, each in self._lists.items()}
        plain = [dataclasses.replace(case, memory=()) if case.stage == "facts" else case for case in cases]
        return digest([documents, super().identity(plain)])

    def wrong(self, case: Case, cases: Sequence[Case]) -> Case | None:
        """Return all lists but the one that is asked about; of a continuation the start of another text."""
        if case.stage != "facts":
            return super().wrong(case, [each for each in cases if each.stage == case.stage])
        others = [each.now for name, each in self._lists.items() if name != case.group]
        if not others:
            raise ValueError(f"`systems` must leave out `wrong` where there is one list of changes, {case.group}.")
        return dataclasses.replace(case, name="others", memory=others)

    def banks(self, model: LongMemForCausalLM) -> Banks:
        options = {"index": self.settings.index, "storage_dtype": self.settings.storage_dtype}
        return DocumentBanks(model, self._lists, self.settings.superseded == "updated", **options)

    @torch.no_grad()
    def placed(self, system: System, case: Case, item: Item) -> Mapping[str, Any]:
        """Return what the system `on` reads while it predicts the right answer."""
        if not isinstance(system, MemorySystem) or system.name in ("off", "wrong") or case.stage != "facts":
            return {}
        answer = item.candidates[item.about["right"]]
        local, context = system.begun(case.prefix, case.room(item), [Question(item.token_ids, item.candidates)])
        ids = torch.tensor([[*context, *item.token_ids, *answer]], device=system.model.input_device)
        output = local(ids[:, :-1], output_memory_reads=True, use_cache=False)
        reads = table_of_reads([output.memory_reads or ()], ids.shape[1] - 1)
        first = ids.shape[1] - 1 - len(answer)  # the position that predicts the answer's first token
        weights: dict[str, float] = defaultdict(float)
        passages: dict[tuple[str, int, int], float] = defaultdict(float)
        places = [] if local.memory is None else local.memory.locate(torch.from_numpy(reads.rows))
        for entry in range(reads.of(first).start, len(reads.weights)):
            place, weight = places[reads.chunks[entry]], float(reads.weights[entry])
            weights["" if place is None else place.document_id] += weight
            if place is not None:
                size = len(self._lists[place.document_id.removesuffix(SUPERSEDED)].of(place.document_id))
                passages[place.document_id, *span_around(place.start, size)] += weight
        total = sum(weights.values())
        if not total:
            return {}
        own, older = weights[case.group], weights[case.group + SUPERSEDED] + weights[""]
        found: dict[str, Any] = {"source": own / total, "memory_share": total / len(answer)}
        found["freshness"] = own / (own + older) if item.about["kind"] == "latest" and own + older else None
        if not passages:
            return found
        name, low, high = max(passages, key=passages.__getitem__)
        ids_of = self._lists[name.removesuffix(SUPERSEDED)].of(name)
        around = ids_of[max(0, low - CONTEXT_TOKENS) : high + CONTEXT_TOKENS]
        return {**found, "read": name, "passage": str(system.model.tokenizer.decode(around))}


class Kept(NamedTuple):
    """Tokens of a list of changes, as it was before its newest release and as it is now, with the releases in it."""

    before: list[int]
    now: list[int]
    releases: Sequence[Release]

    def of(self, name: str) -> list[int]:
        """Return the tokens of a document of the memory."""
        return self.before if name.endswith(SUPERSEDED) else self.now


class DocumentBanks(Banks):
    """One bank of documents, of which each case reads all or all but one; other streams have banks of their own.

    Every document was first written as it was before, and then replaced, if `is_updated`, or the newer one put beside it.
    """

    def __init__(
        self, model: LongMemForCausalLM, documents: Mapping[str, Kept], is_updated: bool, **options: Any
    ) -> None:
        super().__init__(model, **options)
        self.documents, self.is_updated = documents, is_updated
        self._bank: MemoryBank | None = None

    def of(self, token_ids: Sequence[int]) -> Memory:
        """Return the documents whose tokens these are, or a bank with one document."""
        ids = list(token_ids)
        for left_out in (None, *self.documents):
            names = [name for name in self.documents if name != left_out]
            if names and ids == [token for name in names for token in self.documents[name].now]:
                wanted = {*names, *(name + SUPERSEDED for name in names)}
                if self._bank is None:
                    self._bank = self._written()
                there = [each.document_id for each in self._bank.documents()]
                return self._bank.select([name for name in there if name in wanted])
        return super().of(ids)

    def _written(self) -> MemoryBank:
        bank = self.new()
        for name, document in self.documents.items():
            self.memorize(bank, document.before, name if self.is_updated else name + SUPERSEDED)
            if self.is_updated:
                options: dict[str, Any] = {"model": self.model, "batch_size": self.batch_size}
                self.encoded_tokens += bank.update(name, torch.tensor(document.now), **options)
            else:
                self.memorize(bank, document.now, name)
        return bank


# What is asked ---------------------------------------------------------------------------------------------------------


def kept_of(text: DatedText, limit: int, tokens: Any) -> Kept:
    """Return the newest changes that have at most `limit` tokens, in the order of time, and which version is the latest.

    Only changes are kept that are named once and name no version, so that one version alone is right.
    """
    counts = Counter(change for release in text.releases for change in release.changes)
    versions = {release.version for release in text.releases}
    kept: list[Release] = []
    lines: list[list[str]] = []
    for release in text.releases:
        plain = [one for one in release.changes if counts[one] == 1 and not versions & set(re.findall(_VERSION, one))]
        own = [text.line(change, release) for change in plain]
        size = sum(len(tokens(line)) for line in own)
        if size > limit and len(kept) > 1:
            break
        while size > limit and own:
            size -= len(tokens(own.pop()))
            plain.pop()
        limit -= size
        kept.append(release._replace(changes=tuple(plain)))
        lines.append(own)
    before, now = (
        "".join(line for own in reversed(lines[first:]) for line in own)
        + f"The latest version of {text.name} is {kept[first].version}, released {kept[first].date or 'on an unknown day'}.\n"
        for first in (1, 0)
    )
    return Kept(tokens(before), tokens(now), kept)


def facts_of(text: DatedText, kept: Kept, settings: DatedSettings, model: LongMemForCausalLM) -> Iterator[Item]:
    """Yield questions about a list of changes; wrong values are its other versions, all of which stand in memory."""
    draw = random.Random(f"{settings.seed}/{text.name}")
    versions = list(dict.fromkeys(release.version for release in kept.releases))

    def item(kind: str, release: Release, question: str, end: str, first: Sequence[str] = ()) -> Item:
        others = [version for version in versions if version not in (release.version, *first)]
        wrong = [*first, *draw.sample(others, min(len(others), settings.num_choices - 1 - len(first)))]
        # With their end, without which 2.1 is the likelier the likelier 2.14 is.
        values, right = shuffled(draw, release.version + end, [version + end for version in wrong])
        about = {"kind": kind, "age": settings.age(release.date), "date": release.date}
        return value_item(model.tokenizer, question, values, right, **about)

    changes = [(release, change) for release in kept.releases for change in release.changes]
    if "version" in settings.kinds:
        for number, place in enumerate(spread(len(changes), settings.changes_per_text)):
            release, change = changes[place]
            question = f"\nWhich version of {text.name} brought this change?\n{change} ({text.name}"
            yield dataclasses.replace(item("version", release, question, ")"), name=str(number))
    if "latest" in settings.kinds:
        newest, older = kept.releases[:2]
        question = f"\nWhich version of {text.name} is the latest?\nThe latest version of {text.name} is"
        yield dataclasses.replace(item("latest", newest, question, ",", [older.version]), name="latest")


def continuations_of(text: DatedText, tokens: Any, settings: DatedSettings) -> Iterator[Case]:
    """Yield places of a text, each with the tokens that follow; what stands before it is in memory and window."""
    size = settings.continuation_tokens
    if "continuation" not in settings.kinds:
        return
    body = text.text[text.releases[0].start :] if text.releases else text.text
    ids = tokens(body[: 8 * settings.tokens_per_text])[: settings.tokens_per_text]
    parts = settings.continuations_per_text + 1
    for number in range(1, parts):
        place = number * len(ids) // parts
        if place < 2 * settings.local_tokens or place + size > len(ids):
            continue  # what stands in the window would be nearly all there is
        character = len(text.text) - len(body) + int(place / len(ids) * min(len(body), 8 * settings.tokens_per_text))
        date = next((each.date for each in reversed(text.releases) if each.start <= character), text.date)
        about = {"kind": "continuation", "age": settings.age(date), "date": date, "right": 0}
        item = Item(name=str(place), candidates=[ids[place : place + size]], about=about)
        told: dict[str, Any] = {"group": text.name, "stage": "continuations", "local_tokens": settings.local_tokens}
        yield Case(name=f"continuation/{text.name}/{place}", items=[item], memory=[ids[:place]], **told)


# Where texts come from -------------------------------------------------------------------------------------------------


def read_texts(data: str) -> list[DatedText]:
    """Return the texts of the installed packages, or of a folder, by name. Raises ValueError if there are none."""
    if data == INSTALLED:
        found = {each.name: each for each in installed_texts()}
    else:
        folder = Path(data).expanduser()
        if not folder.is_dir():
            raise ValueError(f"`data` must be {INSTALLED!r} or a folder of texts, got {data!r}, which is neither.")
        files = [path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in SUFFIXES]
        names = {str(path.relative_to(folder).with_suffix("")): path for path in sorted(files)}
        found = {name: dated_text(name, path.read_text("utf-8", "replace")) for name, path in names.items()}
    texts = [found[name] for name in sorted(found) if found[name].text.strip()]
    if not texts:
        raise ValueError(f"`data` must hold texts, got none in {data!r}; name a folder with .md, .rst or .txt files.")
    return texts


def installed_texts() -> Iterator[DatedText]:
    """Yield the lists of changes of installed packages: the longest of each, in its description or a file of its own."""
    for package in importlib.metadata.distributions():
        metadata: Any = package.metadata
        name, texts = str(metadata["Name"]), [str(metadata.get_payload() or "")]
        for file in package.files or ():
            path = Path(str(file.locate()))
            if _LOG_NAME.match(path.name) and path.suffix.lower() in SUFFIXES and path.is_file():
                texts.append(path.read_text("utf-8", "replace"))
        best_text = max((dated_text(name, text) for text in texts), key=lambda text: len(text.releases))
        if best_text.releases:
            yield best_text


def dated_text(name: str, text: str) -> DatedText:
    """Return a text with its releases, if it is a list of changes with at least two, or else with its date.

    >>> dated_text("2026-03-02-notes", "Rain.").date, dated_text("notes", "Rain.\\nUpdated: 2 March 2026").date
    ('2026-03-02', '2026-03-02')
    >>> [release.version for release in dated_text("x", "## 1.1 (2026-03-02)\\n- b\\n\\n## 1.0\\n- a\\n").releases]
    ['1.1', '1.0']
    """
    text = text.replace("\r\n", "\n")
    releases = tuple(releases_of(text))
    if len({release.version for release in releases}) > 1:
        return DatedText(name, text, "", releases)
    head = "\n".join(text.splitlines()[:20])
    lines = (head[found.end() :].partition("\n")[0] for found in _DATED_LINE.finditer(head))
    return DatedText(name, text, next(filter(None, map(date_in, (name, *lines))), ""))


def releases_of(text: str) -> Iterator[Release]:
    """Yield the releases of a list of changes, the newest first; a version that comes again is left out."""
    heads = [(each, date) for each in _HEAD.finditer(text) if (date := date_of_head(each)) is not None]
    found: list[Release] = []
    for number, (head, date) in enumerate(heads):
        stop = heads[number + 1][0].start() if number + 1 < len(heads) else len(text)
        if head["version"] not in {each.version for each in found}:
            found.append(Release(head["version"], date, tuple(changes_in(text[head.end() : stop])), head.start()))
    dates = [each.date for each in found if each.date]
    yield from reversed(found) if dates and dates[0] < dates[-1] else found


def date_of_head(head: re.Match[str]) -> str | None:
    """Return the date of a line that may head a release, or of the line below it, "" for none; None where it heads nothing."""
    rest = head["rest"].strip("*:-=~ ")
    words = re.sub(r"[\W\d]", "", rest).lower()
    if (date := date_in(rest)) and len(words) <= len("releasedonseptember"):
        return date
    if rest and words not in ("unreleased", "inprogress"):
        return None
    below = [line.strip() for line in head.string[head.end() : head.end() + 160].split("\n") if line.strip()]
    is_ruled = bool(below) and _RULE.fullmatch(below[0]) is not None
    said = below[is_ruled] if len(below) > is_ruled else ""
    date = date_in(said) if len(said) <= 48 else ""
    return date if date or is_ruled or head["mark"] or head["word"] else None


def changes_in(text: str) -> Iterator[str]:
    """Yield the first sentence of each item of a list, without links and thanks, where it has 30 to 160 characters."""
    for bullet in _BULLET.findall(text):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|`+([^`<]*)(?:<[^>]*>)?`+_{0,2}", r"\1\2", bullet)
        plain = _THANKS.sub("", " ".join(plain.split()))
        sentence = re.split(r"(?<=[a-z)])[.;:] ", plain)[0].strip(" .")
        if 30 <= len(sentence) <= 160 and not sentence.startswith("@"):
            yield sentence


def date_in(text: str) -> str:
    """Return the first date in a text as YYYY-MM-DD, "" if there is none.

    >>> [date_in(text) for text in ("(2026-03-02)", "2nd March 2026", "Mar 2, 2026", "02-Mar-2026", "2026-13-02", "3.11")]
    ['2026-03-02', '2026-03-02', '2026-03-02', '2026-03-02', '', '']
    """
    for pattern in _DATES:
        for found in pattern.finditer(text):
            month = found["month"].lower()[:3]
            number = int(month) if month.isdecimal() else 1 + _MONTHS.index(month) if month in _MONTHS else 0
            try:
                return datetime.date(int(found["year"]), number, int(found["day"])).isoformat()
            except ValueError:
                continue
    return ""
