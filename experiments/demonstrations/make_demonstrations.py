"""Write a folder of documents to train on: labelled sentences, and stories with hidden facts that are asked for.

    pip download --no-deps vaderSentiment && unzip -p vaderSentiment-*.whl vaderSentiment/vader_lexicon.txt > lexicon.txt
    python experiments/demonstrations/make_demonstrations.py my-books my-manuals --lexicon lexicon.txt \\
        --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct --output mix
    longmem train smollm2-books data.train=mix data.recall_share=0

Both folders hold .txt files, one text each; a story's name ends in the words that label its author's sentences.
"""

import argparse
import random
import sys
from pathlib import Path

from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, which is not installed

from experiments.demonstrations.demonstrations import DemonstrationMaker, read_lexicon, sentences_of
from experiments.harness_data.data import write_items
from longmem.data.corpus import with_recall
from longmem.data.sources import Document, Source

CHARACTERS_OF_STORY = 60_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stories", type=Path, help="folder of .txt files")
    parser.add_argument("others", type=Path, help="folder of .txt files of other kinds")
    parser.add_argument("--lexicon", type=Path, required=True, help="a word, a tab and how positive it is on each line")
    parser.add_argument("--output", type=Path, required=True, help="folder for train.jsonl")
    parser.add_argument("--tokenizer", required=True, help="folder or hub name of the model, whose chat format is used")
    parser.add_argument("--documents", type=int, default=60, help="of labelled sentences")
    parser.add_argument("--characters", type=int, default=36_000, help="of each of them")
    parser.add_argument(
        "--recall-share", type=float, default=0.3, help="of a story that is questions about hidden facts"
    )
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    stories, others = (
        {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}
        for folder in (arguments.stories, arguments.others)
    )
    maker = DemonstrationMaker(
        {name.replace("-", " "): sentences_of(text) for name, text in stories.items()},
        {name.replace("-", " "): sentences_of(text) for name, text in others.items()},
        read_lexicon(arguments.lexicon.read_text(encoding="utf-8")),
        draw,
    )
    documents = [
        Document(f"labelled-{number}", maker.draw(arguments.characters)) for number in range(arguments.documents)
    ]
    plain = [
        Document(name, text[draw.randrange(len(text) // 2 + 1) :][:CHARACTERS_OF_STORY])
        for name, text in stories.items()
    ]
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    documents += with_recall(Source("stories", 0, lambda: plain), arguments.recall_share, tokenizer).documents()
    draw.shuffle(documents)
    path = arguments.output / "train.jsonl"
    count = write_items(path, ({"id": document.document_id, "text": document.text} for document in documents))
    print(f"{path}: {count:,} documents")


if __name__ == "__main__":
    main()
