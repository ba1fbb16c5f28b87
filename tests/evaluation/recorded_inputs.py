"""What the recorded evaluations are run on: a tiny model in which no two systems agree, small texts, and settings."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from in_context_data import save_squad
from tiny_models import save_tiny_backbone, some_text
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from experiments.learned_recall.check import add_side_network, new_backbone
from experiments.learned_recall.task import RecallTask
from longmem import LongMemForCausalLM

WRITTEN = "npbtg"  # letters with which words of labels begin
ALL_SYSTEMS = ("bm25", "hidden", "off", "on", "wrong")

# A recall task in which every second token is a value, so that models which have learned nothing are right now and then.
RECALL = {"num_keys": 40, "num_values": 16, "num_words": 4}

# By kind of evaluation, in plain words: how to tell a runner is the business of the adapters in `recorded_runs`.
SETTINGS: dict[str, dict[str, Any]] = {
    "documents": {
        "systems": ["backbone", "context-48", *ALL_SYSTEMS],
        "window": 32,
        "stride": 16,
        "windows_per_document": 2,
        "memory_tokens": 128,
        "ngram": 8,
    },
    "one-document": {
        "systems": ["backbone", "off", "on", "wrong"],
        "window": 32,
        "stride": 16,
        "windows_per_document": None,
        "memory_tokens": None,
        "ngram": 3,
    },
    "books": {"cuts": ["16/16", "32/16"], "memory_tokens": 48, "windows": 3, "context": 40, "context_windows": 2},
    "recall": {
        "tasks": ["passkey", "needle"],
        "systems": ["backbone", "context-300", *ALL_SYSTEMS],
        "window": 256,
        "sizes": [256, 512],
        "depths": [0.0, 1.0],
        "items": 1,
        "num_choices": 3,
        "max_new_tokens": 2,
    },
    "recall-together": {
        "tasks": ["key-value", "needle"],
        "systems": ["backbone", "off", "on", "wrong"],
        "window": 256,
        "sizes": [512],
        "distances": [0, 300],
        "items": 2,
        "num_choices": 3,
        "pairs": 2,
        "needles": "together",
        "wrong_values": "present",
        "storage_dtype": "int8",
    },
    "longeval": {
        "tasks": ["longeval-lines", "longeval-topics"],
        "systems": ["backbone", "context-300", *ALL_SYSTEMS],
        "window": 200,
        "num_choices": 3,
        "max_new_tokens": 2,
    },
    "in-context": {
        "sets": ["sst-2", "sst-5"],
        "systems": ["backbone", "bm25", "off", "on", "wrong"],
        "window": 200,
        "seeds": [1, 2],
        "demonstrations": 2,
        "memory_demonstrations": 5,
        "limit": 3,
    },
    "in-context-one-set": {
        "sets": ["mr"],
        "systems": ["backbone", "off", "on", "wrong"],
        "window": 200,
        "seeds": [3],
        "demonstrations": 2,
        "memory_demonstrations": 6,
        "limit": 6,
    },
    "squad": {
        "sets": ["squad"],
        "systems": ["backbone", "context-400", *ALL_SYSTEMS],
        "window": 200,
        "seeds": [1],
        "limit": 6,
        "squad": {"demonstrations": 1, "memory_demonstrations": 4, "max_new_tokens": 2},
    },
    "chapterbreak": {
        "systems": ["backbone", "context-64", *ALL_SYSTEMS],
        "window": 32,
        "contexts": [16, 100],
        "suffix_tokens": 8,
        "books": {
            "context_words": 40,
            "slack_words": 10,
            "suffix_words": 10,
            "shortest_suffix": 7,
            "longest_suffix": 13,
            "negatives": 3,
            "boundaries": 2,
        },
    },
    "quality": {
        "style": "text",
        "systems": ["backbone", "context-250", *ALL_SYSTEMS],
        "window": 200,
        "local_tokens": 40,
        "limit": 5,
    },
    "quality-letters": {
        "style": "letter",
        "systems": ["backbone", "off", "on", "wrong"],
        "window": 200,
        "local_tokens": 40,
        "instruction": "Tell:",
    },
    "locomo": {
        "systems": ["backbone", "context-192", *ALL_SYSTEMS],
        "window": 128,
        "local_tokens": 40,
        "max_new_tokens": 2,
    },
    "harness": {"tasks": ["choose", "continue", "roll"], "systems": ["backbone", "off", "on"], "window": 16},
    "stale-texts": {
        "policies": ["eager", "lazy", "bounded:max_lag=0,on_violation=mask", "bounded:max_lag=0,budget_tokens=16"],
        "learning_rates": [1e-3, 1e-2],
        "seeds": [0],
        "texts": 2,
        "memory_tokens": 64,
        "window": 16,
        "windows": 3,
    },
    "staleness-policies": {
        "seeds": [0, 1],
        "recall task": RECALL,
        "systems": ["never", "eager", "lazy", "sweep", "affine-5-unjudged", "mask", "stale-weight", "fresh"],
        "changes": ["swap", "fine-tune"],
        "askings": ["shared", "selected"],
        "documents": {"num_documents": 3, "num_pairs": 6, "min_tokens": 260, "max_tokens": 400},
        "questions": {"num_windows": 2, "num_questions": 4},
    },
    "staleness-learning": {
        "seeds": [0],
        "recall task": RECALL,
        "systems": ["frozen", "coupled", "coupled, average 0.999 writes"],
        "steps": 2,
        "decoupled_steps": 2,
        "distance": 32,
        "num_documents": 1,
    },
    "staleness-content": {"seeds": [0, 1], "recall task": RECALL, "num_banks": 2, "distance": 32},
    "recall-check": {"seed": 0, "recall task": RECALL, "side_steps": 2, "distance": 64, "num_documents": 2},
    "calibration": {"target_recall": 0.95, "num_chunks": 4, "steps": 3, "num_windows": 1},
}


def save_model(folder: Path, **fields: Any) -> Path:
    """Write a model in which no two systems agree, and which writes a few letters rather than any byte.

    Its attention is sharp, so that what it says depends on what it read. The side network is no copy of the backbone, so that
    memory off is another system. Its weights are moved by a wave that knows nothing of their names or a random generator.
    """
    place = save_tiny_backbone(folder / "backbone")
    backbone, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    others = torch.ones(backbone.config.vocab_size, dtype=torch.bool)
    others[tokenizer(WRITTEN)["input_ids"]] = False
    tokenizer.eos_token = "~"  # lm-eval asks for one
    with torch.no_grad():
        backbone.lm_head.weight[others] *= 0.1
        for layer in backbone.model.layers:
            layer.self_attn.q_proj.weight *= 4
    backbone.save_pretrained(place)
    tokenizer.save_pretrained(place)
    model = LongMemForCausalLM.from_backbone(str(place), num_retrieved_tokens=8, **fields).eval()
    move(model.side_network, 0.1)
    model.save_pretrained(folder / "tiny-longmem")
    return folder / "tiny-longmem"


def recall_backbone(task: RecallTask, seed: int) -> LlamaForCausalLM:
    """Return an untrained backbone of the recall task whose attention is sharp and which mostly answers with values."""
    backbone = new_backbone(task, seed).eval()
    with torch.no_grad():
        for weight in backbone.parameters():
            if weight.ndim > 1:
                weight.mul_(3)
        values = slice(task.num_keys, task.num_keys + task.num_values)
        backbone.lm_head.weight[values] *= 4
    return backbone


def recall_model(name: str, task: RecallTask, seed: int) -> LongMemForCausalLM:
    """Return a model of the experiments on staleness: the writer, another encoder ("swap") or a moved one ("fine-tune")."""
    backbone = recall_backbone(task, seed + 100 * (name == "swap"))
    if name == "fine-tune":
        move(backbone, 0.05)
    return add_side_network(backbone, residual="substitute", init="backbone")


@torch.no_grad()
def move(module: nn.Module, size: float) -> None:
    """Add the same wave to all weights, which is the same on every machine."""
    for weight in module.parameters():
        wave = torch.sin(1.7 * torch.arange(weight.numel(), dtype=torch.float64)).view(weight.shape)
        weight.add_(size * wave.to(weight))


def save_texts(folder: Path, *num_words: int) -> Path:
    """Write texts of so many words, named a.txt, b.txt and so on."""
    folder.mkdir()
    for seed, count in enumerate(num_words):
        (folder / f"{'abcdef'[seed]}.txt").write_text(some_text(count, seed), encoding="utf-8")
    return folder


def save_passages(path: Path) -> Path:
    """Write passages in SQuAD's format; half of the questions have an answer that the tiny model likes to write."""
    save_squad(path)
    path.write_text(path.read_text(encoding="utf-8").replace('"the cat"', f'"{LIKED[0]}"'), encoding="utf-8")
    return path


