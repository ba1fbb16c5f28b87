"""Measure the perplexity of long documents, by their length, and how far back lies what memory helps to predict.

    python eval/eval_perplexity.py configs/eval/perplexity.yaml data=my-books output=results/my-books
    python eval/eval_perplexity.py configs/eval/perplexity.yaml data=books/manifest.json split=test limit=null \\
        model=my-longmem "systems=[backbone,context-8192,off,on,wrong]" output=results/test-books
    python eval/eval_perplexity.py configs/eval/perplexity.yaml data=allenai/some-corpus num_documents=100 \\
        windows_per_document=null memory_tokens=null output=results/every-token

A document is read in windows whose last `stride` tokens are scored, by all systems on the same tokens. Everything before a
window is in the document's memory, up to `memory_tokens`; the wrong memory is the next document's. The losses of every
token are in OUTPUT/documents. A stopped run goes on, with the same command, with the documents that are not finished.
"""

from pathlib import Path

from longmem.cli.common import console_for
from longmem.console import plain_table
from longmem.evaluation.documents import (
    PerplexitySettings,
    distance_rows,
    evaluate_documents,
    read_texts,
    summarize_documents,
    tables,
)
from longmem.evaluation.documents.tables import distance_heading, narrow_tables
from longmem.evaluation.documents.texts import digest_of
from longmem.evaluation.results import title_of_system
from longmem.evaluation.runs import RunFolder, describe, open_evaluated, read_arguments
from longmem.plots import plot_distances, plot_documents, require_matplotlib


def main() -> None:
    settings = read_arguments(PerplexitySettings, __doc__)
    require_matplotlib()
    console = console_for(as_json=False, markup=True)
    model = open_evaluated(settings)
    settings.validate_for(model)
    texts = read_texts(model.tokenizer, settings)
    title = f"{settings.model_title}: perplexity of {len(texts)} documents, windows of {settings.window:,} tokens"
    with RunFolder(settings.output, describe(settings, model, {"documents": digest_of(texts)})) as run:
        metrics = summarize_documents(evaluate_documents(model, texts, settings, run, console), settings)
        run.finish(title=title, metrics=metrics, table=tables(metrics), seed=settings.seed)
    for heading, rows in narrow_tables(metrics):
        console.print(f"\n[bold]{heading}[/]\n", plain_table(rows, emphasized=title_of_system("on")))
    if len(settings.systems) > 1:
        plot_documents(Path(settings.output) / "perplexity.png", metrics, title=title)
    if metrics["distances"] is not None:
        console.print(f"\n[bold]{distance_heading(metrics)}[/]\n", plain_table(distance_rows(metrics, brief=True)))
        plot_distances(Path(settings.output) / "distances.png", metrics, title=distance_heading(metrics))


if __name__ == "__main__":
    main()
