"""scripts/serve.py as a user starts it, asked by the official client; what strangers send; how it ends."""

from __future__ import annotations

import re
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import openai
import pytest
from openai import OpenAI
from serve_process import KEY, Running, ask, command, started
from tiny_serve import LONG, data_url, picture, png, user, write_models

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("serve")
    write_models(root, context=32_768)
    return root


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Running]:
    with started(place, "--allow-image-urls") as running:
        yield running


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
