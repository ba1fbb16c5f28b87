"""ChapterBreak: which of six passages begins the next chapter (Sun, Thai and Iyyer, 2022), at several lengths of context."""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from longmem.evaluation.folder import spread
from longmem.evaluation.settings import Count, EvaluationSettings
from longmem.evaluation.systems import tokenize
from longmem.evaluation.systems.making import context_size
from longmem.evaluation.task import Axis, Case, Item, Measure, Record, Task, per_token
from longmem.evaluation.tasks.files import in_format, read_text
from longmem.model.modeling import LongMemForCausalLM

FORMAT = "{split: {work: [{ctx: text, pos: text, negs: [texts]}]}}"


class Example(NamedTuple):
    """A context that ends where a chapter ends, and passages of which the first begins the next chapter."""

    work: str
    number: int
    context: str
    suffixes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Return what identifies the example in its split."""
        return f"{self.work}/{self.number}"


class Split(NamedTuple):
    """The examples of a split in the order of its file; the name is empty where a file has no splits."""

    name: str
    examples: list[Example]


def load_split(data: str, *, split: str | None = None, file: str | None = None, longest: int = 8192) -> Split:
    """Return the examples of a split, by default the only one, of a JSON file or of a dataset on the Hub.

    `longest` tokens of context are needed, which choose the dataset's `file` where none is named. Raises ValueError if there is
    no such file or split, or it has another format.
    """
    path = Path(data)
    if path.is_file() and file is not None:
        raise ValueError(f"`file` is of a dataset on the Hub, got {file!r} beside {data}, a file itself; leave it out.")
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", data) and not data.endswith((".json", ".gz")):
        path = download(data, file, longest)
    elif not path.is_file():
        raise ValueError(
            f"`data` must be a JSON file or a dataset like simsun131/chapterbreak, got {data!r}, which is neither."
        )
    with in_format(FORMAT, path):
        content = json.loads(read_text(path))
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} must hold {FORMAT}, got {type(content).__name__}.")
    if all(isinstance(works, list) for works in content.values()):
        if split is not None:
            raise ValueError(f"`split` must be left out for {path}, which is a split itself, got {split!r}.")
        content, split = {"": content}, ""
    if split is None and len(content) == 1:
        (split,) = content
    if split is None or split not in content:
        raise ValueError(f"`split` must be one of {list(content)}, those of {path}, got {split!r}.")
    if not isinstance(content[split], dict):
        raise ValueError(f"{path} must hold {FORMAT}, got {type(content[split]).__name__} in {split!r}.")
    return Split(split, examples_of(content[split], str(path)))


def examples_of(works: Mapping[str, Any], source: str) -> list[Example]:
    """Return the examples of a split, each checked."""
    found = []
    for work, entries in works.items():
        for number, entry in enumerate(entries):
            place = f"example {number} of {work!r} in {source}"
            with in_format(f"like those of {FORMAT}", place):
                texts = [entry["ctx"], entry["pos"], *entry["negs"]]
            whole = len(texts) > 2 and all(isinstance(text, str) and text.strip() for text in texts)
            if not whole or isinstance(entry["negs"], str):
                raise ValueError(f"{place} must have texts, none empty, at least one in `negs`, got {str(entry)[:80]}.")
            found.append(Example(work, number, texts[0], tuple(texts[1:])))
    if not found:
        raise ValueError(f"{source} must have at least one example, got none.")
    return found


def choose(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """Return at most `limit` examples, spread over the works, in turns: one of each work, then the next of each.

    So the next example is of another work, whose memory is both its own and the wrong one of the example before.
    """
    works: dict[str, list[Example]] = {}
    for number in spread(len(examples), limit):
        works.setdefault(examples[number].work, []).append(examples[number])
    rounds = max(map(len, works.values()))
    return [own[turn] for turn in range(rounds) for own in works.values() if turn < len(own)]


def download(repository: str, file: str | None, longest: int) -> Path:
    """Return a file of a dataset on the Hub, or of the local cache. Raises ValueError where it cannot be had."""
    from huggingface_hub import hf_hub_download, list_repo_files

    try:
        if file is None:
            file = file_for(list_repo_files(repository, repo_type="dataset"), longest)
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except (OSError, LookupError) as error:
        raise ValueError(
            f"`data` {repository!r} is no local file, and could not be had from the Hugging Face Hub: {error} "
            "Without the network, download its JSON elsewhere and give its path as `data`; with it, name the file with "
            "`file`, such as file=chapterbreak_ctx_8192.json. experiments/chapterbreak makes data from books of your own."
        ) from error


def file_for(files: Sequence[str], longest: int) -> str:
    """Return the file with the smallest ctx_N in its name that has `longest` tokens, or the largest there is.

    >>> file_for(["README.md", "chapterbreak_ctx_512.json", "chapterbreak_ctx_8192.json"], 1000)
    'chapterbreak_ctx_8192.json'
    """
    sizes = {file: int(found[1]) for file in files if (found := re.search(r"ctx_?(\d+)\D*\.json(\.gz)?$", file))}
    if not sizes:
        raise LookupError(f"it has no JSON file with ctx_N in its name, but {', '.join(files) or 'no files'}.")
    enough = [file for file, size in sizes.items() if size >= longest]
    return min(enough, key=sizes.__getitem__) if enough else max(sizes, key=sizes.__getitem__)


LOCAL_SYSTEMS = ("backbone", "off")  # they see the end of the context that fits the window, and nothing else
NEAR_WORDS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChapterBreakSettings(EvaluationSettings):
    """What is asked, and how much of the story each system may use."""

    data: str
    """JSON file in ChapterBreak's format, plain or .json.gz; or name of a dataset on the Hugging Face Hub that has such
    files, the official one being simsun131/chapterbreak."""

    file: str | None = None
    """File of a dataset on the Hub; None: the one whose name has the smallest ctx_N that fills the longest context."""

    split: str | None = None
    """Split of the file, in the official one pg19 or ao3; None: the only one."""

    contexts: tuple[Count, ...] = (512, 2048, 8192)
    """Tokens before the chapter break that are told, each a column of the tables. What does not fit the window is in memory
    or among the passages; where all fits there are no other systems than backbone and off."""

    suffix_tokens: Count = 128
    """Tokens of each suffix that are scored; the rest is cut off."""

    joiner: str = "\n\n"
    """What stands between context and suffix, the same for all suffixes, in the place of the whitespace there. Its tokens
    are read and not scored."""

    scoring: Literal["per_token", "sum"] = "per_token"
    """Which log-likelihood the summary and the figure are of; the tables have both."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.suffix_tokens >= self.window:
            sizes = f"{self.suffix_tokens} and {self.window}"
            raise ValueError(f"`suffix_tokens` must be less than `window`, which holds what is before, got {sizes}.")


