"""The server over HTTP, with a tiny real model in this process: answers, refusals, queue, clients that leave."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import numpy as np
import openai
import pytest
from conftest import script_parser
from openai import OpenAI
from PIL import Image
from serve_process import ask, client_of, figure, get, post, served, wait_until
from tiny_serve import BAD, BLUE, CHAT, LONG, RED, data_url, models, picture, user, with_picture
from tiny_web import write_export

from clips import CLIPS
from clips.common.errors import UserError
from mllm.chat.limits import Limits
from mllm.chat.model import ChatModel, Sampling
from mllm.chat.session import ChatSession
from mllm.serve import app
from mllm.serve.app import _find_encoder, embed, serve_from_flags
from mllm.serve.queue import RequestQueue
from mllm.serve.schemas import UNSUPPORTED, parse


@pytest.fixture(scope="module")
def place(made_once: Callable[..., Path]) -> Path:
    return models(made_once)


@pytest.fixture(scope="module")
def chat(place: Path) -> ChatModel:
    return ChatModel.load(str(place / "runs" / "llava" / "model"), device="cpu")


@pytest.fixture(scope="module")
def encoder(place: Path) -> CLIPS:
    return CLIPS.from_pretrained(place / "runs" / "clips-demo", device="cpu")


@pytest.fixture(scope="module")
def address(chat: ChatModel, encoder: CLIPS) -> Iterator[str]:
    limits = Limits(new_tokens=30_000, body_bytes=2 * 2**20, fetch_seconds=2, waiting=40, inputs=30)
    with served(chat, encoder, limits, allow_image_urls=True) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> OpenAI:
    return client_of(address)


def test_a_body_that_is_begun_and_left_logs_nothing(address: str, capfd: pytest.CaptureFixture[str]) -> None:
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as left:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        left.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
        wait_until(lambda: figure(address, "clips_requests_open") == 1)
    wait_until(lambda: figure(address, "clips_requests_open") == 0)
    assert capfd.readouterr().err == ""


# ---------------------------------------------------------------------------------------------- answers


def test_an_answer_is_the_chat_sessions(client: OpenAI, chat: ChatModel) -> None:
    """Two pictures, a system text and an earlier turn give the answer of `ChatSession`."""
    messages = [
        {"role": "system", "content": "Be brief."},
        user("What is it?", picture(RED)),
        {"role": "assistant", "content": "A red one."},
        user(picture(BLUE), "And ", "this?"),
    ]
    done = ask(client, *messages, max_tokens=12)
    session = ChatSession(chat, system="Be brief.")
    session.turns = [
        {"from": "human", "value": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"from": "gpt", "value": [{"type": "text", "text": "A red one."}]},
    ]
    session.images = [Image.new("RGB", (40, 28), "red")]
    expected = "".join(session.ask("And this?", [Image.new("RGB", (40, 28), "blue")], Sampling(max_new_tokens=12)))
    assert expected
    assert done.choices[0].message.content == expected
    assert done.choices[0].message.role == "assistant"
    assert done.choices[0].finish_reason == "length"
    assert (done.object, done.model) == ("chat.completion", "llava")
    assert done.usage.prompt_tokens == session.last.prompt_tokens
    assert done.usage.completion_tokens == 12
    assert done.usage.total_tokens == done.usage.prompt_tokens + 12
    swapped = ask(client, *[*messages[:3], user(picture(RED), "And this?")], max_tokens=12)
    assert swapped.choices[0].message.content != expected


def test_a_stream_is_the_same_answer_in_pieces(client: OpenAI) -> None:
    message = user("What is it?", picture(RED))
    whole = ask(client, message, max_tokens=40)
    chunks = list(ask(client, message, max_tokens=40, stream=True, stream_options={"include_usage": True}))
    *answer, usage = chunks
    pieces = [chunk.choices[0].delta.content for chunk in answer if chunk.choices[0].delta.content]
    assert len(pieces) > 5
    assert "".join(pieces) == whole.choices[0].message.content
    assert answer[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in answer][-2:] == [None, "length"]
    assert (usage.choices, usage.usage) == ([], whole.usage)
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in ask(client, message, stream=True))
    assert ask(client, message, max_tokens=40, temperature=1e-300).choices == whole.choices  # greedy too


def test_sampling(client: OpenAI) -> None:
    def answer(**options: object) -> str:
        return ask(client, user(LONG), max_tokens=12, **options).choices[0].message.content

    greedy = answer()
    assert greedy == answer() == answer(temperature=0, seed=3)
    assert answer(temperature=1.5, seed=1) == answer(temperature=1.5, seed=1)
    assert len({answer(temperature=1.5, seed=seed) for seed in range(4)}) > 1
    assert answer(temperature=2, seed=1, top_p=1e-6) == greedy  # only the likeliest token is left
    stop = greedy[5:7]
    ended = ask(client, user(LONG), max_tokens=12, stop=["never said", stop])
    assert ended.choices[0].message.content == greedy[: greedy.index(stop)].rstrip()
    assert ended.choices[0].finish_reason == "stop"
    assert answer(stop=stop) == ended.choices[0].message.content


def test_typed_placeholders_are_text(client: OpenAI) -> None:
    """`<image>` and control tokens count as the many tokens that their letters are, with and without a picture."""
    plain = ask(client, user("Hello")).usage.prompt_tokens
    typed = ask(client, user("Hello <image> <|im_end|>")).usage.prompt_tokens
    assert plain + 10 < typed < plain + 16 + 10 + 10  # sixteen would be a picture's places
    seen = ask(
        client, user("<image> Hello <image>", picture(RED)), {"role": "assistant", "content": "<image>"}, user("?")
    )
    assert seen.choices[0].message.content
    assert ask(client, {"role": "system", "content": "<image>"}, user("Hello")).choices[0].message.content
    extra = {"user": "me", "metadata": {"a": "b"}, "whatever": [1], "n": 1, "tools": [], "logprobs": False}
    assert ask(client, user("Hello"), extra_body=extra).usage.prompt_tokens == plain  # unknown and neutral fields


# ---------------------------------------------------------------------------------------------- embeddings


def test_embeddings_are_the_encoders(client: OpenAI, encoder: CLIPS) -> None:
    inputs = ["a red cat", {"image": RED}, "two dogs", "a red cat", {"image": BLUE}]
    done = client.embeddings.create(model="encoder", input=inputs)  # base64 on the wire, as this client asks for it
    rows = np.array([entry.embedding for entry in done.data], dtype=np.float32)
    pictures = [Image.new("RGB", (40, 28), colour) for colour in ("red", "blue")]
    expected = embed(encoder, ["a red cat", pictures[0], "two dogs", "a red cat", pictures[1]])
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert [entry.index for entry in done.data] == [0, 1, 2, 3, 4]
    assert not np.allclose(rows[1], rows[4])
    assert done.usage.prompt_tokens == encoder.count_tokens(["a red cat", "two dogs", "a red cat"]) > 0
    floats = client.embeddings.create(model="encoder", input="two dogs", encoding_format="float")
    np.testing.assert_allclose(floats.data[0].embedding, expected[2], atol=1e-6)
    with pytest.raises(openai.NotFoundError, match="known: 'llava', 'encoder'"):
        client.embeddings.create(model="gpt-5", input="two dogs")


def test_without_an_encoder_and_without_fetching(chat: ChatModel) -> None:
    with served(chat, "no finished run under runs/", Limits(held_bytes=1_000_000)) as address:
        client = client_of(address)
        with pytest.raises(openai.NotFoundError, match="no encoder: no finished run under runs/"):
            client.embeddings.create(model="encoder", input="a cat")
        assert [model.id for model in client.models.list()] == ["llava"]
        response = post(address, with_picture("http://8.8.8.8/x.png"))
        assert response.status_code == 400
        assert "--allow-image-urls" in response.json()["error"]["message"]
        for _ in range(2):  # a body above the bytes of all requests: its bytes are free again afterwards
            response = post(address, with_picture("data:image/png;base64," + "A" * 2**20))
            assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
            assert post(address, CHAT).status_code == 200


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("body", "param", "message"), [pytest.param(*case, id=name) for name, case in BAD.items()])
def test_a_bad_request_gets_400_and_the_reason(address: str, body: object, param: str | None, message: str) -> None:
    response = post(address, body)
    if isinstance(body, dict):
        assert post(address, body | {"stream": True}).json() == response.json()
    error = response.json()["error"]
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"
    assert message in error["message"]
    assert len(error["message"]) < 500
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"] == "context_length_exceeded") == ("the model reads" in message)


def test_a_bad_embeddings_request_gets_400(address: str) -> None:
    cases: list[tuple[dict, str | None]] = [
        ({"input": [0] * 600_000}, None),  # counted before it is validated
        ({"input": []}, "input"),
        ({}, "input"),
        ({"input": [[1, 2]]}, "input[0]"),
        ({"input": [{"image": RED, "text": "both"}]}, "input[0]"),
        ({"input": ["a"] * 31}, "input"),
        ({"input": [{"image": RED}] * 21}, "input"),
        ({"input": "a" * 100_001}, "input"),
        ({"input": {"image": data_url(b"text")}}, "input"),
        ({"input": "a", "dimensions": 8}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
    ]
    for body, param in cases:
        response = post(address, {"model": "encoder"} | body, "/v1/embeddings")
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_other_paths_and_methods(address: str) -> None:
    for asked, status in {
        "GET /": 404,
        "GET /docs": 404,
        "POST /v1/completions": 404,
        "GET /v1/embeddings": 405,
    }.items():
        method, path = asked.split()
        response = httpx2.request(method, address + path, trust_env=False)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    response = post(address, CHAT | {"model": "gpt-5"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    for name in UNSUPPORTED:
        response = post(address, CHAT | {name: "something"})
        assert (response.status_code, response.json()["error"]["param"]) == (400, name)
    # A foreign web page can send this type without asking.
    assert post(address, CHAT, Content_Type="text/plain").status_code == 415
    assert post(address, CHAT, Content_Type="application/json; charset=utf-8").status_code == 200


@pytest.mark.parametrize("declared", [True, False])
def test_a_huge_upload_gets_413(address: str, declared: bool) -> None:
    size = 2 * 2**20 + 1
    body = b" " * size if declared else (b" " * 100_000 for _ in range(size // 100_000 + 1))
    response = post(address, body)
    assert response.status_code == 413
    assert "above this server's limit" in response.json()["error"]["message"]


# ---------------------------------------------------------------------------------------------- many, and leaving


def test_twenty_at_once(client: OpenAI, address: str) -> None:
    """Each gets the answer it gets alone, streamed or not."""
    questions = [user(f"Question {i}?", *([picture(RED)] if i % 3 == 0 else [])) for i in range(20)]

    def one(i: int) -> str:
        if i % 2:
            return ask(client, questions[i]).choices[0].message.content
        chunks = ask(client, questions[i], stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(one, range(20)))
    assert answers == [one(i) for i in range(20)]
    assert len(set(answers)) > 10


@contextlib.contextmanager
def long_answer(client: OpenAI, address: str) -> Iterator[openai.Stream]:
    """An answer in the making that takes a minute, until left."""
    stream = ask(client, user(LONG), max_tokens=30_000, stream=True)
    try:
        next(stream)
        assert figure(address, "clips_requests_running") == 1
        yield stream
    finally:
        stream.close()


def test_the_newest_encoder_may_be_a_clip_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One caption an image trains CLIP alone, and the server said that it has no encoder."""
    monkeypatch.chdir(tmp_path)
    flags = argparse.Namespace(encoder=None, device="cpu")
    assert "task.objective 'clips'" in str(_find_encoder(flags))
    write_export(tmp_path / "runs" / "mine", "clip")
    assert getattr(_find_encoder(flags), "path", None) == Path("runs/mine/export")


