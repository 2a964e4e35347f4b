"""scripts/serve.py as a user starts it, asked by the official client; how it ends."""

from __future__ import annotations

import re
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import openai
import pytest
from openai import OpenAI
from serve_process import KEY, Running, ask, assert_ends, started
from tiny_serve import data_url, models, picture, png, user

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(made_once: Callable[..., Path]) -> Path:
    return models(made_once)


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Running]:
    with started(place, "--max-new-tokens", "400") as running:
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


def test_ctrl_c_ends_it_also_while_it_answers(server: Running) -> None:
    """The port closes, the answer may go on for the grace time, then the process ends. It is the last test."""
    assert_ends(server, signal.SIGINT, 130)
