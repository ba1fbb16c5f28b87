"""Tasks of lm-evaluation-harness in a folder: multiple choice, generation and rolling log-likelihoods of made-up texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from tiny_models import some_text

LONG, SHORT = 12, 2  # words


def write_tasks(folder: Path) -> Path:
    """Write three tasks with their data, every other context far longer than the tests' window; return the folder."""
    docs: dict[str, list[dict[str, Any]]] = {"choose": [], "continue": [], "roll": []}
    for number in range(6):
        text = some_text(LONG if number % 2 else SHORT, seed=number)
        group = f"text {number // 2}"
        docs["choose"].append({"text": text, "options": ["cat", "a mat", "dog"], "gold": number % 3, "group": group})
        docs["continue"].append({"text": text, "answer": some_text(1, seed=100 + number), "group": group})
        docs["roll"].append({"page": text})
    configs: dict[str, dict[str, Any]] = {
        "choose": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}} ",  # its blank belongs to the continuation
            "doc_to_choice": "{{options}}",
            "doc_to_target": "gold",
            "target_delimiter": "",
        },
        "continue": {
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["z", "\n"], "max_gen_toks": 4, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
        "roll": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{page}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, config in configs.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(doc) + "\n" for doc in docs[name]), encoding="utf-8")
        kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        whole = {"task": name, "dataset_path": "json", "dataset_kwargs": kwargs, "test_split": "test", **config}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole), encoding="utf-8")
    return folder
