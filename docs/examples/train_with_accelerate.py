"""Train a side network by hand with accelerate; what was read goes into memory, and the next window reads it.

accelerate launch docs/examples/train_with_accelerate.py BACKBONE BOOK.txt OUTPUT
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from longmem import LongMemForCausalLM, MemoryBank


def main(backbone: str, book: str, output: str, steps: int = 100, window: int = 512) -> None:
    """Read a book window by window, and train on each before it is written to memory."""
    accelerator = Accelerator()
    model = LongMemForCausalLM.from_backbone(backbone, segment_length=window).train()
    ids = model.tokenizer(Path(book).read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    optimizer = torch.optim.AdamW(model.side_network.parameters(), lr=1e-4)
    model, optimizer = accelerator.prepare(model, optimizer)
    own = accelerator.unwrap_model(model)
    bank = MemoryBank.for_model(own)
    for number, row in enumerate(ids.unfold(0, window, window)[:steps]):
        row = row[None].to(accelerator.device)
        loss = model(row, labels=row, memory=bank).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        own.memorize(bank, row[0], document_id="book", append=number > 0)  # after `backward`, never before
    accelerator.wait_for_everyone()
    own.save_pretrained(
        output, is_main_process=accelerator.is_main_process, state_dict=accelerator.get_state_dict(model)
    )


if __name__ == "__main__":
    main(*sys.argv[1:4])
