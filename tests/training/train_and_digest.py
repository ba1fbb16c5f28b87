"""Train like `train/train_longmem.py`; each process writes, after every step, a hash of what it trains and remembers of it.

Settings as there; a last argument `sgd` takes plain SGD in place of AdamW.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch

from longmem.training import Trainer, load_settings, setup


def digest(tensors) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    config, *overrides = sys.argv[1:]
    if overrides[-1] == "sgd":
        overrides.pop()
        setup.make_optimizer = lambda trained, wanted, *further: torch.optim.SGD(
            trained.values(), lr=wanted.learning_rate
        )
    trainer = Trainer(load_settings(config, overrides))
    train_step, digests = trainer.train_step, []

    def watched():
        record = train_step()
        weights = list(trainer.trained.values())
        state = [value for weight in weights for _, value in sorted(trainer.optimizer.state[weight].items())]
        kept = [value for value in state if isinstance(value, torch.Tensor)]
        digests.append([digest(weights), digest(kept)])
        return record

    trainer.train_step = watched
    trainer.run()
    folder = Path(trainer.settings.output)
    (folder / f"digests-{trainer.accelerator.process_index}.json").write_text(json.dumps(digests))


if __name__ == "__main__":
    main()
