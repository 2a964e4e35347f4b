"""scripts/serve.py as a process of its own, and questions to it as the official client and a stranger ask them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import openai
import pytest
from conftest import ROOT
from openai import OpenAI
from tiny_serve import LONG, user

KEY = "a-key-of-the-environment"


@dataclass
class Running:
    process: subprocess.Popen[bytes]
    log: Path

    def output(self) -> str:
        return self.log.read_text()

    @property
    def address(self) -> str:
        return re.search(r"http://127\.0\.0\.1:\d+/v1", self.output()).group()

    def answers(self) -> bool:
        try:
            return httpx2.get(f"{self.address[:-3]}/health", trust_env=False).status_code == 200
        except (AttributeError, httpx2.TransportError):  # not even the greeting, the port is closed, or it is slow
            return False

    def client(self) -> OpenAI:
        return OpenAI(base_url=self.address, api_key=KEY, max_retries=0)

    def peak_mb(self) -> int:
        """Largest memory of the process so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) // 1024


SERVE = ROOT / "scripts" / "serve.py"


@contextlib.contextmanager
def started(place: Path, *words: str, script: Path = SERVE) -> Iterator[Running]:
    """The server once it answers; killed at the end if it still runs."""
    log = place / f"log-{time.monotonic_ns()}"
    env = os.environ | {"OMP_NUM_THREADS": "1", "CLIPS_API_KEY": KEY, "PYTHONPATH": str(ROOT)}
    with log.open("wb") as file:
        command = [sys.executable, str(script), "--device", "cpu", "--port", "0", *words]
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


def ask(client: OpenAI, *messages: dict, **options: object) -> openai.types.chat.ChatCompletion:
    return client.chat.completions.create(model="llava", messages=list(messages), **{"max_tokens": 16} | options)


def post(server: Running, body: object, key: str = KEY, path: str = "/chat/completions") -> httpx2.Response:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    return httpx2.post(server.address + path, content=data, headers=headers, timeout=120, trust_env=False)


def assert_ends(server: Running, number: int, code: int) -> None:
    """A signal during a long answer ends the process with `code`, and closes its port."""
    stream = ask(server.client(), user(LONG), max_tokens=400, stream=True)
    next(stream)
    server.process.send_signal(number)
    assert server.process.wait(120) == code
    stream.close()
    with pytest.raises(openai.APIConnectionError):
        ask(server.client(), user("Hello"))
