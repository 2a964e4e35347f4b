"""The server over HTTP, with a tiny real model in this process: answers, refusals, clients that leave or are slow."""

import argparse
import io
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from openai import OpenAI
from PIL import Image
from serve_process import (
    BLUE,
    CHAT,
    LONG,
    RED,
    ask,
    client_of,
    get,
    make_image,
    models,
    png,
    post,
    served,
    user,
    wait_until,
)

from clips.data.images import decode_image
from mllm import recaption
from mllm.chat.limits import Limits
from mllm.chat.model import ChatModel, Sampling
from mllm.chat.session import ChatSession
from mllm.recaption import Pair


@pytest.fixture(scope="module")
def chat(made_once: Callable[..., Path]) -> ChatModel:
    return ChatModel.load(str(models(made_once) / "runs" / "llava" / "model"), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def address(chat: ChatModel) -> Iterator[str]:
    with served(chat, Limits(new_tokens=30_000, waiting=40)) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> OpenAI:
    return client_of(address)


def test_an_answer_is_the_chat_sessions(client: OpenAI, chat: ChatModel) -> None:
    """Two images, a system text and an earlier turn give the answer of `ChatSession`."""
    messages = [
        {"role": "system", "content": "Be brief."},
        user("What is it?", make_image(RED)),
        {"role": "assistant", "content": "A red one."},
        user(make_image(BLUE), "And ", "this?"),
    ]
    done = ask(client, *messages, max_tokens=12)
    session = ChatSession(chat, system="Be brief.")
    session.turns = [
        {"from": "human", "value": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"from": "gpt", "value": [{"type": "text", "text": "A red one."}]},
    ]
    session.images = [Image.new("RGB", (40, 28), "red")]
    expected = "".join(session.ask("And this?", [Image.new("RGB", (40, 28), "blue")], Sampling(max_new_tokens=12)))
    assert done.choices[0].message.content == expected != ""
    assert done.choices[0].finish_reason == "length"
    assert done.usage.prompt_tokens == session.last.prompt_tokens
    assert done.usage.total_tokens == done.usage.prompt_tokens + 12
    swapped = ask(client, *messages[:3], user(make_image(RED), "And this?"), max_tokens=12)
    assert swapped.choices[0].message.content != expected


def test_a_stream_is_the_same_answer_in_pieces(client: OpenAI) -> None:
    message = user("What is it?", make_image(RED))
    whole = ask(client, message, max_tokens=40)
    chunks = list(ask(client, message, max_tokens=40, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert len(pieces) > 3  # a piece ends with a word
    assert "".join(pieces) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "length"]
    assert [chunk.usage for chunk in chunks][-2:] == [None, whole.usage]
    assert len({chunk.id for chunk in chunks}) == 1


def test_other_paths_models_and_types(address: str) -> None:
    usual = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}}
    assert post(address, CHAT | usual).status_code == 200
    assert get(f"{address}/docs").status_code == 404
    response = post(address, CHAT | {"model": "gpt-5"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert post(address, CHAT, Content_Type="text/plain").status_code == 415  # a foreign page sends it without asking
    assert post(address, CHAT, Content_Type="application/json; charset=utf-8").status_code == 200


def test_twenty_at_once(client: OpenAI) -> None:
    """Each gets the answer it gets alone, streamed or not."""
    questions = [user(f"Question {i}?", *([make_image(RED)] if i % 3 == 0 else [])) for i in range(20)]

    def one(i: int) -> str:
        if i % 2:
            return ask(client, questions[i]).choices[0].message.content
        return "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, questions[i], stream=True))

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(one, range(20)))
    assert answers == [one(i) for i in range(20)]
    assert len(set(answers)) > 10


def test_a_client_that_leaves_frees_its_place(chat: ChatModel) -> None:
    """Streamed or not, in the queue or in the making: there are two places."""
    with served(chat, Limits(new_tokens=30_000, waiting=1)) as address:
        client = client_of(address)
        impatient = client.with_options(timeout=1)
        running = ask(client, user(LONG), max_tokens=30_000, stream=True)
        next(running)
        for stream in (False, True, False):
            with pytest.raises(openai.APITimeoutError):
                ask(impatient, user("Hello"), stream=stream)
            time.sleep(0.2)
        running.close()
        wait_until(lambda: post(address, CHAT).status_code == 200)
        for _ in range(3):
            with pytest.raises(openai.APITimeoutError):
                ask(impatient, user(LONG), max_tokens=30_000)
        wait_until(lambda: post(address, CHAT).status_code == 200)


def test_an_answer_and_a_body_end_with_their_time(chat: ChatModel) -> None:
    """A body that drips holds up nobody: it has no place yet."""
    with served(chat, Limits(new_tokens=30_000, seconds=1, body_seconds=2, waiting=0)) as address:
        host, port = address.removeprefix("http://").split(":")
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        slow = [socket.create_connection((host, int(port)), 30) for _ in range(3)]
        for connection in slow:
            connection.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
        done = ask(client_of(address), user(LONG), max_tokens=30_000)
        assert done.choices[0].finish_reason == "length"
        assert 0 < done.usage.completion_tokens < 30_000
        for connection in slow:
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
            connection.close()


def test_recaptioning_asks_this_server(address: str, chat: ChatModel) -> None:
    """A caption is the chat's answer, whatever is asked at the same time; a broken image costs itself alone."""
    flags = argparse.Namespace(batch_size=3, max_new_tokens=8, key_for=None)
    pairs = [Pair(colour, png(colour), colour) for colour in ("red", "blue", "green")]
    pairs.insert(1, Pair("broken", b"no image"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recaption, "whole_sentences", lambda text: text)  # a random model ends none
        captioned = list(recaption.Endpoint(f"{address}/v1", "What is it? {web}", flags).caption(pairs))
    assert [pair.reason for pair in captioned] == ["", "broken", "", ""]
    for pair in captioned:
        if not pair.reason:
            file = io.BytesIO()
            decode_image(pair.image).save(file, "JPEG", quality=95)
            sampling = Sampling(max_new_tokens=8)
            answer = ChatSession(chat).ask(f"What is it? {pair.web}", [decode_image(file.getvalue())], sampling)
            assert pair.long == "".join(answer).strip()
