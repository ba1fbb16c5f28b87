"""Put adapters of the library peft into the side network; plain names such as `q_proj` never reach the frozen backbone.

python docs/examples/adapt_with_peft.py BACKBONE BOOK.txt OUTPUT

Where LoRA is meant for good, `from_backbone(..., lora=LoraConfig(...))` is simpler: it is saved with the model.
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from longmem import LongMemForCausalLM, MemoryBank


def main(backbone: str, book: str, output: str, steps: int = 10, window: int = 512) -> None:
    """Train adapters on windows of a book that is in memory, and open them again."""
    model = LongMemForCausalLM.from_backbone(backbone, segment_length=window)
    ids = model.tokenizer(Path(book).read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    bank = MemoryBank.for_model(model)
    model.memorize(bank, ids, document_id="book")
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=1e-3)
    for row in ids.unfold(0, window, window)[:steps]:
        adapted(input_ids=row[None], labels=row[None], memory=bank).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(output)
    PeftModel.from_pretrained(LongMemForCausalLM.from_backbone(backbone, segment_length=window), output)


if __name__ == "__main__":
    main(*sys.argv[1:4])
