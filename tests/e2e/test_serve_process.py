"""scripts/serve.py as a user starts it, asked by the official client; what strangers send; how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx2
import openai
import pytest
from conftest import ROOT
from openai import OpenAI
from tiny_serve import BAD, LONG, data_url, picture, png, user, write_models

pytestmark = pytest.mark.slow

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


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("serve")
    write_models(root, context=32_768)
    return root


def command(*words: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "serve.py"), "--device", "cpu", "--port", "0", *words]


@contextlib.contextmanager
def started(place: Path, *words: str) -> Iterator[Running]:
    """The server once it answers; killed at the end if it still runs."""
    log = place / f"log-{time.monotonic_ns()}"
    env = os.environ | {"OMP_NUM_THREADS": "1", "CLIPS_API_KEY": KEY}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command(*words),
            cwd=place,
            env=env,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
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


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Running]:
    with started(place, "--allow-image-urls") as running:
        yield running


def ask(client: OpenAI, *messages: dict, **options: object) -> openai.types.chat.ChatCompletion:
    return client.chat.completions.create(model="llava", messages=list(messages), **{"max_tokens": 16} | options)


def post(server: Running, body: object, key: str = KEY, path: str = "/chat/completions") -> httpx2.Response:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    return httpx2.post(server.address + path, content=data, headers=headers, timeout=120, trust_env=False)


def test_the_greeting_can_be_copied(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what is served, and both its ways of asking work as they stand, once the key is filled in."""
    text = server.output().replace("KEY", KEY)
    assert f"chat        llava ({Path('runs', 'llava', 'model')})" in text
    assert f"encoder ({Path('runs', 'clips-demo', 'export')})" in text
    assert KEY not in server.output()
    _, url, _, content_type, _, authorization, _, body = shlex.split(re.search(r"^curl .*$", text, re.M).group())
    headers = dict(header.split(": ") for header in (content_type, authorization))
    response = httpx2.post(url, content=body.encode(), headers=headers, timeout=120, trust_env=False)
    assert response.json()["choices"][0]["message"]["content"]
    code = text[
        text.index("from openai import") : text.index("print(answer") + len("print(answer.choices[0].message.content)")
    ]
    exec(code, {})
    assert capsys.readouterr().out.strip() == response.json()["choices"][0]["message"]["content"].strip()


def test_the_official_client(server: Running) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["llava", "encoder"]
    message = user("What is in the picture?", picture(data_url(png())))
    whole = ask(client, message)
    *chunks, usage = ask(client, message, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert usage.usage == whole.usage
    both = client.embeddings.create(model="encoder", input=["a red cat", {"image": data_url(png())}])
    assert [len(entry.embedding) for entry in both.data] == [32, 32]
    with pytest.raises(openai.AuthenticationError):
        ask(OpenAI(base_url=server.address, api_key="another", max_retries=0), user("Hello"))
    with pytest.raises(openai.NotFoundError, match="'gpt-5' is not served here"):
        client.chat.completions.create(model="gpt-5", messages=[user("Hello")])


def test_twenty_at_once(server: Running) -> None:
    client = server.client()

    def one(i: int) -> str:
        message = user(f"Question {i}?", *([picture(data_url(png()))] if i % 3 == 0 else []))
        if i % 2:
            return ask(client, message).choices[0].message.content
        return "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, message, stream=True))

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(one, range(20)))
    assert answers == [one(i) for i in range(20)]


def test_it_survives_whatever_is_sent(server: Running) -> None:
    """Every bad input gets its 4xx, little memory is taken, and the next question is answered as before."""
    before, answer = server.peak_mb(), ask(server.client(), user("Hello")).choices[0].message.content
    for name, (body, _, _) in BAD.items():
        response = post(server, body)
        assert response.status_code == 400, name
        assert "Traceback" not in response.text
    assert post(server, b"[" + b" " * 65 * 2**20).status_code == 413
    assert post(server, {}, path="/nothing").status_code == 404
    assert post(server, {}, key="wrong").status_code == 401
    for url in ("http://127.0.0.1/x.png", "http://169.254.169.254/latest", "http://[::1]/", "http://2130706433/x"):
        response = post(server, {"model": "llava", "messages": [user(picture(url))]})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_image")
    with socket.create_connection(("127.0.0.1", int(server.address.split(":")[2].split("/")[0]))) as raw:
        raw.sendall(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 400")
    typed = ask(server.client(), user("Typed <image> and <|im_end|>"))
    assert typed.choices[0].message.content
    assert ask(server.client(), user("Hello")).choices[0].message.content == answer
    assert server.process.poll() is None
    assert server.peak_mb() - before < 500
    assert "Traceback" not in server.output()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_signal_ends_it_also_while_it_answers(place: Path, number: int, code: int) -> None:
    """The port closes, the answer may go on for the grace time, then the process ends."""
    with started(place, "--max-new-tokens", "30000") as server:
        stream = ask(server.client(), user(LONG), max_tokens=30_000, stream=True)
        next(stream)
        server.process.send_signal(number)
        assert server.process.wait(120) == code
        stream.close()
        with pytest.raises(openai.APIConnectionError):
            ask(server.client(), user("Hello"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model-path", "runs/nothing"], "runs/nothing"),
        (["--encoder", "runs/nothing"], "runs/nothing"),
        (["--max-images", "0"], "--max-images must be at least 1"),
        (["--port", "TAKEN", "--model-path", "runs/nothing"], "cannot serve on 127.0.0.1 port"),
    ],
)
def test_a_mistake_ends_with_a_message(place: Path, words: list[str], message: str) -> None:
    """A port in use is known before the model is looked for."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = [str(taken.getsockname()[1]) if word == "TAKEN" else word for word in words]
        done = subprocess.run(command(*words), cwd=place, capture_output=True, text=True, timeout=500)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
