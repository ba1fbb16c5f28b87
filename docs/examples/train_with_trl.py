"""Train a side network on conversations with TRL's SFTTrainer, packed into rows.

python docs/examples/train_with_trl.py BACKBONE CHATS.jsonl OUTPUT

A line of CHATS.jsonl is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.
"""

import json
import sys

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from longmem import LongMemForCausalLM


def main(backbone: str, chats: str, output: str, steps: int = 100, window: int = 512) -> None:
    """Train on conversations, and save the side network."""
    model = LongMemForCausalLM.from_backbone(backbone, segment_length=window)
    with open(chats, encoding="utf-8") as lines:
        rows = Dataset.from_list([json.loads(line) for line in lines])
    arguments = SFTConfig(
        output,
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-4,
        packing=True,
        max_length=window,
        report_to=[],
    )
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=model.tokenizer)
    trainer.train()
    trainer.save_model(f"{output}/side-network")


if __name__ == "__main__":
    main(*sys.argv[1:4])
