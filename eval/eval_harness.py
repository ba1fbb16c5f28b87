"""Evaluate with EleutherAI's lm-evaluation-harness: the backbone as its model `hf`, LongMem with memory off and on.

    python eval/make_harness_data.py quality LEval-data/quality.jsonl --output data/harness
    python eval/eval_harness.py configs/eval/harness.yaml data=data/harness output=results/harness limit=40
    python eval/eval_harness.py configs/eval/harness.yaml "tasks=[hellaswag, wikitext]" output=results/short

A context that fits the window is scored as lm-eval scores it. Of a longer one `backbone` and `off` see the end, `on` reads
the rest in a memory that holds nothing else. lm-eval's own command line has the model as well:
`python -m longmem.evaluation.harness run --model longmem --model_args pretrained=smollm2-135m,memory=on --tasks ...`.
"""

from longmem.cli.common import console_for
from longmem.console import plain_table
from longmem.evaluation.harness.run import run_tasks
from longmem.evaluation.harness.settings import HarnessSettings
from longmem.evaluation.harness.tables import accuracies_of, markdown, summarize, tables
from longmem.evaluation.harness.tasks import describe_tasks, load_tasks
from longmem.evaluation.runs import RunFolder, describe, open_evaluated, read_arguments
from longmem.plots import plot_accuracies, require_matplotlib


def main() -> None:
    settings = read_arguments(HarnessSettings, __doc__)
    require_matplotlib()
    console = console_for(as_json=False, markup=True)
    manager, tasks = load_tasks(settings)
    model = open_evaluated(settings)
    config = describe(settings, model, describe_tasks(tasks, settings.limit))
    title = f"{settings.model_title} in lm-evaluation-harness: {', '.join(settings.tasks)}"
    with RunFolder(settings.output, config) as run:
        run_tasks(model, settings, manager, tasks, run, console.print)
        metrics = summarize(run.records, tasks, settings)
        run.finish(title=title, metrics=metrics, table=markdown(metrics), seed=settings.seed)
    for heading, table in tables(metrics).items():
        console.print(f"\n[bold]{heading}[/]\n", plain_table(table))
    panels = accuracies_of(metrics)
    if panels:
        plot_accuracies(run.path / "harness.png", panels, title=title)


if __name__ == "__main__":
    main()
