"""Train a side network with transformers' Trainer: each row reads a memory of the book that stands before it.

python docs/examples/train_with_trainer.py BACKBONE BOOK.txt OUTPUT
"""

import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from longmem import LongMemForCausalLM, MemoryBank


def main(backbone: str, book: str, output: str, steps: int = 100, window: int = 512) -> None:
    """Train on the second half of a book while the first half is in memory, and open the last checkpoint."""
    model = LongMemForCausalLM.from_backbone(backbone, segment_length=window)
    ids = model.tokenizer(Path(book).read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    bank = MemoryBank.for_model(model)
    model.memorize(bank, ids[: len(ids) // 2], document_id="first half")
    rows = ids[len(ids) // 2 :].unfold(0, window, window)

    def collate(batch: list[torch.Tensor]) -> dict[str, object]:
        """Return a batch; `memory` may also be a list with one bank for each row."""
        return {"input_ids": torch.stack(batch), "labels": torch.stack(batch), "memory": bank}

    arguments = TrainingArguments(
        output, max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-4, report_to=[]
    )
    trainer = Trainer(model, arguments, train_dataset=list(rows), data_collator=collate)  # type: ignore[arg-type]
    trainer.train()
    trainer.save_model(f"{output}/side-network")
    LongMemForCausalLM.from_pretrained(f"{output}/side-network")


if __name__ == "__main__":
    main(*sys.argv[1:4])