class ChapterBreak(Task):
    """Suffix identification: accuracies of both scorings, and by how much the right suffix stands out."""

    name, title, kind = "chapterbreak", "ChapterBreak", ChapterBreakSettings
    axes = (Axis("context", title="tokens of context"),)
    pool = "none"  # where all fits the window there are fewer systems
    sort_by = ("group",)
    baselines = {
        "bag-of-words": "bag of words, whole context",
        "bag-of-words-near": f"bag of words, last {NEAR_WORDS:,} words",
        "longest": "longest suffix",
    }

    def __init__(self, settings: ChapterBreakSettings, split: Split | None = None) -> None:
        super().__init__(settings)
        self.longest = max(settings.contexts)  # tokens of a context, once `cases` has read them
        options = {"split": settings.split, "file": settings.file}
        self.split = split or load_split(settings.data, **options, longest=self.longest)
        self.examples = choose(self.split.examples, settings.limit)

    @property
    def measures(self) -> Mapping[str, Measure]:
        titles = {"per_token": "accuracy, per token", "sum": "accuracy, summed"}
        first = self.settings.scoring
        accuracies = {name: Measure(titles[name], has_chance=True) for name in sorted(titles, key=lambda n: n != first)}
        return {**accuracies, "margin": Measure("margin", "nats per token", baseline="off")}

    @property
    def run_title(self) -> str:
        works = len({example.work for example in self.examples})
        return f"{super().run_title} {self.split.name}: {len(self.examples)} examples of {works} works"

    @property
    def notes(self) -> Sequence[str]:
        missing = [length for length in self.settings.contexts if length > self.longest]
        return [f"The longest context has {self.longest:,} tokens; that is what is told at {missing}."] * bool(missing)

    def score(self, record: Record) -> Mapping[str, float]:
        if "values" in record:
            return dict.fromkeys(("per_token", "sum"), credit(record["values"]))
        right, *others = means = per_token(record)
        # It moves where no choice changes, and so tells systems apart on fewer examples.
        margin = right - sum(others) / len(others)
        return {"per_token": credit(means), "sum": credit(record["logprobs"]), "margin": margin}

    def cases(self, model: LongMemForCausalLM) -> list[Case]:
        """Return a case for each example and number of tokens that some system uses, be it at several lengths of context."""
        settings = self.settings
        encoder = Encoder(model.tokenizer, settings.joiner, settings.suffix_tokens)
        seen = views(settings.systems, settings.contexts, window=settings.window, room=encoder.room)
        contexts = [encoder.context(example)[-max(seen) :] for example in self.examples]
        self.longest = max(map(len, contexts))
        items = [encoder.item(example) for example in self.examples]
        cases, axes = [], {"context": list(seen)}
        for example, found in baseline_values(self.split.examples, self.examples):
            guesses = Item(guesses={name: {"values": values} for name, values in found.items()})
            cases.append(Case(name=example.name, items=[guesses], group=example.work, axes=axes, systems=()))
        systems: dict[tuple[int, tuple[int, ...]], list[str]] = {}
        for name, used in dict.fromkeys((name, used) for used_by in seen.values() for name, used in used_by.items()):
            lengths = tuple(size for size, used_by in seen.items() if used_by.get(name) == used)
            systems.setdefault((used, lengths), []).append(name)
        for (used, lengths), names in systems.items():
            cases += [
                Case(
                    name=f"{example.name}/{'+'.join(map(str, lengths))}/{used}",
                    items=[dataclasses.replace(item, about={"context_tokens": len(ids[-used:])})],
                    group=example.work,
                    memory=[ids[-used:]],
                    local_tokens=settings.window - encoder.room,
                    axes={"context": list(lengths)},
                    subject=example.name,
                    systems=names,
                    stage=f"examples, {lengths[0]:,} tokens",
                )
                for example, ids, item in zip(self.examples, contexts, items, strict=True)
            ]
        return cases


