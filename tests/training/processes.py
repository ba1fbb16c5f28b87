"""Training runs in processes of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(
    files: Path,
    output: Path,
    num_processes: int,
    *settings: str,
    script: str = "train/train_longmem.py",
    nodes: bool = False,
) -> tuple[list[int], str]:
    """Train in so many processes that talk over gloo, as `accelerate launch` starts them; return exit codes and output.

    `nodes`: each is the only one of a machine of its own, as after `accelerate launch --num_machines`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, script, str(files), f"output={output}", *settings]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_processes)}
    processes = []
    for rank in range(num_processes):
        own = {"RANK": str(rank), "LOCAL_RANK": "0" if nodes else str(rank), **shared} if num_processes > 1 else {}
        processes.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**environment, **own},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    return [process.returncode for process in processes], "\n".join(outputs)
