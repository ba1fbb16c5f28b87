"""What a number was computed with: versions, hardware, commit."""

import importlib.metadata
import platform
import subprocess
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("torch", "transformers", "faiss-cpu", "faiss-gpu", "numpy", "safetensors")

# The device that a command was told to use.
DEVICE: ContextVar[str] = ContextVar("longmem_device", default="auto")


def environment() -> dict[str, Any]:
    """Return versions, hardware and, where the package lives in a git checkout, its commit."""
    versions = {"python": platform.python_version()}
    for package in ("longmem-lm", *PACKAGES):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__  # with the name of its build, which the package index may leave out
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    changes = _git("status", "--porcelain")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "versions": versions,
        "device": device,
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "memory_gigabytes": round(psutil.virtual_memory().total / 2**30, 1),
        "threads": torch.get_num_threads(),
    }


def chosen_device(name: str | None = None) -> torch.device:
    """Return the device of this name, None for what a command was told; "auto", where nobody said: a GPU where there is one."""
    name = DEVICE.get() if name is None else name
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _processor() -> str:
    """Return the name of the processor, as far as the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