class Encoder:
    """Makes tokens of examples: the context, then the joiner, then each suffix.

    Whitespace where context and suffix meet is the joiner's, so that no suffix is known by it. Of a suffix the first
    `suffix_tokens` are kept. `room` is what joiner and suffix take in a window.
    """

    def __init__(self, tokenizer: Any, joiner: str, suffix_tokens: int) -> None:
        self.tokenizer, self.joiner, self.suffix_tokens = tokenizer, joiner, suffix_tokens
        # The joiner's tokens as they are before a word: two line ends at the end of a text may be one token.
        ids, count = tokenize(tokenizer, joiner + "The"), 0
        while count < len(ids):
            text = str(tokenizer.decode(ids[: count + 1], clean_up_tokenization_spaces=False))
            if len(text) > len(joiner):
                break
            count += 1
        self.joiner_ids = ids[:count]
        self.room = count + suffix_tokens

    def context(self, example: Example) -> list[int]:
        """Return all tokens of a context."""
        return tokenize(self.tokenizer, example.context.rstrip())

    def item(self, example: Example) -> Item:
        """Return the joiner as the question and the beginnings of the suffixes as its candidates, the right one first."""
        return Item(token_ids=self.joiner_ids, candidates=[self._suffix(text.lstrip()) for text in example.suffixes])

    def _suffix(self, text: str) -> list[int]:
        ids = tokenize(self.tokenizer, self.joiner + text)
        count = len(self.joiner_ids)
        # Where the joiner has other tokens before this suffix (digits, say), its usual ones are read nevertheless.
        own = ids[count:] if ids[:count] == self.joiner_ids else tokenize(self.tokenizer, text)
        return own[: self.suffix_tokens]


