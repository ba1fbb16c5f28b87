"""One thread for the tiny banks of these tests: threads of torch and of FAISS would mostly wait for each other."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import failing_calls
import faiss
import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    faiss.omp_set_num_threads(before[1])


class Workers:
    """Return a process that forks workers (`folder_worker.py`), started when it is first used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # for files of its own
        self.process: subprocess.Popen[str] | None = None
        self.fails_calls = False  # whether system calls of workers can be made to fail, once there is one

    def start(
        self, function: str, kill_after: float | None = None, **arguments: Any
    ) -> Callable[[], tuple[list[Any], int]]:
        """Start a function of `folder_worker.py`; return a function that waits for its reports and its exit status."""
        if self.process is None:
            here, library = Path(__file__).parent, failing_calls.build(self.folder)
            self.fails_calls = library is not None
            self.process = subprocess.Popen(
                [sys.executable, here / "folder_worker.py"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join([str(here.parents[1]), *sys.path]), "OMP_NUM_THREADS": "1"}
                | ({} if library is None else {"LD_PRELOAD": library}),
            )
        process = self.process
        assert process.stdin is not None
        print(json.dumps([function, arguments, kill_after]), file=process.stdin, flush=True)

        def wait() -> tuple[list[Any], int]:
            assert process.stdout is not None
            reports, status = json.loads(process.stdout.readline())
            return reports, status

        return wait

    def run(self, function: str, kill_after: float | None = None, **arguments: Any) -> tuple[list[Any], int]:
        """Return what the function reported, and its exit status."""
        return self.start(function, kill_after, **arguments)()

    def close(self) -> None:
        if self.process is not None:
            self.process.communicate()


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    if not hasattr(os, "fork"):
        pytest.skip("needs a system that can fork processes")
    started = Workers(tmp_path_factory.mktemp("library"))
    yield started
    started.close()
