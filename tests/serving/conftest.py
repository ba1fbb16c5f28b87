"""A server with a tiny random model, in a thread of this process."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

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


@contextmanager
def serving(app):
    """Run an application on a port of its own; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def url(engine):
    """Return the address of a running server."""
    with serving(make_app(engine, model_id="tiny", max_body=50_000)) as address:
        yield address


@pytest.fixture
def guarded_url(engine):
    """Return the address of a running server that wants a token."""
    with serving(make_app(engine, model_id="tiny", token="s3cret")) as address:
        yield address


@pytest.fixture
def packaged_url():
    """Return the address of a running server of the packaged model."""
    from longmem.model.opening import open_model

    model = open_model("smollm2-135m").eval()
    with serving(make_app(Engine(model, NamedBanks(model, None)), model_id="smollm2-135m")) as address:
        yield address
