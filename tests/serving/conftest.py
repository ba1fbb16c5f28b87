"""A server with a tiny random model, in a thread of this process."""

from __future__ import annotations

import threading
import time

import pytest
from tiny_models import save_tiny_backbone

from longmem import LongMemForCausalLM

uvicorn = pytest.importorskip("uvicorn")

from longmem.serving.api import make_app  # noqa: E402
from longmem.serving.banks import NamedBanks  # noqa: E402
from longmem.serving.engine import Engine  # noqa: E402


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> LongMemForCausalLM:
    backbone = save_tiny_backbone(tmp_path_factory.mktemp("serving") / "backbone", max_position_embeddings=4096)
    return LongMemForCausalLM.from_backbone(str(backbone), segment_length=64, num_retrieved_tokens=16).eval()


@pytest.fixture
def engine(model):
    engine = Engine(model, NamedBanks(model, None))
    yield engine
    engine.close()


@pytest.fixture
def url(engine):
    """Return the address of a running server."""
    config = uvicorn.Config(make_app(engine, model_id="tiny", max_body=50_000), port=0, log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()
