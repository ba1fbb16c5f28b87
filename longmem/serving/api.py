"""The server: OpenAI's chat and completions, banks of documents, who read what, and the page."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import re
import threading
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longmem import __version__
from longmem.memory import MemoryBank
from longmem.memory.checks import got
from longmem.serving.banks import UnknownBankError
from longmem.serving.engine import Answer, BusyError, Engine
from longmem.serving.engine import Request as Work
from longmem.streaming.stream import LEAST_TEMPERATURE

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
MEGABYTE = 2**20
LOOK_EVERY = 0.5  # seconds, for who waits for an answer and has gone
# What OpenAI's clients may send and this server does not follow, with the values that ask for what it does anyway.
NOTHING: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("n", "best_of"), (1,)),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "top_logprobs"), (0,)),
    **dict.fromkeys(("logprobs", "echo", "store", "include_obfuscation"), (False,)),
    **dict.fromkeys(("tools", "functions", "tool_calls", "annotations"), ([],)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    "parallel_tool_calls": (False, True),
    **dict(logit_bias=({},), suffix=("",), modalities=(["text"],), response_format=({"type": "text"},)),
    "service_tier": ("auto", "default"),
}
Result = TypeVar("Result")
Some = Annotated[str, Field(min_length=1)]
TYPE = re.compile(r"(constrained-)?(str|list\[.*\])$")  # as validation calls them
_LOG = logging.getLogger(__name__)


class _Body(BaseModel):
    """What a request holds. A parameter that is null is not given, nor is one that asks for `NOTHING`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def asked_for(cls, body: Any) -> Any:
        """Return the parameters that ask for something."""
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None and not _is_nothing(name, value)}


def _is_nothing(name: str, value: Any) -> bool:
    is_bool = isinstance(value, bool)  # and so neither 0 nor 1
    return any(value == each and is_bool == isinstance(each, bool) for each in NOTHING.get(name, ()))


class Part(_Body):
    """Text of a message."""

    type: Literal["text"]
    text: str


class Turn(_Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Return role and text."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Body):
    """What a stream tells beside the text."""

    include_usage: bool = False


class _Sampling(_Body):
    """What both kinds of completion take; `user` and `metadata` are for the caller's logs."""

    model: str | None = None
    bank: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Some | list[Some] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None

    def work(self, token_ids: list[int], most: int, asked: int | None) -> Work:
        """Return what the engine is asked for: at most `most` new tokens."""
        if self.stream_options is not None and not self.stream:
            raise ValueError(
                "`stream_options` must come with `stream`, got them alone; an answer in one piece has its usage."
            )
        if 0 < (self.temperature or 0) < LEAST_TEMPERATURE:
            raise ValueError(f"`temperature` must be 0 or at least {LEAST_TEMPERATURE}, got {self.temperature}.")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        new = min(256, most) if asked is None else asked
        if new > most:
            raise ValueError(f"`max_tokens` must be at most {most}, got {new}.")
        return Work(token_ids, new, self.temperature, self.top_p, stop, self.seed, self.bank)


class ChatRequest(_Sampling):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Turn], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def asked(self) -> int | None:
        """Return the limit of new tokens, which has two names; None where none is given."""
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError(
                f"`max_tokens` and `max_completion_tokens` are one limit under two names, got {self.max_tokens} and "
                f"{self.max_completion_tokens}; leave one out."
            )
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Sampling):
    """`/v1/completions`."""

    prompt: Some | Annotated[list[Some], Field(min_length=1, max_length=1)]


class ExplainRequest(_Body):
    """`/v1/explain`: a conversation, and the answer to it."""

    messages: Annotated[list[Turn], Field(min_length=1)]
    answer: Some
    bank: str | None = None


class NewDocument(_Body):
    """A document to be memorized; `append`: the next part of one that is there."""

    id: Annotated[str, Field(min_length=1, max_length=512)]
    text: Some
    tags: list[str] = []
    append: bool = False


