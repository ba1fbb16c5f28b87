"""Which of six passages begins the next chapter? ChapterBreak suffix identification at several lengths of context.

    python eval/eval_chapterbreak.py configs/eval/chapterbreak.yaml data=my.json output=results/chapterbreak limit=40
    python eval/eval_chapterbreak.py configs/eval/chapterbreak.yaml data=simsun131/chapterbreak split=pg19 \\
        "contexts=[256,1024,8192]" "systems=[backbone,context-8192,on]" output=results/pg19

eval/build_chapterbreak.py makes such data from books of your own. A run that was stopped goes on with the same command.
"""

import dataclasses
from pathlib import Path

from longmem.cli.common import console_for
from longmem.console import plain_table
from longmem.evaluation.chapterbreak import (
    Asking,
    ChapterBreakSettings,
    chapterbreak_rows,
    load_split,
    margin_rows,
    run_chapterbreak,
    summarize_chapterbreak,
)
from longmem.evaluation.results import markdown_table
from longmem.evaluation.runs import RunFolder, describe, digest, open_evaluated, read_arguments
from longmem.plots.chapterbreak import plot_chapterbreak
from longmem.plots.style import require_matplotlib


def main() -> None:
    settings = read_arguments(ChapterBreakSettings, __doc__)
    require_matplotlib()
    console = console_for(as_json=False)
    split = load_split(settings.data, split=settings.split, file=settings.file, longest=max(settings.contexts))
    model = open_evaluated(settings)
    work = Asking(settings, model, split)
    data = {"split": split.name, "examples": digest([dataclasses.asdict(example) for example in split.examples])}
    with RunFolder(settings.output, describe(settings, model, data)) as run:
        run_chapterbreak(work, run, console)
        metrics = summarize_chapterbreak(settings, run.records)
        rows = chapterbreak_rows(metrics)
        count = f"{metrics['examples']} examples of {metrics['works']} works"
        title = f"{settings.model_title} on ChapterBreak {split.name}: {count}"
        table = f"{markdown_table(rows)}\n\n{markdown_table(margin_rows(metrics))}\n"
        run.finish(title=title, metrics=metrics, table=table, seed=settings.seed)
    console.print(title)
    console.print(plain_table([row[:4] for row in rows]))  # all columns are too many for a terminal
    console.print(plain_table([[*row[:2], *row[4:]] for row in rows if row[-1]]))
    console.print(plain_table(margin_rows(metrics)))
    console.print(f"Chance is {metrics['chance']:.1f} %.")
    plot_chapterbreak(Path(settings.output) / "accuracy.png", metrics, title=title)


if __name__ == "__main__":
    main()
