"""Evaluate memory on questions about long documents (QuALITY, multiple choice) and conversations (LoCoMo, written answers).

    python eval/eval_qa.py configs/eval/qa-quality.yaml data=quality.jsonl output=results/quality limit=40
    python eval/eval_qa.py configs/eval/qa-quality.yaml data=QuALITY.v1.0.1.htmlstripped.dev style=letter output=results/letters
    python eval/eval_qa.py configs/eval/qa-locomo.yaml data=locomo10.json output=results/locomo "systems=[backbone,bm25,on]"

The end of a document stands in the window, the rest is in memory (LongMem), searched for passages (bm25, hidden) or cut
off (backbone). Intervals are over documents. A stopped run goes on with the same command.
For a system of your own see `longmem.evaluation.qa.answer_documents`.
"""

from pathlib import Path

from longmem.cli.common import console_for
from longmem.console import item_progress, plain_table
from longmem.evaluation import qa
from longmem.evaluation.results import title_of_system
from longmem.evaluation.runs import RunFolder, describe, open_evaluated, read_arguments
from longmem.plots import plot_accuracies, require_matplotlib

NAMES = {"quality": "QuALITY", "locomo": "LoCoMo"}


def main() -> None:
    settings = read_arguments(qa.QASettings, __doc__)
    require_matplotlib()
    console = console_for(as_json=False, markup=True)
    documents = qa.read_documents(settings)
    model = open_evaluated(settings)
    plans = qa.plan_documents(model, documents, settings)
    title = f"{settings.model_title} on {NAMES[settings.task]}"
    with RunFolder(settings.output, describe(settings, model, qa.describe_plans(plans))) as run:
        with item_progress("questions", console) as report:
            qa.evaluate_qa(model, plans, settings, run, report)
        metrics = qa.summarize_qa(run.records, settings.task, settings.style, settings.seed)
        for heading, rows in qa.sections(metrics):
            console.print(f"\n[bold]{heading}[/]\n", plain_table(rows, emphasized=title_of_system("on")))
        run.finish(title=title, metrics=metrics, table=qa.markdown(metrics), seed=settings.seed)
    figure = Path(settings.output) / "accuracy.png"
    summary = metrics["summary"]
    plot_accuracies(
        figure, qa.panels_of(metrics), title=title, measure=summary["measure"], chance=summary.get("chance")
    )


if __name__ == "__main__":
    main()