def make_app(
    engine: Engine,
    *,
    model_id: str,
    token: str | None = None,
    max_new_tokens: int = 4096,
    max_body: int = 8 * MEGABYTE,
) -> FastAPI:
    """Return the application.

    Args:
        engine: answers; closed with the application.
        model_id: name of the model, as `/v1/models` lists it.
        token: that every request must bear ("Authorization: Bearer ..."), but for the page itself; None: only requests from
            this machine are answered, under a local name.
        max_new_tokens: of one answer.
        max_body: bytes of a request.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()

    # A slash too many is no other request: ".." for a document, as clients shorten paths, would delete the bank it is in.
    options: dict[str, Any] = {"redirect_slashes": False, "docs_url": None, "redoc_url": None}
    app = FastAPI(title="LongMem", version=__version__, lifespan=lifespan, **options)
    app.add_middleware(_Door, token=token, max_body=max_body)
    _answer_errors(app)
    page = files("longmem.serving").joinpath("page.html").read_text(encoding="utf-8")

    def refuse_other_model(name: str | None) -> None:
        if name not in (None, model_id):
            raise HTTPException(404, f"`model` must be {model_id!r}, the one that is served, got {name!r}.")

    async def respond(request: Request, body: _Sampling, work: Work, kind: str) -> Any:
        if (name := work.bank) is not None:  # an unknown one is told before anything is sent
            await engine.run(lambda: engine.banks.get(name), aside=True)
        engine.refuse_if_busy()
        shape = _Shape(kind, model_id, len(work.token_ids))
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(_stream(engine, work, shape, usage), media_type="text/event-stream")
        cancelled = threading.Event()
        run = engine.run(lambda: engine.answer(work, lambda _: None, cancelled))
        return shape.whole(await _while_there(request, run, cancelled))

    @app.get("/", response_class=HTMLResponse)
    async def show_page() -> str:
        return page

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [await show_model(model_id)]}

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> dict[str, Any]:
        refuse_other_model(name)
        return {"id": model_id, "object": "model", "created": 0, "owned_by": "longmem"}

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Any:
        refuse_other_model(body.model)
        ids = await engine.run(lambda: engine.ids([turn.plain() for turn in body.messages]), aside=True)
        return await respond(request, body, body.work(ids, max_new_tokens, body.asked), "chat")

    @app.post("/v1/completions")
    async def complete(request: Request, body: CompletionRequest) -> Any:
        refuse_other_model(body.model)
        text = body.prompt if isinstance(body.prompt, str) else body.prompt[0]
        ids = await engine.run(lambda: engine.ids(text), aside=True)
        return await respond(request, body, body.work(ids, max_new_tokens, body.max_tokens), "text")

    @app.post("/v1/explain", response_class=HTMLResponse)
    async def explain(request: Request, body: ExplainRequest) -> str:
        ids = await engine.run(lambda: engine.ids([turn.plain() for turn in body.messages]), aside=True)
        cancelled = threading.Event()
        run = engine.run(lambda: engine.explain(Work(ids, bank=body.bank), body.answer, cancelled).to_html())
        return await _while_there(request, run, cancelled)

    @app.get("/v1/banks")
    async def list_banks() -> dict[str, Any]:
        names = await engine.run(engine.banks.names, aside=True)
        return {"object": "list", "data": [{"id": name, "object": "bank"} for name in names]}

    @app.delete("/v1/banks/{name}")
    async def delete_bank(name: str) -> dict[str, Any]:
        await engine.run(lambda: engine.banks.delete(name))
        return {"id": name, "object": "bank", "deleted": True}

    @app.get("/v1/banks/{name}/documents")
    async def list_documents(name: str) -> dict[str, Any]:
        found = await engine.run(lambda: engine.banks.get(name).documents())
        listed = [
            {"id": each.document_id, "object": "document", "tokens": each.num_tokens, "tags": each.tags}
            for each in found
        ]
        return {"object": "list", "data": listed}

    @app.post("/v1/banks/{name}/documents", status_code=201)
    async def add_document(name: str, body: NewDocument) -> dict[str, Any]:
        def write(bank: MemoryBank) -> int:
            return engine.model.memorize(bank, body.text, body.id, append=body.append, tags=body.tags)

        tokens = await engine.run(lambda: engine.banks.write(name, write, make=not body.append))
        return {"id": body.id, "object": "document", "tokens": tokens, "tags": body.tags}

    @app.delete("/v1/banks/{name}/documents/{id:path}")
    @app.delete("/v1/banks/{name}/documents")  # `?id=`: not every name, such as "..", can be part of a path
    async def delete_document(name: str, id: str) -> dict[str, Any]:
        await engine.run(lambda: engine.banks.get(name).delete(id))
        return {"id": id, "object": "document", "deleted": True}

    @app.get("/v1/banks/{name}/find")
    async def find(
        name: str,
        text: str,
        k: Annotated[int, Query(ge=1, le=100)] = 10,
        by: Literal["heads", "words"] = "heads",
    ) -> dict[str, Any]:
        reader = engine.model if by == "heads" else None
        found = await engine.run(lambda: engine.banks.get(name).find(text, reader, k))
        return {"object": "list", "data": [passage._asdict() for passage in found]}

    return app


async def _while_there(request: Request, run: Coroutine[Any, Any, Result], cancelled: threading.Event) -> Result:
    """Return what `run` does; who goes away before it is done ends it, or takes it out of the queue."""
    task = asyncio.create_task(run)
    try:
        while not (await asyncio.wait({task}, timeout=LOOK_EVERY))[0]:
            if await request.is_disconnected():
                raise HTTPException(499, "the client went away.")
        return await task
    finally:
        cancelled.set()
        task.cancel()


async def _stream(engine: Engine, work: Work, shape: _Shape, with_usage: bool) -> AsyncIterator[str]:
    """Yield an answer as server-sent events; whoever goes away ends it."""
    loop, pieces, cancelled = asyncio.get_running_loop(), asyncio.Queue[str | None](), threading.Event()

    def on_text(text: str) -> None:
        loop.call_soon_threadsafe(pieces.put_nowait, text)

    task = asyncio.create_task(engine.run(lambda: engine.answer(work, on_text, cancelled)))
    # Through the loop, like the pieces: so it comes after the last of them.
    task.add_done_callback(lambda _: loop.call_soon(pieces.put_nowait, None))
    try:
        if shape.is_chat:
            yield _event(shape.piece("", role="assistant"))
        while (text := await pieces.get()) is not None:
            yield _event(shape.piece(text))
        try:
            answer = await task
        except Exception as error:
            yield _event(_told(error)[1])
        else:
            yield _event(shape.piece("", finish_reason=answer.finish_reason))
            if with_usage:
                yield _event({**shape.piece(""), "choices": [], "usage": shape.usage(answer)})
        yield "data: [DONE]\n\n"
    finally:
        cancelled.set()
        task.cancel()


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


class _Shape:
    """The objects of OpenAI's protocol for one request."""

    def __init__(self, kind: str, model_id: str, prompt_tokens: int) -> None:
        self.is_chat, self.prompt_tokens = kind == "chat", prompt_tokens
        name = "chatcmpl" if self.is_chat else "cmpl"
        self.about = {"id": f"{name}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model_id}

    def whole(self, answer: Answer) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": answer.text}} if self.is_chat else {"text": answer.text}
        return {**self._of(said, answer.finish_reason, ""), "usage": self.usage(answer)}

    def piece(self, text: str, role: str | None = None, finish_reason: str | None = None) -> dict[str, Any]:
        delta = {} if finish_reason else {"content": text} | ({} if role is None else {"role": role})
        return self._of({"delta": delta} if self.is_chat else {"text": text}, finish_reason, ".chunk")

    def _of(self, said: dict[str, Any], finish_reason: str | None, chunk: str) -> dict[str, Any]:
        kind = f"chat.completion{chunk}" if self.is_chat else "text_completion"
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}
        return {**self.about, "object": kind, "choices": [choice]}

    def usage(self, answer: Answer) -> dict[str, int]:
        asked, new = self.prompt_tokens, answer.num_tokens
        return {"prompt_tokens": asked, "completion_tokens": new, "total_tokens": asked + new}


