"""Evaluate what happens to a memory when the encoder that wrote it changes: what each refresh policy costs and recovers.

    python eval/eval_staleness.py configs/eval/staleness.yaml output=results/staleness
    python eval/eval_staleness.py configs/eval/staleness.yaml output=results/gentle readers.tune_rate=0.001 \\
        "regimes=[fine-tune]"

Everything is made from seeds: tiny backbones and their side networks are trained on the recall task, one of them writes a
bank of documents, and another one, or the same one trained further, answers questions from it. No model, no data.

Started again with the same settings, a stopped run goes on where it was; trained models are kept in its folder.
"""

import torch

from longmem.commands.opening import console_for
from longmem.console import plain_table
from longmem.evaluation.runs import read_arguments
from longmem.evaluation.staleness import StalenessSettings, evaluate_staleness, markdown, sections, summarize_policies
from longmem.plots import plot_policies, require_matplotlib


def main() -> None:
    settings = read_arguments(StalenessSettings, __doc__)
    require_matplotlib()
    torch.set_num_threads(1)  # products this small gain nothing from a second one, and crawl where it is busy
    console = console_for(as_json=False, markup=True)
    run = evaluate_staleness(settings, console)
    metrics = summarize_policies(run.records)
    for heading, rows in sections(metrics, intervals=False):
        console.print(f"\n[bold]{heading}[/]\n", plain_table(rows))
    title = "What refresh policies cost and recover"
    run.finish(title=title, metrics=metrics, table=markdown(metrics), seed=min(settings.seeds))
    plot_policies(run.path / "policies.png", metrics, title=title)


if __name__ == "__main__":
    main()
