"""Evaluate what happens to a memory when the writer moves, and what a refresh policy costs and recovers.

    run="python experiments/staleness/run.py experiments/staleness/staleness.yaml"
    $run output=results/staleness
    $run output=results/gentle readers.tune_rate=0.001 "regimes=[fine-tune]"
    $run output=results/learning experiment=learning num_keys=128
    $run output=results/content experiment=content num_keys=128

Experiments: policies (an encoder changes under a bank, and every policy answers the same questions), learning (a reader is
trained beside a writer that stands still or moves), content (texts that are superseded). Everything is made from seeds, with
tiny backbones that are trained on the recall task. No model, no data.

Started again with the same settings, a stopped run goes on where it was; trained models are kept in its folder.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, which is not installed

from experiments.staleness.figures import plot_experiment
from experiments.staleness.running import evaluate_staleness, markdown, sections, summarize_staleness, title_of
from experiments.staleness.settings import StalenessSettings, read_arguments
from longmem.cli.common import console_for
from longmem.console import PlainTable
from longmem.plots import require_matplotlib


def main() -> None:
    settings = read_arguments(StalenessSettings, __doc__)
    require_matplotlib()
    torch.set_num_threads(1)  # products this small gain nothing from a second one, and crawl where it is busy
    console = console_for(as_json=False, markup=True)
    run = evaluate_staleness(settings, console)
    metrics = summarize_staleness(settings, run.records)
    for heading, rows in sections(settings, metrics, intervals=False):
        console.print(f"\n[bold]{heading}[/]\n", PlainTable(rows))
    title = title_of(settings)
    run.finish(title=title, metrics=metrics, table=markdown(settings, metrics), seed=min(settings.seeds))
    plot_experiment(run.path / f"{settings.experiment}.png", metrics, title=title)


if __name__ == "__main__":
    main()
