"""Tasks of lm-evaluation-harness in a folder: multiple choice, generation and rolling log-likelihoods of made-up texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from tiny_models import some_text

LONG, SHORT = 12, 2  # words
# Makes its data as RULER's tasks do: of the asked lengths, measured with a tokenizer opened by name, drawn without a seed.
MADE = """
import random
import datasets
import numpy
from transformers import AutoTokenizer

def items(tokenizer, max_seq_lengths, **others):
    measure, found = AutoTokenizer.from_pretrained(tokenizer), []
    for length in 3 * max_seq_lengths:
        text = "".join(random.choices("abc ", k=length - 1)) + "xyz"[numpy.random.randint(3)]
        assert len(measure(text).input_ids) == length
        found.append({"input": text, "outputs": [text[-1]], "max_length": length})
    return {"test": datasets.Dataset.from_list(found)}

def counted(doc, results):
    return {"4096": -1.0, str(doc["max_length"]): float(doc["outputs"][0] in results[0])}

def mean(values):
    kept = [value for value in values if value != -1]
    return sum(kept) / len(kept) if kept else -1
"""
MADE_CONFIG = """
task: made
dataset_path: ""
dataset_name: ""
output_type: generate_until
test_split: test
custom_dataset: !function made.items
doc_to_text: "{{input}}"
doc_to_target: "{{outputs}}"
process_results: !function made.counted
generation_kwargs: {until: [], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: "12", aggregation: !function made.mean, higher_is_better: true}
  - {metric: "40", aggregation: !function made.mean, higher_is_better: true}
  - {metric: "80", aggregation: !function made.mean, higher_is_better: true}
  - {metric: "4096", aggregation: !function made.mean, higher_is_better: true}
"""


def write_tasks(folder: Path) -> Path:
    """Write three tasks with their data, every other context far longer than the tests' window, and one that makes its own;
    return the folder."""
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
    (folder / "made.py").write_text(MADE, encoding="utf-8")
    (folder / "made.yaml").write_text(MADE_CONFIG, encoding="utf-8")
    for name, config in configs.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(doc) + "\n" for doc in docs[name]), encoding="utf-8")
        kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        whole = {"task": name, "dataset_path": "json", "dataset_kwargs": kwargs, "test_split": "test", **config}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole), encoding="utf-8")
    return folder
