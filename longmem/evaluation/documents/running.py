"""Every system on the windows of every document."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console

from longmem.console import item_progress
from longmem.evaluation.documents.distances import last_distances
from longmem.evaluation.documents.scores import DocumentScores, file_of, load_scores, save_scores
from longmem.evaluation.documents.settings import PerplexitySettings
from longmem.evaluation.documents.text_bytes import scored_bytes
from longmem.evaluation.documents.texts import ScoredText, length_group
from longmem.evaluation.documents.views import Views
from longmem.evaluation.documents.windows import Window, plan_windows
from longmem.evaluation.perplexity import token_losses
from longmem.evaluation.runs import RunFolder
from longmem.model.modeling import LongMemForCausalLM


def evaluate_documents(
    model: LongMemForCausalLM,
    texts: Sequence[ScoredText],
    settings: PerplexitySettings,
    run: RunFolder,
    console: Console,
) -> list[DocumentScores]:
    """Return the scores of all documents, in order; what `run` has from an earlier start is read and not run.

    The losses of a document are in `documents/NUMBER-ID.safetensors` of the run's folder.
    """
    files = [file_of(run.path, number, each.text.document_id) for number, each in enumerate(texts)]
    left = [(each, file) for each, file in zip(texts, files, strict=True) if each.text.document_id not in run]
    if left:
        total, done = sum(len(windows_of(text, settings)) for text, _ in left), 0
        with item_progress("windows", console) as report:
            for text, file in left:
                windows = windows_of(text, settings)

                def progress(finished: int, before: int = done) -> None:
                    report(before + finished, total)

                scores = score_document(model, text, settings, windows, progress)
                done += len(windows)
                save_scores(file, scores)
                run.write([record_of(scores, file.name)])
    return [
        load_scores(file, each.text.document_id, len(each.text.token_ids), settings.systems)
        for each, file in zip(texts, files, strict=True)
    ]


def windows_of(text: ScoredText, settings: PerplexitySettings) -> list[Window]:
    """Return the windows of a document that are scored."""
    return plan_windows(
        len(text.text.token_ids),
        window=settings.window,
        stride=settings.stride,
        limit=settings.windows_per_document,
    )


@torch.no_grad()
def score_document(
    model: LongMemForCausalLM,
    text: ScoredText,
    settings: PerplexitySettings,
    windows: Sequence[Window],
    progress: Callable[[int], None] | None = None,
) -> DocumentScores:
    """Return the losses of all systems on the scored tokens of some windows, which come in order."""
    ids = text.text.token_ids
    views = Views(model, text, settings)
    losses: dict[str, list[torch.Tensor]] = {system: [] for system in settings.systems}
    seconds, preparing = (dict.fromkeys(settings.systems, 0.0) for _ in range(2))
    for number, window in enumerate(windows, start=1):
        for system in settings.systems:
            start = time.perf_counter()
            local, tokens = views.of(system, window)
            prepared = time.perf_counter()
            logits = local(tokens, use_cache=False, logits_to_keep=window.num_scored + 1).logits
            losses[system].append(token_losses(logits, tokens))  # waits for the device
            preparing[system] += prepared - start
            seconds[system] += time.perf_counter() - prepared
        if progress is not None:
            progress(number)
    positions = torch.cat([torch.arange(window.first_scored, window.end) for window in windows])
    sizes = torch.tensor([window.num_scored for window in windows])
    return DocumentScores(
        text.text.document_id,
        len(ids),
        positions=positions,
        token_ids=ids[positions],
        windows=torch.arange(len(windows)).repeat_interleave(sizes),
        starts=torch.tensor([window.start for window in windows]).repeat_interleave(sizes),
        distances=last_distances(ids, settings.ngram)[positions],
        num_bytes=scored_bytes(model.tokenizer, ids, windows),
        losses={system: torch.cat(own) for system, own in losses.items()},
        seconds=seconds,
        preparing_seconds=preparing,
    )


def record_of(scores: DocumentScores, file: str) -> dict[str, object]:
    """Return the line of a document in the predictions; what else there is stands in its file."""
    return {
        "id": scores.document_id,
        "tokens": scores.num_tokens,
        "group": length_group(scores.num_tokens),
        "windows": len(scores.num_bytes),
        "scored_tokens": scores.num_scored,
        "scored_bytes": int(scores.num_bytes.sum()),
        "loss": {system: losses.double().mean().item() for system, losses in scores.losses.items()},
        "seconds": scores.seconds,
        "preparing_seconds": scores.preparing_seconds,
        "file": file,
    }