def save_longeval(folder: Path) -> Path:
    """Write prompts about lines and about topics in LongEval's format, two of each."""
    folder.mkdir()
    lines, topics = [], []
    for number in range(2):
        facts = [f"line {animal}: REGISTER_CONTENT is <{241 + 7 * n + number}>\n" for n, animal in enumerate(ANIMALS)]
        question = "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line old-dog? "
        asked = {"correct_line": facts[1], "expected_number": 248 + number}
        lines.append({"prompt": f"Below is a record.\n\n{''.join(facts)}{some_text(20, number)}{question}", **asked})
        talk = " \n ".join(f"USER: I would like to discuss the topic of {topic}." for topic in TALKS[number])
        end = f"{some_text(20, 5 + number)}. Now the record ends. What is the first topic we discussed?"
        topics.append({"prompt": f"Memorize. {talk} {end}", "topics": [topic.capitalize() for topic in TALKS[number]]})
    with gzip.open(folder / "lines_3.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in lines)
    (folder / "topics_3.jsonl").write_text("".join(json.dumps(row) + "\n" for row in topics), encoding="utf-8")
    return folder


LIKED = ("bb", "gb", "pp")  # what the tiny model likes to write: right answers here and there
ANIMALS = ("red-cat", "old-dog", "big-cow")
TALKS = ((LIKED[2], "the art of soup", "rain"), ("chess", "the art of soup", "old houses"))
OPTIONS = ("the cat", "rain fell on it", "a mat", "one dog in this house")


def save_quality(path: Path) -> Path:
    """Write three articles with two questions each, in QuALITY's own format."""
    rows = []
    for seed in range(3):
        questions = [
            {"question": f"who {n * 'sat '}?", "options": OPTIONS, "gold_label": 1 + (seed + n) % 4} for n in (0, 2)
        ]
        rows.append({"article_id": f"article {seed}", "article": some_text(50, seed), "questions": questions})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_locomo(path: Path) -> Path:
    """Write two conversations with four questions each, in LoCoMo's format."""
    rows = []
    for seed in range(2):
        turns = [{"speaker": "Ann", "text": some_text(4, 10 * seed + turn)} for turn in range(5)]
        questions = [
            {"question": "who sat?", "answer": f"dog, {LIKED[1]}", "category": 1},
            {"question": "when?", "answer": 7 + seed, "category": 2},
            {"question": "who?", "answer": f"the {LIKED[1]}", "category": 4},
            {"question": "what?", "adversarial_answer": "rain", "category": 5},
        ]
        talk = {"session_1_date_time": "8 May", "session_1": turns}
        rows.append({"sample_id": f"conv-{seed}", "conversation": talk, "qa": questions})
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path
