"""Training runs in processes of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file=configs/accelerate/cpu-2-processes.yaml"]


def run(
    files: Path,
    output: Path,
    num_processes: int,
    *settings: str,
    script: str = "train/train_longmem.py",
    nodes: bool = False,
) -> tuple[list[int], str]:
    """Train in so many processes that talk over gloo, as `accelerate launch` starts them; return exit codes and output.

    `nodes`: each is the only one of a machine of its own, started by the command that docs/training.md gives for that.
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
        if nodes:
            machine = [f"--num_machines={num_processes}", f"--num_processes={num_processes}", f"--machine_rank={rank}"]
            machine += ["--main_process_ip=127.0.0.1", f"--main_process_port={port}"]
            launch = [*LAUNCH, *machine, "-m", "longmem.cli.main", "train", *command[2:]]
            processes.append(started(launch, environment))
            continue
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} if num_processes > 1 else {}
        processes.append(started(command, {**environment, **own}))
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    return [process.returncode for process in processes], "\n".join(outputs)


def started(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
