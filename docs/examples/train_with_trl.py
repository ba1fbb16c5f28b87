"""Train a side network on conversations with TRL's SFTTrainer, packed into rows.

python docs/examples/train_with_trl.py BACKBONE CHATS.jsonl OUTPUT

A line of CHATS.jsonl is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.
"""

import json
import sys

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from longmem import LongMemForCausalLM


def main(backbone: str, chats: str, output: str, steps: int = 100, window: int = 512) -> None:
    """Train on conversations, and save the side network."""
    model = LongMemForCausalLM.from_backbone(backbone, segment_length=window)
    with open(chats, encoding="utf-8") as lines:
        rows = Dataset.from_list([json.loads(line) for line in lines])
    on_gpu = torch.cuda.is_available()
    sizes = {"max_steps": steps, "max_length": window, "per_device_train_batch_size": 2}
    arguments = SFTConfig(
        output, packing=True, learning_rate=1e-4, report_to=[], bf16=on_gpu, use_cpu=not on_gpu, **sizes
    )
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=model.tokenizer)
    trainer.train()
    trainer.save_model(f"{output}/side-network")


if __name__ == "__main__":
    main(*sys.argv[1:4])