def views(systems: Sequence[str], contexts: Sequence[int], *, window: int, room: int) -> dict[int, dict[str, int]]:
    """Return, for each length of context, how many tokens of it each system uses.

    Backbone and off use what fits the window, context-N what fits N tokens, all others everything. Where the context fits
    the window, all see the same tokens and no memory, and only backbone and off remain.

    >>> views(["backbone", "context-4096", "on"], [512, 8192], window=1024, room=130)
    {512: {'backbone': 512}, 8192: {'backbone': 894, 'context-4096': 3966, 'on': 8192}}
    """
    local = window - room
    if local < 1:
        raise ValueError(
            f"`window` must hold joiner and suffix, {room} tokens, and one more, got {window}; choose smaller `suffix_tokens`."
        )
    others = [name for name in systems if name not in LOCAL_SYSTEMS]
    if others and max(contexts) <= local:
        raise ValueError(
            f"`contexts` must have one of more than {local} tokens, which fit the window of {window} beside a suffix, for "
            f"{', '.join(others)} to use anything else, got {list(contexts)}; add a longer one, or leave out the systems."
        )

    def used(name: str, length: int) -> int:
        if name in LOCAL_SYSTEMS:
            return min(length, local)
        return min(length, context_size(name) - room) if name.startswith("context-") else length

    return {
        length: {name: used(name, length) for name in systems if name in LOCAL_SYSTEMS or length > local}
        for length in sorted(contexts)
    }


def credit(values: Sequence[float]) -> float:
    """Return 1 where the first value, that of the right suffix, is the highest, 1/n where it is one of n highest, else 0.

    So a scorer that cannot tell suffixes apart is right by chance, and not always. Raises ValueError for what is not finite.

    >>> [credit(values) for values in ([3, 1, 2], [1, 3, 2], [3, 3, 1])]
    [1.0, 0.0, 0.5]
    """
    if not all(map(math.isfinite, values)):
        raise ValueError(f"log-likelihoods must be finite, got {list(values)}; score with `dtype` float32.")
    best = max(values)
    return 1 / values.count(best) if values[0] == best else 0.0


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case.

    >>> words_of("Don't go, Emma!")
    ["don't", 'go', 'emma']
    """
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def baseline_values(
    examples: Sequence[Example], chosen: Sequence[Example]
) -> Iterator[tuple[Example, dict[str, list[float]]]]:
    """Yield each chosen example with the values that every baseline gives to its suffixes.

    A bag of words counts the different words that a suffix shares with the context, over the length of the suffix. Each has the
    weight log(contexts / contexts that have it), of the whole split, `examples`. All words of a suffix count, also those beyond
    the tokens that models are asked about.
    """
    counts = Counter(word for example in examples for word in set(words_of(example.context)))

    def overlap(context: Sequence[str], suffix: Sequence[str]) -> float:
        shared = sorted(set(suffix) & set(context))  # in an order, so that equal sets have equal sums
        return sum(math.log(len(examples) / counts[word]) for word in shared) / max(1, len(suffix))

    for example in chosen:
        context, suffixes = words_of(example.context), [words_of(text) for text in example.suffixes]
        found = {
            "bag-of-words": [overlap(context, suffix) for suffix in suffixes],
            "bag-of-words-near": [overlap(context[-NEAR_WORDS:], suffix) for suffix in suffixes],
            "longest": [float(len(suffix)) for suffix in suffixes],
        }
        yield example, found
