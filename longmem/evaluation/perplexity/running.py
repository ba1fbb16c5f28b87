"""Every system on the windows of every text."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from rich.console import Console

from longmem.console import PlainTable, counting, token_progress
from longmem.evaluation.folder import RunFolder, describe
from longmem.evaluation.perplexity.scoring import Cut, GrowingMemory, Starts, WindowScores, make_views, score_windows
from longmem.evaluation.perplexity.settings import PerplexitySettings
from longmem.evaluation.perplexity.summary import length_group, markdown, sections, summarize_texts
from longmem.evaluation.perplexity.texts import (
    Text,
    TextScores,
    digest_of,
    file_of,
    last_distances,
    load_scores,
    read_texts,
    save_scores,
    scored_bytes,
)
from longmem.evaluation.runner import Finished
from longmem.evaluation.settings import open_evaluated
from longmem.evaluation.systems.making import title_of_system
from longmem.model.modeling import LongMemForCausalLM


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The evaluation of perplexity: windows are scored and nothing is asked, so it has a loop of its own."""

    settings: PerplexitySettings

    name: ClassVar[str] = "perplexity"
    kind: ClassVar[type[PerplexitySettings]] = PerplexitySettings

    def run(self, console: Console) -> Finished:
        """Score what is missing, write the whole result folder and show brief tables; figures are drawn by who calls."""
        settings, model = self.settings, open_evaluated(self.settings)
        settings.validate_for(model)
        texts = read_texts(model.tokenizer, settings)
        of_documents = f"of {len(texts)} documents, windows of {settings.window:,} tokens"
        what = of_documents if settings.plan == "documents" else f"on {len(texts)} books"
        title = f"{settings.model_title}: perplexity {what}"
        with RunFolder(settings.output, describe(settings, model, {"documents": digest_of(texts)})) as run:
            metrics = summarize_texts(evaluate_texts(model, texts, settings, run, console), settings)
            run.finish(title=title, metrics=metrics, table=markdown(metrics), seed=settings.seed)
        for heading, tables in sections(metrics, brief=True):
            console.print(f"\n{heading}\n", *(PlainTable(rows, title_of_system("on")) for rows in tables), markup=False)
        return Finished(run.path, title, metrics)


class PerplexityOfBooks(Perplexity):
    """The same with the default settings of books."""

    name: ClassVar[str] = "perplexity-books"


def evaluate_texts(
    model: LongMemForCausalLM, texts: Sequence[Text], settings: PerplexitySettings, run: RunFolder, console: Console
) -> list[dict[Cut, TextScores]]:
    """Return the scores of all texts by cut, in order; what `run` has from an earlier start is read and not run."""
    files = [file_of(run.path, number, each.name) for number, each in enumerate(texts)]
    left = [(each, file) for each, file in zip(texts, files, strict=True) if each.name not in run]
    if left:
        longest = max(map(settings.memorized, settings.cuts))
        starts = Starts(model, longest, index=settings.index, batch_size=settings.batch_size)
        runs = {(system, settings.run_on(cut, system)) for cut in settings.cuts for system in settings.systems}
        windows = [settings.windows(cut, len(each.token_ids), system) for each, _ in left for system, cut in runs]
        with token_progress("scored", console) as report:
            progress = counting(report, sum(window.num_scored for own in windows for window in own))
            for each, file in left:
                scores = score_text(model, each, settings, starts, progress)
                save_scores(file, each, scores)
                run.write([record_of(scores, file.name)])
    return [load_scores(file) for file in files]


def score_text(
    model: LongMemForCausalLM,
    text: Text,
    settings: PerplexitySettings,
    starts: Starts,
    progress: Callable[[int], None] | None = None,
) -> dict[Cut, TextScores]:
    """Return the scores of all systems on a text by cut; `starts` has the memories of books, `progress` is told of windows."""
    ids, is_book = text.token_ids, settings.plan == "books"
    distances, found = last_distances(ids, settings.ngram), {}
    done: dict[tuple[str, Cut], WindowScores] = {}
    for cut in settings.cuts:
        memories, encoding = memories_of(model, text, settings, starts, cut)
        back, systems = None if is_book else settings.memory_tokens, {}
        views = make_views(settings.systems, model, ids, cut, memories, memory_tokens=back, is_growing=settings.grow)
        for name, view in views.items():
            run_on = settings.run_on(cut, name)
            if (name, run_on) not in done:
                run = settings.windows(run_on, len(ids), name)
                scores = score_windows(view, run, with_reads=is_book, progress=progress)
                preparing = scores.preparing_seconds + encoding.get(name, 0.0)
                done[name, run_on] = dataclasses.replace(scores, preparing_seconds=preparing)
            systems[name] = done[name, run_on] if run_on == cut else done[name, run_on].last(cut.scored)
        windows = settings.windows(cut, len(ids))
        own = tuple(distances[window.first_scored : window.end] for window in windows)
        num_bytes = scored_bytes(model.tokenizer, ids, windows)
        found[cut] = TextScores(text.name, len(ids), tuple(windows), own, num_bytes, systems)
    return found


def memories_of(
    model: LongMemForCausalLM, text: Text, settings: PerplexitySettings, starts: Starts, cut: Cut
) -> tuple[dict[str, Any], dict[str, float]]:
    """Return what systems read, and the seconds that this took already; memories of documents are written as they grow."""
    memories: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    options: dict[str, Any] = {"index": settings.index, "batch_size": settings.batch_size}
    for name, ids in (("on", text.token_ids), ("wrong", text.wrong_ids)):
        if name in settings.systems and settings.plan == "books":
            memories[name], seconds[name] = starts.bank(ids, settings.memorized(cut))
        elif name in settings.systems:
            memories[name] = GrowingMemory(model, ids, capacity_tokens=settings.memory_tokens, **options)
    return memories, seconds


def record_of(scores: Mapping[Cut, TextScores], file: str) -> dict[str, Any]:
    """Return the line of a text in the predictions; what else there is stands in its file."""
    cuts: dict[str, Any] = {}
    for cut, one in scores.items():
        counts = {"windows": len(one.windows), "scored_tokens": sum(map(len, one.distances))}
        cuts[str(cut)] = {**counts, "scored_bytes": int(one.num_bytes.sum())}
        for name in ("loss", "seconds", "preparing_seconds"):
            cuts[str(cut)][name] = {system: getattr(each, name) for system, each in one.systems.items()}
    return {"id": one.name, "tokens": one.num_tokens, "group": length_group(one.num_tokens), "cuts": cuts, "file": file}