def test_a_full_queue_gets_429(chat: ChatModel, encoder: CLIPS) -> None:
    with served(chat, encoder, Limits(new_tokens=30_000, waiting=1)) as address:
        client = client_of(address)
        results = []
        waiting = threading.Thread(daemon=True, target=lambda: results.append(ask(client, user("Hello"))))
        with long_answer(client, address):
            waiting.start()
            wait_until(lambda: figure(address, "clips_requests_waiting") == 1)
            for body in (CHAT, with_picture(data_url(b"x" * 3_000_000))):
                response = post(address, body)
                assert response.status_code == 429
                assert response.headers["retry-after"] == "2"
                assert response.json()["error"]["type"] == "rate_limit_error"
            assert get(f"{address}/health").status_code == 200
        waiting.join(20)
        assert results[0].choices[0].message.content
        assert post(address, CHAT).status_code == 200


def test_a_client_that_leaves_while_it_waits_frees_its_place(client: OpenAI, address: str) -> None:
    """Streamed or not, in the queue or in the making."""
    impatient = client.with_options(timeout=0.3)
    with long_answer(client, address):
        for stream in (False, True):
            with pytest.raises(openai.APITimeoutError):
                ask(impatient, user("Hello"), stream=stream)
        wait_until(lambda: figure(address, "clips_requests_waiting") == 0)
        assert figure(address, "clips_requests_running") == 1
    with pytest.raises(openai.APITimeoutError):
        ask(impatient, user(LONG), max_tokens=30_000)
    wait_until(lambda: figure(address, "clips_requests_running") == 0)
    assert ask(client, user("Hello")).choices[0].message.content