def _error(message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def _told(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return the status and the object that tell an error."""
    if isinstance(error, BusyError):
        return 503, _error(str(error), "server_busy")
    if isinstance(error, UnknownBankError):
        return 404, _error(str(error), "invalid_request_error", "bank")
    if isinstance(error, ValueError):
        return 400, _error(str(error), "invalid_request_error")
    _LOG.error("a request failed", exc_info=error)
    return 500, _error("the server could not answer; its log says why.", "server_error")


def _wrong(errors: Sequence[Any]) -> tuple[str | None, str]:
    """Return the parameter that is wrong, None for the whole body, and what to say of it."""
    # Of what may be of two types the one that was meant.
    worst = max(errors, key=lambda each: (len(each["loc"]), not each["type"].endswith("_type")))
    kind, value = worst["type"], worst.get("input")
    # Types that a value was compared with stand among the names.
    names = [str(part) for part in worst["loc"][1:] if kind == "extra_forbidden" or not TYPE.match(str(part))]
    param = None if kind == "json_invalid" else ".".join(names) or None
    name, rule = f"`{param or 'body'}`", worst["msg"][0].lower() + worst["msg"][1:]
    if not names:
        return param, f'`body` must be a JSON object, sent with "Content-Type: application/json", got {got(value)}.'
    if kind == "extra_forbidden":
        return param, f"{name} must be left out, got {got(value)}: this server does not follow it."
    return param, f"{name}: {rule}." if kind in ("missing", "json_invalid") else f"{name}: {rule}, got {got(value)}."


def _answer_errors(app: FastAPI) -> None:
    """Tell every error as OpenAI's clients expect it."""

    @app.exception_handler(RequestValidationError)
    async def wrong_request(_: Request, error: RequestValidationError) -> JSONResponse:
        param, message = _wrong(error.errors())
        return JSONResponse(_error(message, "invalid_request_error", param), 400)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(_error(str(error.detail), "invalid_request_error"), error.status_code)

    @app.exception_handler(Exception)
    @app.exception_handler(ValueError)
    @app.exception_handler(BusyError)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        status, told = _told(error)
        return JSONResponse(told, status, headers={"Retry-After": "5"} if status == 503 else None)


class _Door:
    """Who may come in, and with how much: checked before anything else is read of a request."""

    def __init__(self, app: ASGIApp, token: str | None, max_body: int) -> None:
        self.app, self.token, self.max_body = app, token, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if (refusal := self._refusal(scope, headers)) is not None:
            status, message = refusal
            await JSONResponse(_error(message, "invalid_request_error"), status)(scope, receive, send)
            return
        await self.app(scope, self._counted(receive), send)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        if headers.get("content-length", "0").isdigit() and int(headers.get("content-length", "0")) > self.max_body:
            return 413, f"a request must have at most {self.max_body:,} bytes."
        origin, host = headers.get("origin"), headers.get("host", "")
        if origin is not None and origin.partition("://")[2] != host:
            return 403, "requests from pages of other sites are refused."
        if self.token is not None:
            given = headers.get("authorization", "").removeprefix("Bearer ")
            is_page = scope["path"] == "/" and scope["method"] in ("GET", "HEAD")
            if is_page or hmac.compare_digest(given.encode(), self.token.encode()):
                return None
            return 401, 'a request must bear the server\'s token: "Authorization: Bearer TOKEN".'
        client = scope.get("client")
        if client is None or not _is_here(client[0]):
            return 403, "requests from other machines are refused; start the server with a token for them."
        # A page elsewhere may have its name lead to this machine; then it is its own name that the request bears.
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        return None if name in LOCAL_NAMES else (403, f"`Host` must be one of {', '.join(LOCAL_NAMES)}, got {name!r}.")

    def _counted(self, receive: Receive) -> Receive:
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.max_body:
                raise HTTPException(413, f"a request must have at most {self.max_body:,} bytes.")
            return message

        return counted


def _is_here(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
