"""`longmem eval`: ask several systems the questions of an evaluation, and leave a folder of results."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longmem.cli import common
from longmem.cli.common import add_command
from longmem.evaluation.registry import CONFIGS, known_tasks, refuse_unknown_task, run_task

EXAMPLES = """\
  longmem eval --list                                            what can be asked
  longmem eval recall output=results/recall                      facts far back; nothing to download
  longmem eval quality data=quality.jsonl limit=40               an estimate with its interval
  longmem eval quality data=quality.jsonl model=runs/books/side-network "systems=[backbone,off,on]"
  longmem eval quality --config my-settings.yaml                 a file of your own

Every evaluation has its settings in a file; each can be replaced behind its name, with values in YAML. The folder gets
settings, versions, raw answers, metrics, tables and figures. The same command goes on with a run that was stopped, and
`longmem report FOLDER ...` puts finished ones on a page. The files that come with the package are in
{folder}.
"""


def add(commands: Any) -> None:
    """Add the command `eval`."""
    summary = "compare memory with other systems on an evaluation"
    evaluate = add_command(commands, "eval", run, summary, EXAMPLES.format(folder=CONFIGS))
    evaluate.add_argument("task", nargs="?", metavar="TASK", help="name of an evaluation; `--list` shows all")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    evaluate.add_argument("--config", type=Path, metavar="FILE", help="file of settings; default: the package's own")
    common.add_device(evaluate)
    evaluate.add_argument("--list", action="store_true", help="list the evaluations, and ask nothing")


def run(arguments: argparse.Namespace) -> None:
    """Run an evaluation to its end, or list all of them."""
    if arguments.list:
        tasks = known_tasks()
        if arguments.json:
            common.print_json({"tasks": tasks})
        else:  # not by rich, which takes a while to import
            print(*(f"{name:{max(map(len, tasks))}}  {summary}" for name, summary in tasks.items()), sep="\n")
        return
    if arguments.task is None:
        raise ValueError("`longmem eval` needs the name of an evaluation; `longmem eval --list` shows all.")
    refuse_unknown_task(arguments.task)  # a wrong name is told before anything slow is imported

    common.use_device(arguments.device)

    from longmem.plots import plot_finished, require_matplotlib

    require_matplotlib()
    console = common.console_for(arguments.json, quiet=arguments.quiet)
    finished = run_task(arguments.task, arguments.overrides, console, arguments.config)
    plot_finished(finished)
    if arguments.json:
        values = {"task": arguments.task, "output": str(finished.folder), "title": finished.title}
        common.print_json({**values, "metrics": finished.metrics})
    else:
        console.print(f"\nIn {finished.folder}: settings, raw answers, metrics, tables and figures.")


def run_script(task: str, overrides: Sequence[str], usage: str | None) -> None:
    """Run an evaluation and draw its figures: all that the scripts in `eval/` do; `device=NAME` is their `--device`.

    Raises SystemExit if settings, model and data do not go together: it says why, and then `usage`.
    """
    from longmem.plots import plot_finished, require_matplotlib

    require_matplotlib()
    try:
        for each in overrides:
            if each.startswith("device="):
                common.use_device(each.removeprefix("device="), "device")
        finished = run_task(task, [each for each in overrides if not each.startswith("device=")])
    except ValueError as error:
        raise SystemExit(f"{error}\n{usage}") from error
    plot_finished(finished)