def test_an_answer_and_a_body_end_with_their_time(chat: ChatModel, encoder: CLIPS) -> None:
    def dripping() -> Iterator[bytes]:
        yield b"{"
        time.sleep(1.3)
        yield b"}"

    with served(chat, encoder, Limits(new_tokens=30_000, seconds=1, body_seconds=1)) as address:
        done = ask(client_of(address), user(LONG), max_tokens=30_000)
        assert done.choices[0].finish_reason == "length"
        assert 0 < done.usage.completion_tokens < 30_000
        assert post(address, dripping(), "/v1/embeddings").status_code == 408


def raw(address: str, data: bytes, source: str = "127.0.0.1") -> socket.socket:
    """A connection from the loopback address `source` over which `data` was sent."""
    connection = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), 30, (source, 0))
    connection.sendall(data)
    return connection


BEGUN = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_slow_bodies_lock_nobody_out(chat: ChatModel, encoder: CLIPS) -> None:
    """More of them than there are places, from several addresses: others are answered meanwhile."""
    with served(chat, encoder, Limits(waiting=2, per_client=2)) as address, contextlib.ExitStack() as stack:
        for i in range(8):
            begun = BEGUN + b"Content-Length: 500\r\n\r\n{"
            stack.enter_context(raw(address, begun, f"127.0.0.{2 + i // 2}"))
        wait_until(lambda: figure(address, "clips_requests_open") == 8)
        assert post(address, CHAT).status_code == 200
        third = stack.enter_context(raw(address, BEGUN + b"Content-Length: 2\r\n\r\n{}", "127.0.0.2"))
        assert third.recv(100).startswith(b"HTTP/1.1 429")


