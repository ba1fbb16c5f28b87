"""Evaluate real text with a stale memory: the backbone was fine-tuned since, and every refresh policy reads on.

    python experiments/staleness/run_texts.py experiments/staleness/stale-texts.yaml data=my-books output=results/texts

The bank holds the tokens before some windows of a text, written by the original backbone; a copy of the backbone, all of whose
weights were tuned, reads the windows. Systems: memory off, a bank written anew, the old bank as it is, and the policies.

Started again with the same settings, a stopped run goes on where it was; tuned weights are kept in its folder.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, which is not installed

from experiments.staleness.figures import plot_stale_texts
from experiments.staleness.settings import read_arguments
from experiments.staleness.text_tables import summarize_stale_texts, text_markdown, text_sections
from experiments.staleness.texts import StaleTextSettings, evaluate_stale_texts
from longmem.cli.common import console_for
from longmem.console import PlainTable
from longmem.evaluation.settings import open_evaluated
from longmem.plots import require_matplotlib


def main() -> None:
    settings = read_arguments(StaleTextSettings, __doc__)
    require_matplotlib()
    console = console_for(as_json=False, markup=True)
    run = evaluate_stale_texts(settings, open_evaluated(settings), console)
    metrics = summarize_stale_texts(run.records, settings.seed)
    for heading, rows in text_sections(metrics):
        console.print(f"\n[bold]{heading}[/]\n", PlainTable(rows))
    title = f"{settings.model_title}: real text with a stale memory"
    run.finish(title=title, metrics=metrics, table=text_markdown(metrics), seed=settings.seed)
    plot_stale_texts(run.path / "stale-texts.png", metrics, title=title)


if __name__ == "__main__":
    main()
