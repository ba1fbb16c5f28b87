"""Evaluate recall at a distance: one fact far back in a long memory, and a question about it at the end.

    python eval/eval_recall.py configs/eval/recall.yaml output=results/recall
    python eval/eval_recall.py configs/eval/recall.yaml output=results/far haystack=my-books storage_dtype=int8 \\
        "sizes=[65536, 262144, 1048576]" bank_folder=results/far-bank "systems=[backbone, off, on, wrong]"
    python eval/eval_recall.py configs/eval/recall.yaml output=results/longeval longeval=LongEval/lines \\
        "tasks=[longeval-lines, longeval-topics]"

Systems, all asked the same: the backbone with the question alone, or with the end of the text in a longer window; with
passages by BM25; LongMem with memory off, on, and wrong (the same text without any fact). The text is encoded once.
Figures show accuracy by size of the memory and distance of the fact.

Started again with the same settings, a stopped run goes on where it was.
"""

from longmem.cli.common import console_for
from longmem.console import plain_table
from longmem.evaluation.distance import DistanceSettings, evaluate_distance, markdown, sections, summarize_distance
from longmem.evaluation.results import title_of_system
from longmem.evaluation.runs import open_evaluated, read_arguments
from longmem.plots import plot_distance, require_matplotlib


def main() -> None:
    settings = read_arguments(DistanceSettings, __doc__)
    require_matplotlib()
    console = console_for(as_json=False, markup=True)
    run = evaluate_distance(settings, open_evaluated(settings), console)
    metrics = summarize_distance(run.records, settings.seed)
    for heading, rows in sections(metrics):
        console.print(f"\n[bold]{heading}[/]\n", plain_table(rows, emphasized=title_of_system("on")))
    title = f"{settings.model_title}: recall at a distance"
    run.finish(title=title, metrics=metrics, table=markdown(metrics), seed=settings.seed)
    for task, values in metrics["tasks"].items():
        xlabel = "file of LongEval" if task in settings.longeval_tasks else "tokens in memory"
        plot_distance(run.path / f"{task}.png", values, title=f"{settings.model_title}: {task}", xlabel=xlabel)


if __name__ == "__main__":
    main()