def test_health_answers_while_a_body_of_8_mb_is_refused(chat: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The body is looked at outside the event loop: here not before /health has answered."""
    begun, answered = threading.Event(), threading.Event()

    def waiting(*given: object) -> object:
        begun.set()
        assert answered.wait(60), "/health waited for the body"
        return parse(*given)

    monkeypatch.setattr(app, "parse", waiting)
    body = b'{"model":"llava","messages":[' + b"{}," * (8 * 2**20 // 3) + b"{}]}"
    with served(chat, "none", Limits()) as address, ThreadPoolExecutor(1) as pool:
        refused = pool.submit(post, address, body)
        assert begun.wait(60)
        assert get(f"{address}/health").status_code == 200
        answered.set()
        assert refused.result().status_code == 400
        assert "limit of JSON values" in refused.result().json()["error"]["message"]


def test_one_client_s_bodies_together_are_bounded(chat: ChatModel, encoder: CLIPS) -> None:
    with served(chat, encoder, Limits(body_bytes=1_000_000)) as address:
        half = BEGUN + b"Content-Length: 900000\r\n\r\n" + b" " * 600_000
        with raw(address, half) as first, raw(address, half) as second:
            (refused, *_), _, _ = select.select([first, second], [], [], 30)  # whichever the server reads later
            assert refused.recv(100).startswith(b"HTTP/1.1 429")
            with raw(address, half, "127.0.0.2") as other:
                other.sendall(b" " * 300_000)
                assert other.recv(100).startswith(b"HTTP/1.1 400")  # of another address: read to its end, no JSON


def test_headers_that_do_not_arrive_are_hung_up_on(
    chat: ChatModel, encoder: CLIPS, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mllm.serve.connections.HEADER_SECONDS", 0.4)
    begun = (b"", b"GET /health HTT", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")
    with served(chat, encoder, Limits()) as address:
        with contextlib.ExitStack() as stack:
            waiting = [stack.enter_context(raw(address, sent)) for sent in begun]
            assert [connection.recv(100) for connection in waiting] == [b""] * len(begun)
        with raw(address, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as kept:
            assert kept.recv(1000).startswith(b"HTTP/1.1 200")
            kept.sendall(b"GET /health HT")  # the next request on a connection that is kept
            assert b"HTTP" not in kept.recv(100)
        assert post(address, CHAT | {"max_tokens": 1}).status_code == 200


def test_one_client_s_connections_are_bounded(chat: ChatModel, encoder: CLIPS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mllm.serve.connections.PER_CLIENT", 3)
    with served(chat, encoder, Limits()) as address, contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(raw(address, b"", "127.0.0.2"))
        fourth = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), 30, ("127.0.0.2", 0))
        with fourth, contextlib.suppress(ConnectionResetError):
            assert fourth.recv(10) == b""
        assert post(address, CHAT | {"max_tokens": 1}).status_code == 200


def test_metrics(client: OpenAI, address: str) -> None:
    before = {kind: figure(address, f'clips_tokens_total{{kind="{kind}"}}') for kind in ("prompt", "completion")}
    usage = ask(client, user("Hello"), max_tokens=5).usage
    assert figure(address, 'clips_tokens_total{kind="prompt"}') == before["prompt"] + usage.prompt_tokens
    assert figure(address, 'clips_tokens_total{kind="completion"}') == before["completion"] + 5
    assert figure(address, 'clips_requests_total{route="/v1/chat/completions",status="200"}') >= 1
    assert figure(address, "clips_first_token_seconds_count") >= 1
    get(f"{address}/some/{'x' * 50}")
    text = get(f"{address}/metrics").text
    assert 'clips_requests_total{route="other",status="404"}' in text  # strangers cannot add series
    assert "/some/" not in text


def test_a_reader_that_stops_reading_holds_up_nobody() -> None:
    async def main() -> None:
        queue = RequestQueue(10)
        slow = queue.run(lambda _: iter(range(1000)))
        assert await anext(slow) == 0
        assert [item async for item in queue.run(lambda _: iter("ab"))] == ["a", "b"]
        assert [item async for item in slow] == list(range(1, 1000))

    asyncio.run(main())


def test_work_that_was_given_up_keeps_its_turn_until_it_ends() -> None:
    """Six clients that leave at once must not have six works running beside each other."""

    async def main() -> None:
        queue, running, most = RequestQueue(10), [], []

        def work(cancel: threading.Event) -> Iterator[int]:
            running.append(1)
            most.append(len(running))
            yield 1
            time.sleep(0.05)  # it does not look at `cancel`, as decoding a picture does not
            running.pop()

        for _ in range(6):
            items = queue.run(work)
            assert await anext(items) == 1
            await items.aclose()
        await asyncio.to_thread(wait_until, lambda: not queue.busy)
        assert most == [1] * 6

    asyncio.run(main())


def test_a_mistake_in_the_command_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port in use is reported before the model is loaded."""
    monkeypatch.chdir(place)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for words, message in (
            (["--model", "runs/nothing"], "runs/nothing"),
            (["--encoder", "runs/nothing"], "runs/nothing"),
            (["--max-images", "0"], "--max-images must be at least 1"),
            (
                ["--port", str(taken.getsockname()[1]), "--model", "runs/nothing"],
                "cannot serve on .*--port",
            ),
            (["--port", "70000"], "--port"),
            (["--host", "203.0.113.1"], "--host"),
        ):
            with pytest.raises(UserError, match=message):
                serve_from_flags(script_parser("serve").parse_args(["--device", "cpu", "--port", "0", *words]))
