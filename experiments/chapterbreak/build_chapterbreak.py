"""Make examples in ChapterBreak's format from books, whose chapters begin with a line that says so.

    build="python experiments/chapterbreak/build_chapterbreak.py"
    $build my-books --output my.json
    $build my-books/manifest.json --split test --output my-test.json.gz
    $build my-books --output my.json "chapter=^(Chapter|BOOK)\\b.*" context_words=3000

A folder is searched for .txt files with its subfolders; a manifest is a JSON list of {"file": ..., "split": ...} whose
files lie beside it. The rules, as key=value, are the fields of `BuildRules`. The output is what `longmem eval chapterbreak`
reads as `data`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, which is not installed

from experiments.chapterbreak.building import BuildRules, build, save_split
from longmem.cli.common import console_for
from longmem.console import PlainTable
from longmem.data.sources import files_of_split
from longmem.evaluation.tasks.chapterbreak import ChapterBreak, baseline_values, credit, load_split
from longmem.settings import read_settings


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path, help="folder of .txt files, or JSON manifest")
    parser.add_argument("rules", nargs="*", metavar="key=value", help="fields of BuildRules")
    parser.add_argument("--split", default="test", help="name of the split; with a manifest, also which files to take")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write; compressed if it ends in .gz")
    return parser.parse_intermixed_args()


def main() -> None:
    arguments = parse_arguments()
    is_folder = arguments.books.is_dir()
    files = sorted(arguments.books.rglob("*.txt")) if is_folder else files_of_split(arguments.books, arguments.split)
    works = build(files, read_settings(BuildRules, None, arguments.rules))
    save_split(arguments.output, arguments.split, works)
    examples = load_split(str(arguments.output)).examples
    console = console_for(as_json=False)
    console.print(f"{len(examples)} examples of {len(works)} of {len(files)} books in {arguments.output}")
    scored = [values for _, values in baseline_values(examples, examples)]
    rows = [["without a model", "accuracy, %"]]
    for name, title in ChapterBreak.baselines.items():
        rows.append([title, f"{100 * sum(credit(values[name]) for values in scored) / len(scored):.1f}"])
    console.print(PlainTable(rows))


if __name__ == "__main__":
    main()
