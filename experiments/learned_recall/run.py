"""Check that recall is learned: facts, 16,384 tokens of other text, then questions that only memory can answer.

    python experiments/learned_recall/run.py --output results/recall
    python experiments/learned_recall/run.py --seeds 0 --output results/substitute residual=substitute init=backbone

Everything is made from the seed: a tiny backbone is trained and frozen, then its side network. No model, no data.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, which is not installed

from experiments.learned_recall.check import RecallSettings, check_recall
from experiments.learned_recall.task import RecallTask
from longmem.cli.common import console_for
from longmem.console import PlainTable
from longmem.evaluation.tables import markdown_table
from longmem.settings.environment import environment

TITLES = {
    "off": "memory off",
    "wrong": "wrong memory",
    "untrained": "memory on, untrained",
    "on": "memory on",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="settings of LongMemConfig as key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--distance", type=int, default=RecallSettings.distance, help="tokens from facts to questions")
    parser.add_argument("--output", type=Path, required=True, help="folder for config, answers, metrics, table")
    return parser.parse_intermixed_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)  # products this small gain nothing from a second one, and crawl where it is busy
    console = console_for(as_json=False)
    settings, task = RecallSettings(distance=arguments.distance), RecallTask()
    rows, metrics, model_config = [["seed", *TITLES.values(), "chance", "seconds"]], {}, {}
    answers: dict[str, torch.Tensor] = {}
    pairs = (each.partition("=") for each in arguments.settings)
    fields = {name: yaml.safe_load(value) for name, _, value in pairs}
    for seed in arguments.seeds:
        result = check_recall(seed, settings, task, **fields)
        shares = [f"{100 * result.accuracy[system]:.1f} %" for system in TITLES]
        rows.append([str(seed), *shares, f"{100 * task.chance:.1f} %", f"{result.seconds['all']:.0f}"])
        console.print(f"seed {seed}: " + ", ".join(map(" ".join, zip(TITLES.values(), shares, strict=True))))
        metrics[str(seed)] = {"accuracy": result.accuracy, "chance": task.chance, "seconds": result.seconds}
        answers |= {f"{seed}/{system}": right for system, right in result.answers.items()}
        model_config = result.model.config.to_dict()
    console.print(PlainTable(rows))
    arguments.output.mkdir(parents=True, exist_ok=True)
    config = {"run": vars(arguments), "settings": vars(settings), "task": vars(task), "model": model_config}
    for name, content in (("config", config), ("environment", environment()), ("metrics", metrics)):
        (arguments.output / f"{name}.json").write_text(json.dumps(content, indent=2, default=str) + "\n", "utf-8")
    (arguments.output / "table.md").write_text(markdown_table(rows) + "\n", "utf-8")
    save_file(answers, arguments.output / "answers.safetensors")


if __name__ == "__main__":
    main()
