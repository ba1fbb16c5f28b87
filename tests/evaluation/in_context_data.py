"""Small data sets in LongMem's layout and in SQuAD's format."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tiny_models import WORDS

FOLDERS = {"sst-2": "SST-2", "mr": "mr", "subj": "subj", "sst-5": "sst-5", "mpqa": "mpqa"}


def text_of(number: int, words: int = 3) -> str:
    generator = random.Random(number)
    return " ".join(generator.choice(WORDS) for _ in range(words))


def save_sets(folder: Path, train: int = 30, test: int = 7) -> Path:
    """Write all five sets; labels go round, and no text is in two files."""
    start = 0
    for name, own in FOLDERS.items():
        place = folder / own
        place.mkdir(parents=True)
        labels = 5 if name == "sst-5" else 2
        for split, count in (("train", train), ("test", test)):
            rows = [(text_of(start + number) + f" {start + number}", number % labels) for number in range(count)]
            start += count
            if name == "sst-2":
                lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in rows)]
                file = "train.tsv" if split == "train" else "dev.tsv"
            elif name == "sst-5":
                lines = [f"{label} {text}" for text, label in rows]
                file = "stsa.fine.train" if split == "train" else "stsa.fine.dev"
            else:
                lines = [f"{label},{text}" for text, label in rows]
                file = f"{split}.csv"
            (place / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def save_squad(path: Path, articles: int = 8, paragraphs: int = 2) -> Path:
    """Write passages with two questions each."""
    data = []
    for article in range(articles):
        own = []
        for paragraph in range(paragraphs):
            number = 100 * article + paragraph
            asked = [
                {
                    "id": f"{number}-{n}",
                    "question": f"{text_of(number + n, 2)}?",
                    "answers": [{"text": f"the {WORDS[n]}"}],
                }
                for n in range(2)
            ]
            own.append({"context": f"{text_of(number, 5)}\n{number}", "qas": asked})
        data.append({"title": f"article {article}", "paragraphs": own})
    path.write_text(json.dumps({"version": "1.1", "data": data}), encoding="utf-8")
    return path
