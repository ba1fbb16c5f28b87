"""Score in-context learning: demonstrations in the window, thousands more in memory, with several seeds.

    python eval/eval_in_context.py configs/eval/in-context.yaml data=icl/original output=results/in-context
    python eval/eval_in_context.py configs/eval/in-context.yaml data=icl/original output=results/sst-2 \\
        "sets=[sst-2]" "seeds=[1]" limit=100 "systems=[backbone,on]"
    python eval/eval_in_context.py configs/eval/in-context.yaml output=results/squad "sets=[squad]" \\
        squad.data=dev-v1.1.json limit=100

The first two need the classification sets in the layout of LongMem's data/icl/original, or `sources` that name data sets
on the Hub. The folder gets settings, raw predictions, metrics, tables and a figure; the same command goes on where it was
stopped.
"""

from __future__ import annotations

from pathlib import Path

from longmem.cli.common import console_for
from longmem.console import plain_table
from longmem.evaluation.in_context import (
    InContextSettings,
    all_tables,
    ask_all,
    compute_metrics,
    demonstration_rows,
    make_tasks,
    markdown_of,
    panels_of,
)
from longmem.evaluation.runs import RunFolder, describe, open_evaluated, read_arguments
from longmem.plots.accuracy import plot_accuracies
from longmem.plots.style import require_matplotlib


def main() -> None:
    settings = read_arguments(InContextSettings, __doc__)
    require_matplotlib()
    console = console_for(as_json=False)
    model = open_evaluated(settings)
    tasks = make_tasks(settings, model)
    title = f"{settings.model_title}: in-context learning, {', '.join(settings.sets)}"
    config = describe(settings, model, data={name: task.digest for name, task in tasks.items()})
    with RunFolder(settings.output, config) as folder:
        ask_all(settings, model, tasks, folder, console)
        metrics = compute_metrics(settings, folder.records)
        folder.finish(title=title, metrics=metrics, table=markdown_of(metrics), seed=settings.seed)
    tables = {**all_tables(metrics, brief=True), "demonstrations before a question": demonstration_rows(metrics)}
    for heading, rows in tables.items():
        console.print(f"\n{heading}")
        console.print(plain_table(rows))
    figure = Path(settings.output) / "accuracy.png"
    plot_accuracies(figure, panels_of(metrics), title=title, measure="score, mean over seeds")
    console.print(f"\nIntervals, differences and all results are in {settings.output}.")


if __name__ == "__main__":
    main()
