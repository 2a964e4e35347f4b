"""The server in a thread and as a process, with its tiny models; questions of the official client and of strangers."""

import base64
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import bad_corpus
import httpx2
import openai
import pytest
import uvicorn
from conftest import ROOT
from openai import OpenAI
from PIL import Image
from tiny_mllm import write_export, write_llava

from mllm.chat.limits import Limits
from mllm.chat.model import ChatModel
from mllm.serve.app import create_app

KEY = "a-key-of-the-environment"


@dataclass
class Running:
    process: subprocess.Popen[bytes]
    log: Path

    def output(self) -> str:
        return self.log.read_text()

    @property
    def address(self) -> str:
        return re.search(r"running on (http://127\.0\.0\.1:\d+)", self.output()).group(1)

    def answers(self) -> bool:
        try:
            return httpx2.get(f"{self.address}/health", trust_env=False).status_code == 200
        except (AttributeError, httpx2.TransportError):  # not even the greeting, the port is closed, or it is slow
            return False

    def client(self) -> OpenAI:
        return client_of(self.address)

    def peak_mb(self) -> int:
        """Largest memory of the process so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) // 1024


@contextlib.contextmanager
def started(place: Path, *words: str) -> Iterator[Running]:
    """The server once it answers; killed at the end if it still runs."""
    log = place / f"log-{time.monotonic_ns()}"
    env = os.environ | {"OMP_NUM_THREADS": "1", "CLIPS_API_KEY": KEY, "PYTHONPATH": str(ROOT)}
    with log.open("wb") as file:
        command = [sys.executable, str(ROOT / "scripts" / "serve.py"), "--device", "cpu", "--port", "0", *words]
        process = subprocess.Popen(command, cwd=place, env=env, stdout=file, stderr=subprocess.STDOUT)
    running = Running(process, log)
    try:
        end = time.monotonic() + 500
        while not running.answers():
            assert process.poll() is None, running.output()
            assert time.monotonic() < end, running.output()
            time.sleep(0.1)
        yield running
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def served(chat: ChatModel, limits: Limits, **options: object) -> Iterator[str]:
    """The server's address while it runs in a thread."""
    bound = socket.create_server(("127.0.0.1", 0))
    app = create_app(chat, limits, **options)
    config = uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def client_of(address: str) -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)


def ask(client: OpenAI, *messages: dict, **options: object) -> openai.types.chat.ChatCompletion:
    return client.chat.completions.create(model="llava", messages=list(messages), **{"max_tokens": 8} | options)


def get(url: str, **headers: str) -> httpx2.Response:
    return httpx2.get(url, headers=headers, timeout=60, trust_env=False)


def post(address: str, body: object, **headers: str | bytes) -> httpx2.Response:
    """`body` as JSON, bytes as they are; `headers` replace its type and its key."""
    data = json.dumps(body).encode() if isinstance(body, dict | list) else body
    sent = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx2.post(f"{address}/v1/chat/completions", content=data, headers=sent, timeout=120, trust_env=False)


def assert_ends(server: Running, number: int, code: int) -> None:
    """A signal during a long answer ends the process with `code`, and closes its port."""
    stream = ask(server.client(), user(LONG), max_tokens=400, stream=True)
    next(stream)
    server.process.send_signal(number)
    assert server.process.wait(120) == code
    stream.close()
    with pytest.raises(openai.APIConnectionError):
        ask(server.client(), user("Hello"))


# ---------------------------------------------------------------------------------------------- models and messages

LONG = "Tell me a long story"
"""A question that the tiny model answers until it is stopped."""


def write_models(root: Path, context: int = 4096) -> None:
    """`runs/llava/model` with 16 tokens an image, and the encoder `runs/clips-demo`."""
    write_export(root / "runs" / "clips-demo")
    write_llava(root, context=context)


def models(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The folder of `write_models` with a long context, written once per session."""
    return made_once("tiny-serve", partial(write_models, context=32_768))


def png(colour: str = "red", size: tuple[int, int] = (40, 28)) -> bytes:
    return bad_corpus.encode(Image.new("RGB", size, colour))


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def make_image(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def user(*parts: str | dict) -> dict:
    """A user's message of texts and images."""
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


RED, BLUE = data_url(png("red")), data_url(png("blue"))
CHAT = {"model": "llava", "messages": [user("Hello")], "max_tokens": 4}


def with_image(url: str, count: int = 1) -> dict:
    return CHAT | {"messages": [user("What is it?", *[make_image(url)] * count)]}


def turns(*roles: str) -> dict:
    return CHAT | {"messages": [{"role": role, "content": "Hello"} for role in roles]}


BAD = {
    "no image": (with_image(data_url(b"dear image")), "cannot identify"),
    "a bomb": (with_image(data_url(bad_corpus.png(50_000, 50_000))), "pixels"),
    "broken base64": (with_image("data:image/png;base64,!!!"), "base64"),
    "a file": (with_image("file:///etc/hostname"), "no address"),
    "many images": (with_image(RED, 21), "images"),
    "1 MB of text": (CHAT | {"messages": [user("a " * 500_000)]}, "characters"),
    "longer than the context": (CHAT | {"messages": [user("a " * 49_000)]}, "32,768"),
    "huge tokens": (CHAT | {"max_tokens": 10**6}, "max_tokens"),
    "NaN": (CHAT | {"temperature": float("nan")}, "temperature"),
    "empty stop": (CHAT | {"stop": [""]}, "stop"),
    "image of the assistant": (
        CHAT | {"messages": [user("a"), user(make_image(RED)) | {"role": "assistant"}, user("b")]},
        "turn",
    ),
    "unknown role": (turns("tool"), "role"),
    "two users": (turns("user", "user"), "turn"),
    "assistant last": (turns("user", "assistant"), "turn"),
    "no model": ({"messages": [user("Hello")]}, "model"),
    "two answers": (CHAT | {"n": 2}, "n:"),
    "tools": (CHAT | {"tools": [{"type": "function"}]}, "tools"),
    "a tool that must be called": (CHAT | {"tool_choice": "required"}, "tool_choice"),
    "JSON as an answer": (CHAT | {"response_format": {"type": "json_object"}}, "response_format"),
    "deep JSON": (b"[" * 100_000, "JSON"),
    "not UTF-8": (b'{"model": "\xff"}', "JSON"),
    "millions of values": (b'{"model": "llava", "messages": [' + b"{}," * 600_000, "JSON values"),
}
"""Bodies that get 400 → a word of the reason."""
