"""`longmem serve`: a model with its memories behind OpenAI's protocol, and a page to talk to it."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import socket
from typing import Any

from longmem.cli import common
from longmem.cli.common import DEFAULT_MODEL, add_command, model_option

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
EXAMPLES = """\
  longmem serve                                        page and API on http://127.0.0.1:8765, for this machine alone
  longmem serve --banks memories                       keep what is remembered, each bank in a folder of its own
  LONGMEM_TOKEN=... longmem serve --host 0.0.0.0       for other machines, which must bear the token

  OpenAI(base_url="http://127.0.0.1:8765/v1", api_key="unused").chat.completions.create(
      model="smollm2-135m", messages=[...], extra_body={"bank": "notes"})

Needs: pip install "longmem-lm[serve]".
"""


def add(commands: Any) -> None:
    """Add the command `serve`."""
    command = add_command(
        commands, "serve", run, "serve a model with memory: API and page", EXAMPLES, model_option(DEFAULT_MODEL)
    )
    command.add_argument(
        "--banks", type=common.folder_alone, metavar="DIR", help="folder for banks; default: in memory, gone at the end"
    )
    command.add_argument("--host", default="127.0.0.1", help="address to listen at")
    command.add_argument("--port", type=int, default=8765, help="port to listen at")
    command.add_argument("--token", help="that requests must bear; default: the environment's LONGMEM_TOKEN, if set")
    command.add_argument("--max-waiting", type=int, default=64, help="requests that wait at most")
    command.add_argument("--max-megabytes", type=int, default=8, help="size of a request at most")


def run(arguments: argparse.Namespace) -> None:
    """Serve until stopped."""
    token = arguments.token or os.environ.get("LONGMEM_TOKEN") or None
    if arguments.host not in LOCAL_HOSTS and token is None:
        raise ValueError(
            f"`--host` must be {LOCAL_HOSTS[0]} without a token, got {arguments.host!r}: everyone who reaches the port could "
            "read the banks; set LONGMEM_TOKEN to a long random text."
        )
    if token is not None and re.fullmatch("[!-~]+", token) is None:  # no other text arrives in a header as it was sent
        raise ValueError("`--token` must be letters, digits and signs of ASCII without spaces, got another text.")
    for name in ("max_waiting", "max_megabytes"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"`--{name.replace('_', '-')}` must be at least 1, got {getattr(arguments, name)}.")
    try:
        import uvicorn

        from longmem.serving.api import MEGABYTE, make_app
    except ImportError as error:
        raise ImportError(f'`longmem serve` needs {error.name}: pip install "longmem-lm[serve]".') from error
    from longmem.serving.banks import NamedBanks
    from longmem.serving.engine import Engine

    if not 0 <= arguments.port <= 65_535:
        raise ValueError(f"`--port` must be from 0 (any that is free) to 65535, got {arguments.port}.")
    family = socket.AF_INET6 if ":" in arguments.host else socket.AF_INET
    try:  # before a model is opened
        listener = socket.create_server((arguments.host, arguments.port), family=family)
    except OSError as error:
        raise ValueError(
            f"`--host` and `--port` must be an address of this machine that is free, got {arguments.host} and "
            f"{arguments.port}: {error.strerror or error}."
        ) from error
    name = arguments.model or DEFAULT_MODEL
    console = common.console_for(arguments.json, quiet=arguments.quiet)
    console.print(f"Opening {name} ...")
    model = common.open_named(name, arguments).eval()
    engine = Engine(model, NamedBanks(model, arguments.banks), arguments.max_waiting)
    app = make_app(engine, model_id=name, token=token, max_body=arguments.max_megabytes * MEGABYTE)
    here = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    url = f"http://{here}:{listener.getsockname()[1]}"
    common.tell(arguments, {"model": name, "url": url}, f"Serving {name}: open {url} in a browser (Ctrl-C ends).")
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)  # then answers are cut short
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
