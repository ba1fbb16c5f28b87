"""`longmem serve`: OpenAI's client talks to it, conversations are apart, and wrong or strange requests do no harm."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from kept_fast import fast
from starlette.testclient import TestClient
from tiny_models import some_text

from longmem import LongMemForCausalLM
from longmem.cli.main import main
from longmem.memory import MemoryBank
from longmem.serving.api import make_app
from longmem.serving.banks import NamedBanks
from longmem.serving.engine import Engine, Request, chat_text

SAID = [{"role": "user", "content": "the cat sat"}]
CHAT = {"messages": SAID, "temperature": 0, "max_tokens": 12}


@pytest.fixture
def app(engine):
    return make_app(engine, model_id="tiny", max_body=50_000)


@pytest.fixture
def client(app):
    return TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 1), raise_server_exceptions=False)


@pytest.fixture
def theirs(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


def test_the_official_client_chats_with_and_without_a_stream(theirs, model):
    assert [each.id for each in theirs.models.list()] == ["tiny"]
    whole = theirs.chat.completions.create(model="tiny", **CHAT)
    ids = model.tokenizer(chat_text(model.tokenizer, SAID), return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert whole.choices[0].message.content == model.tokenizer.decode(expected)
    assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ("length", 12)
    pieces = list(
        theirs.chat.completions.create(model="tiny", stream=True, stream_options={"include_usage": True}, **CHAT)
    )
    assert pieces[0].choices[0].delta.role == "assistant"
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole.choices[0].message.content
    assert pieces[-2].choices[0].finish_reason == "length"
    assert pieces[-1].usage.total_tokens == whole.usage.total_tokens


def test_the_official_client_completes_and_stops(theirs):
    asked = {"model": "tiny", "prompt": "the cat", "max_tokens": 16, "temperature": 0}
    text = theirs.completions.create(**asked).choices[0].text
    stop = text[4:7]
    cut = theirs.completions.create(stop=[stop, "never"], **asked).choices[0]
    assert (cut.text, cut.finish_reason) == (text[: text.index(stop)], "stop")
    streamed = theirs.completions.create(stop=stop, stream=True, **asked)
    assert "".join(piece.choices[0].text for piece in streamed) == cut.text
    warm = [
        theirs.completions.create(**asked | {"temperature": 1.5, "seed": seed}).choices[0].text for seed in (1, 1, 2)
    ]
    assert warm[0] == warm[1] != warm[2]


def test_what_is_in_a_bank_changes_the_answer_of_those_who_name_it(theirs, client):
    alone = theirs.chat.completions.create(model="tiny", **CHAT).choices[0].message.content
    added = client.post("/v1/banks/notes/documents", json={"id": "a.txt", "text": some_text(30), "tags": ["mine"]})
    assert added.status_code == 201
    listed = client.get("/v1/banks/notes/documents").json()["data"]
    assert [(each["id"], each["tags"]) for each in listed] == [("a.txt", ["mine"])]
    assert listed[0]["tokens"] == added.json()["tokens"] > 0
    named = (
        theirs.chat.completions.create(model="tiny", extra_body={"bank": "notes"}, **CHAT).choices[0].message.content
    )
    assert named != alone
    assert theirs.chat.completions.create(model="tiny", **CHAT).choices[0].message.content == alone
    found = client.get("/v1/banks/notes/find", params={"text": "the house", "by": "words", "k": 2}).json()["data"]
    assert found
    assert found[0]["document_id"] == "a.txt"
    assert client.get("/v1/banks/notes/find", params={"text": "the house"}).json()["data"]
    assert client.delete("/v1/banks/notes/documents/a.txt").json()["deleted"]
    emptied = (
        theirs.chat.completions.create(model="tiny", extra_body={"bank": "notes"}, **CHAT).choices[0].message.content
    )
    assert emptied == alone
    assert client.delete("/v1/banks/notes").json()["deleted"]
    assert client.get("/v1/banks").json()["data"] == []
    assert client.get("/v1/banks/notes/documents").status_code == 404


def test_nothing_that_takes_time_keeps_the_loop_from_other_requests(client, engine, monkeypatch):
    """Templates, tokens, and banks that are opened: in no thread with a loop."""
    asked = []

    def off_the_loop(name, function):
        def called(*args, **options):
            asked.append(name)
            with pytest.raises(RuntimeError):
                asyncio.get_running_loop()
            return function(*args, **options)

        return called

    client.post("/v1/banks/notes/documents", json={"id": "a", "text": some_text(20)})
    for owner, name in ((engine, "ids"), (engine.banks, "get"), (engine.banks, "names"), (engine, "explain")):
        monkeypatch.setattr(owner, name, off_the_loop(name, getattr(owner, name)))
    answers = [
        client.post("/v1/chat/completions", json=CHAT | {"bank": "notes"}),
        client.post("/v1/completions", json={"prompt": "the cat", "max_tokens": 2}),
        client.post("/v1/explain", json={"messages": SAID, "answer": "on", "bank": "notes"}),
        *(client.get(f"/v1/banks{path}") for path in ("", "/notes/documents", "/notes/find?text=cat&by=words")),
        client.delete("/v1/banks/notes/documents/a"),
        client.delete("/v1/banks/notes"),
    ]
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    assert set(asked) == {"ids", "get", "names", "explain"}


def test_conversations_at_once_are_as_each_alone(client, engine):
    """Each is far longer than the window: what has left it is in a memory that nobody else reads."""
    talks = [[{"role": "user", "content": some_text(80, seed)}] for seed in range(4)]
    asked = [{"messages": talk, "temperature": 0, "max_tokens": 8} for talk in talks]
    alone = [client.post("/v1/chat/completions", json=each).json()["choices"] for each in asked]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda each: client.post("/v1/chat/completions", json=each).json()["choices"], asked))
    assert together == alone
    assert len({each[0]["message"]["content"] for each in alone}) > 1
    ids = engine.ids(talks[0])
    window, memory = engine.place(Request(ids))
    (info,) = memory.documents()
    known = torch.cat([memory.token_ids(info.document_id), torch.tensor(window)])
    assert known.tolist() == ids
    assert len(window) <= engine.model.config.segment_length
    assert engine.banks.names() == []


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": [{"role": "cat", "content": "x"}]}, 400, "messages.0.role"),
        ("chat/completions", {**CHAT, "temperature": 9}, 400, "temperature"),
        ("chat/completions", {**CHAT, "n": 2}, 400, "n"),
        ("chat/completions", {**CHAT, "logit_bias": {"1": 5}}, 400, "`logit_bias` must be left out, got {'1': 5}"),
        ("chat/completions", {**CHAT, "tools": [{"type": "function"}]}, 400, "`tools` must be left out"),
        ("chat/completions", {**CHAT, "logprobs": True}, 400, "`logprobs` must be left out, got True"),
        ("chat/completions", {**CHAT, "logprobs": 0}, 400, "`logprobs` must be left out, got 0"),
        ("chat/completions", {**CHAT, "n": True}, 400, "`n` must be left out, got True"),
        (
            "chat/completions",
            {**CHAT, "response_format": {"type": "json_object"}},
            400,
            "`response_format` must be left out",
        ),
        ("chat/completions", {**CHAT, "stream_options": {"include_usage": True}}, 400, "must come with `stream`"),
        ("chat/completions", {**CHAT, "stop": ""}, 400, "`stop`: string should have at least 1 character, got ''."),
        ("chat/completions", {**CHAT, "stop": ["x", 3]}, 400, "`stop.1`: input should be a valid string, got 3."),
        ("chat/completions", {**CHAT, "stop": 3}, 400, "`stop`: input should be a valid string, got 3."),
        (
            "chat/completions",
            {**CHAT, "max_tokens": True},
            400,
            "`max_tokens`: input should be a valid integer, got True.",
        ),
        (
            "chat/completions",
            {**CHAT, "max_tokens": "3"},
            400,
            "`max_tokens`: input should be a valid integer, got '3'.",
        ),
        ("chat/completions", {**CHAT, "temperature": float("nan")}, 400, "got nan."),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "`messages.0.content`: field required."),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": 3}]},
            400,
            "`messages.0.content`: input should be a",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            400,
            "`messages.0.content.0.",
        ),
        ("completions", {"prompt": ["a", "b"]}, 400, "`prompt`: list should have at most 1 item"),
        ("completions", {"prompt": [3]}, 400, "`prompt.0`: input should be a valid string, got 3."),
        ("completions", {"prompt": "a", "echo": True}, 400, "`echo` must be left out, got True"),
        ("completions", {"prompt": "a", "best_of": 2}, 400, "`best_of` must be left out, got 2"),
        ("chat/completions", {**CHAT, "max_tokens": 10**9}, 400, "`max_tokens` must be at most"),
        ("chat/completions", {**CHAT, "model": "gpt"}, 404, "`model` must be 'tiny'"),
        ("chat/completions", {**CHAT, "bank": "absent"}, 404, "`bank` must be one that is there"),
        ("chat/completions", {**CHAT, "bank": "../x"}, 400, "`bank` must be 1 to 64"),
        ("completions", {"prompt": ""}, 400, "prompt"),
        ("completions", {"prompt": "x" * 60_000}, 413, "at most 50,000 bytes"),
        ("banks/..%2Fx/documents", {"id": "a", "text": "b"}, 404, ""),
        ("banks/.x/documents", {"id": "a", "text": "b"}, 400, "`bank` must be"),
        ("banks/x/documents", {"id": "", "text": "b"}, 400, "id"),
        ("explain", {"messages": SAID, "answer": ""}, 400, "answer"),
        ("chat/completions", {**CHAT, "temperature": 1e-40}, 400, "`temperature` must be 0 or at least"),
        ("chat/completions", {**CHAT, "max_completion_tokens": 3}, 400, "one limit under two names"),
        ("chat/completions", {**CHAT, "messages": [{"role": "user", "content": "\ud800"}]}, 400, "half of a surrogate"),
        ("explain", {"messages": SAID, "answer": [{"type": "text"}]}, 400, "answer"),
        ("nowhere", {}, 404, ""),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(client, path, body, status, words):
    answer = client.post(f"/v1/{path}", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "asks",
    [
        dict.fromkeys(
            ("n", "stop", "seed", "stream", "logprobs", "tools", "frequency_penalty", "user", "anything", "bank")
        ),
        {"n": 1, "frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "parallel_tool_calls": False},
        {"logprobs": False, "top_logprobs": 0, "tools": [], "tool_choice": "none", "store": False, "stop": []},
        {
            "response_format": {"type": "text"},
            "modalities": ["text"],
            "service_tier": "auto",
            "user": "me",
            "metadata": {},
        },
    ],
)
def test_what_asks_for_nothing_changes_nothing(client, asks):
    short = CHAT | {"max_tokens": 2}
    alone = client.post("/v1/chat/completions", json=short).json()["choices"]
    answer = client.post("/v1/chat/completions", json=short | asks)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"] == alone


def test_the_official_client_goes_on_with_what_it_was_told(theirs):
    """An answer is put back as it came, whether as an object or with all its empty fields; prompts come in lists."""
    said = theirs.chat.completions.create(model="tiny", **CHAT).choices[0].message
    for back in (said, said.model_dump()):
        asked = CHAT | {"messages": [*SAID, back, *SAID], "max_tokens": 2}
        assert theirs.chat.completions.create(model="tiny", **asked).choices[0].message.content
    text, in_list = (
        theirs.completions.create(model="tiny", prompt=prompt, max_tokens=4, echo=False, best_of=1, suffix=None)
        for prompt in ("the cat", ["the cat"])
    )
    assert text.choices[0].text == in_list.choices[0].text
    assert theirs.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="`model` must be 'tiny'"):
        theirs.models.retrieve("other/model")


def test_what_is_no_json_is_told_so(client):
    for content in (b"", b"{", b"\xff\xfe", b"[" * 5000, b'"text"', b'{"messages": NaN}'):
        answer = client.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422), content
        assert answer.json()["error"]["message"]
    for kind in ({}, {"Content-Type": "text/plain"}):
        answer = client.post("/v1/chat/completions", content=json.dumps(CHAT), headers=kind)
        assert (answer.status_code, "Content-Type: application/json" in answer.text.replace("\\", "")) == (400, True)


WRONG = (
    ({"content": b"{"}, 400),
    ({"json": {"messages": "no"}}, 400),
    ({"json": CHAT | {"bank": "absent"}}, 404),
    ({"json": CHAT | {"max_tokens": -1}}, 400),
    ({"content": b"x" * 60_000}, 413),
)


def test_fifty_requests_at_once_some_of_them_wrong(client):
    """Every answer is the one that the request alone would have got."""
    talks = [
        CHAT | {"messages": [{"role": "user", "content": f"the cat {number}"}], "max_tokens": 2} for number in range(5)
    ]
    asked = [WRONG[number // 5 % 5] if number % 5 == 4 else ({"json": talks[number % 5]}, 200) for number in range(50)]
    alone = [client.post("/v1/chat/completions", json=talk).json()["choices"] for talk in talks]
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda each: client.post("/v1/chat/completions", **each[0]), asked))
    assert [answer.status_code for answer in answers] == [status for _, status in asked]
    for number, answer in enumerate(answers):
        told = answer.json()
        assert told["choices"] == alone[number % 5] if number % 5 != 4 else told["error"]["message"]


def test_more_than_may_wait_are_sent_away(model):
    engine = Engine(model, NamedBanks(model, None), max_waiting=1)

    async def both():
        first = asyncio.create_task(engine.run(lambda: 1))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="1 requests wait already"):
            engine.refuse_if_busy()
        return await first

    assert asyncio.run(both()) == 1
    engine.close()
    engine._waiting = 1
    answer = TestClient(make_app(engine, model_id="tiny"), base_url="http://localhost", client=("::1", 1)).post(
        "/v1/chat/completions", json=CHAT
    )
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


@pytest.mark.parametrize("failure", [RuntimeError("secret"), KeyError("secret")])
def test_the_server_survives_a_failure_and_does_not_tell_it(client, engine, monkeypatch, failure):
    def fail(*_):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(engine, "answer", fail)
        answer = client.post("/v1/chat/completions", json=CHAT)
        streamed = client.post("/v1/chat/completions", json=CHAT | {"stream": True}).text
    assert answer.status_code == 500
    assert "secret" not in answer.text + streamed
    assert '"server_error"' in streamed
    assert streamed.endswith("data: [DONE]\n\n")
    assert client.post("/v1/chat/completions", json=CHAT).status_code == 200


def ask(app, address, **headers):
    client = TestClient(app, base_url="http://127.0.0.1", client=(address, 1))
    return client.get("/v1/models", headers=headers).status_code, client.get("/", headers=headers).status_code


def test_who_may_come_in(engine):
    local, guarded = (make_app(engine, model_id="tiny", token=token) for token in (None, "s3cret"))
    assert ask(local, "127.0.0.1") == (200, 200)
    assert ask(local, "10.0.0.9") == (403, 403)
    assert ask(local, "127.0.0.1", host="evil.example") == (403, 403)  # a name elsewhere that leads here
    assert ask(local, "127.0.0.1", origin="http://evil.example") == (403, 403)
    assert ask(local, "127.0.0.1", origin="http://127.0.0.1") == (200, 200)
    assert ask(guarded, "10.0.0.9") == (401, 200)
    assert ask(guarded, "127.0.0.1") == (401, 200)
    assert ask(guarded, "10.0.0.9", authorization="Bearer wrong") == (401, 200)
    assert ask(guarded, "10.0.0.9", authorization="Bearer s3cret") == (200, 200)


def test_the_command_refuses_an_open_door(run_main):
    assert "`--host` must be 127.0.0.1 without a token" in run_main("serve", "--host", "0.0.0.0")
    assert "`--max-waiting` must be at least 1" in run_main("serve", "--max-waiting", "0")
    for port in ("-1", "65536"):
        assert "`--port` must be from 0" in run_main("serve", "--port", port)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        told = run_main("serve", "--port", str(taken.getsockname()[1]), "--model", "absent")
    assert "`--host` and `--port` must be an address of this machine that is free" in told
    for token in ("two words", "clé", "a\n"):
        assert "`--token` must be" in run_main("serve", "--token", token)


@pytest.fixture
def run_main(capsys, monkeypatch):
    monkeypatch.delenv("LONGMEM_TOKEN", raising=False)

    def run(*arguments):
        assert main(list(arguments)) == 2
        return capsys.readouterr().err

    return run


def test_a_stream_that_nobody_reads_any_longer_ends(url, engine, theirs, monkeypatch):
    ended = []
    answer = engine.answer

    def recorded(*given):
        ended.append(answer(*given).num_tokens)
        return ended

    monkeypatch.setattr(engine, "answer", recorded)
    with theirs.chat.completions.create(model="tiny", stream=True, **CHAT | {"max_tokens": 2000}) as stream:
        next(iter(stream))
        next(iter(stream))
    assert theirs.models.list()
    for _ in range(600):
        if ended:
            break
        asyncio.run(asyncio.sleep(0.05))
    assert ended
    assert ended[0] < 2000


@pytest.mark.parametrize("path", fast(1, ["chat/completions", "explain"]))
def test_a_long_conversation_that_nobody_waits_for_is_read_no_further(url, engine, monkeypatch, path):
    read, encode = [], engine.model.encoder.encode

    def slowly(ids):
        read.append(ids)
        time.sleep(0.05)
        return encode(ids)

    monkeypatch.setattr(engine.model.encoder, "encode", slowly)
    monkeypatch.setattr("longmem.serving.api.LOOK_EVERY", 0.02)
    said = {"messages": [{"role": "user", "content": some_text(6000)}]} | ({"answer": "x"} if path == "explain" else {})
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/{path}", json=said, timeout=0.5)
    assert httpx.get(f"{url}/v1/banks/absent/documents", timeout=60).status_code == 404
    assert len(read) < 100  # of some 400 windows


def test_a_bank_that_is_deleted_during_an_answer_is_read_to_its_end(url, theirs):
    httpx.post(f"{url}/v1/banks/notes/documents", json={"id": "a", "text": some_text(30)}, timeout=60)
    asked = CHAT | {"model": "tiny", "max_tokens": 40, "extra_body": {"bank": "notes"}}
    alone = theirs.chat.completions.create(**asked).choices[0].message.content
    with theirs.chat.completions.create(stream=True, **asked) as stream, ThreadPoolExecutor(1) as pool:
        pieces = [next(stream)]
        deleted = pool.submit(httpx.delete, f"{url}/v1/banks/notes", timeout=60)
        pieces += stream
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == alone
    assert deleted.result().status_code == 200
    with pytest.raises(openai.NotFoundError, match="`bank` must be one that is there"):
        theirs.chat.completions.create(**asked)


def test_an_answer_that_nobody_waits_for_ends_and_lets_others_in(url, engine, monkeypatch):
    ended, answer = [], engine.answer

    def recorded(*given):
        ended.append((found := answer(*given)).num_tokens)
        return found

    monkeypatch.setattr(engine, "answer", recorded)
    monkeypatch.setattr("longmem.serving.api.LOOK_EVERY", 0.02)
    for _ in range(3):  # one that is answered, and two that wait
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json={"prompt": "the cat", "max_tokens": 4000}, timeout=0.2)
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 2}, timeout=60).status_code == 200
    assert ended[-1] == 2
    assert max(ended) < 4000
    assert engine._waiting == 0


NAMES = ["..", ".", "../..", "a/b", "a\nb", "%2F", "?id=x", "#", " ", "\u202eé", "a" * 512]


def test_a_document_of_any_name_is_forgotten_and_nothing_else(client):
    documents = "/v1/banks/notes/documents"
    for name in [*NAMES, "stays"]:
        assert client.post(documents, json={"id": name, "text": "the cat sat"}).status_code == 201
    for path in (
        "/v1/banks/notes/",
        "/v1/banks/notes/documents/",
        "/v1/banks/notes/documents/../",
    ):  # as clients shorten
        assert client.delete(path, follow_redirects=True).status_code in (400, 404)
    for name in NAMES:
        assert client.delete(documents, params={"id": name}).json()["id"] == name
    assert [each["id"] for each in client.get(documents).json()["data"]] == ["stays"]
    assert client.delete(f"{documents}/stays").status_code == 200
    assert client.delete(documents).status_code == 400


@pytest.mark.parametrize("wrong", [{"text": " "}, {"tags": [""]}, {"id": "\0\ud800"}])
def test_a_bank_that_was_made_for_what_failed_is_gone(client, model, tmp_path, wrong):
    on_disk = NamedBanks(model, tmp_path)
    app = make_app(Engine(model, on_disk), model_id="tiny")
    other = TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 1), raise_server_exceptions=False)
    for each in (client, other):
        body = json.dumps({"id": "a", "text": "the cat", **wrong})
        options = {"content": body, "headers": {"Content-Type": "application/json"}}
        assert each.post("/v1/banks/new/documents", **options).status_code == 400
        assert each.get("/v1/banks").json()["data"] == []
        assert each.post("/v1/banks/new/documents", json={"id": "a", "text": "the cat"}).status_code == 201
        assert each.post("/v1/banks/new/documents", **options).status_code == 400
        assert [bank["id"] for bank in each.get("/v1/banks").json()["data"]] == ["new"]
    on_disk.close()


def test_a_share_alone_draws(theirs):
    asked = {"model": "tiny", "prompt": "the cat", "max_tokens": 12}
    greedy = theirs.completions.create(**asked).choices[0].text
    drawn = [theirs.completions.create(**asked, top_p=0.99, seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert theirs.completions.create(**asked, top_p=1).choices[0].text == greedy
    assert theirs.completions.create(**asked, top_p=0.99, temperature=0).choices[0].text == greedy


def test_a_window_of_one_chunk_holds_the_end_of_a_conversation(model):
    options = {"segment_length": 64, "chunk_size": 64, "num_retrieved_tokens": 64}
    of_large_chunks = LongMemForCausalLM.from_backbone(model.backbone, tokenizer=model.tokenizer, **options).eval()
    engine = Engine(of_large_chunks, NamedBanks(of_large_chunks, None))
    for length in (64, 65, 96, 97, 100, 128, 129, 250):
        window, memory = engine.place(Request(list(range(length))))
        assert 1 <= len(window) <= 64
        assert (0 if memory is None else memory.num_tokens) + len(window) == length
    engine.close()


FORMAT = """{% for each in messages %}{% if each.role == 'system' or (each.role == 'user') == (loop.index0 % 2 == 1) %}
{{ raise_exception('roles must alternate') }}{% endif %}<{{ each.role }}>{{ each.content }}{% endfor %}"""


@pytest.mark.parametrize("roles", ["system user", "user user", "assistant"])
def test_what_a_template_has_no_place_for_is_told(client, model, monkeypatch, roles):
    monkeypatch.setattr(model.tokenizer, "chat_template", FORMAT)
    said = [{"role": role, "content": "the cat"} for role in roles.split()]
    answer = client.post("/v1/chat/completions", json={**CHAT, "messages": said})
    assert answer.status_code == 400
    assert "roles must alternate" in answer.json()["error"]["message"]
    assert client.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_a_document_comes_in_parts(client, engine):
    parts = [some_text(30), " " + some_text(20, seed=1)]
    for number, part in enumerate(parts):
        body = {"id": "a.txt", "text": part, "append": number > 0}
        assert client.post("/v1/banks/notes/documents", json=body).status_code == 201
    assert engine.banks.get("notes").text("a.txt") == "".join(parts)
    for body, status in (({"id": "b", "text": "x", "append": True}, 400), ({"id": "a.txt", "text": "x"}, 400)):
        assert client.post("/v1/banks/notes/documents", json=body).status_code == status
    wrong = client.post("/v1/banks/absent/documents", json={"id": "b", "text": "x", "append": True})
    assert wrong.status_code == 404


def test_explain_is_the_page_of_that_answer(client):
    client.post("/v1/banks/notes/documents", json={"id": "a.txt", "text": some_text(30)})
    body = {"messages": SAID, "answer": "on a mat", "bank": "notes"}
    page = client.post("/v1/explain", json=body).text
    data = json.loads(re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)[0])
    assert "".join(token[0] for token in data["tokens"]).endswith("on a mat")
    assert data["documents"][0][0] == "a.txt"


def test_banks_in_folders_are_there_for_the_next_server(model, tmp_path, monkeypatch):
    monkeypatch.setenv("LONGMEM_ACCESS", "group")
    banks = NamedBanks(model, tmp_path / "above" / "banks")
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "above", tmp_path / "above" / "banks")] == [0o750] * 2
    banks = NamedBanks(model, tmp_path / "banks")
    model.memorize(banks.get("notes", make=True), some_text(30), "a")
    banks.close()
    (tmp_path / "banks" / "elsewhere").symlink_to(tmp_path)
    again = NamedBanks(model, tmp_path / "banks", limit=1)
    assert again.names() == ["notes"]
    assert "a" in again.get("notes")
    with pytest.raises(ValueError, match="which is the limit"):
        again.get("more", make=True)
    again.delete("notes")
    assert again.names() == []
    assert not (tmp_path / "banks" / "notes").exists()
    again.close()


def test_an_empty_bank_is_no_memory(engine):
    engine.banks.get("empty", make=True)
    assert engine.place(Request([1, 2], bank="empty")) == ([1, 2], None)
    assert isinstance(engine.banks.get("empty"), MemoryBank)
