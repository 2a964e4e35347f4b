"""The server in a thread and scripts/serve.py as a process; questions of the official client and of strangers."""

from __future__ import annotations

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
from pathlib import Path

import httpx2
import openai
import pytest
import uvicorn
from conftest import ROOT
from openai import OpenAI
from tiny_serve import LONG, user

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
