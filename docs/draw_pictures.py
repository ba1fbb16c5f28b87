"""Draw the pictures of recall and of cost from the results in this folder: `make pictures`.

New figures: put the run's `metrics.json`, or what `benchmarks/bench_cost.py --output` wrote, in the place of the old one.
"""

from pathlib import Path

from longmem.files import read_json
from longmem.plots import plot_cost, plot_runs

DOCS = Path(__file__).parent
RECALL = ("recall-4k", "recall-65k")  # runs of `longmem eval recall`, each for its own sizes


def main() -> None:
    runs = [read_json(DOCS / "results/smollm2-parity/runs" / name / "metrics.json") for name in RECALL]
    title = "SmolLM2-135M: one fact in so many tokens, its value among ten"
    plot_runs(DOCS / "pictures/recall.png", runs, title=title)
    costs = [read_json(file) for file in sorted((DOCS / "results/cost").glob("*.json"))]
    plot_cost(
        DOCS / "pictures/cost.png", costs, title="SmolLM2-135M with the packaged side network, one thread of a CPU"
    )


if __name__ == "__main__":
    main()
