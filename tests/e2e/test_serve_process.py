"""scripts/serve.py as a user starts it, asked by the official client; how it ends."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
from serve_process import RED, Running, ask, assert_ends, data_url, models, picture, started, user

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(made_once: Callable[..., Path]) -> Iterator[Running]:
    limits = ("--max-new-tokens", "30000", "--max-body-bytes", "1000000", "--max-waiting", "1")
    with started(models(made_once), *limits) as running:
        yield running


def test_the_official_client(server: Running) -> None:
    client = server.client()
    assert "llava (runs/llava/model): 16 tokens for each picture" in server.output()
    (model,) = client.models.list()
    assert model.id == "llava"
    question = user("What is it?", picture(RED))
    whole = ask(client, question).choices[0].message.content
    chunks = list(ask(client, question, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole != ""
    assert ask(client, user("What is it?")).choices[0].message.content != whole

    with pytest.raises(openai.AuthenticationError, match="key"):
        ask(client.with_options(api_key="wrong"), question)
    for body in (data_url(b"x" * 3_000_000), data_url(b"x" * 30_000_000)):
        with pytest.raises(openai.APIStatusError, match="1,000,000 bytes") as refused:
            ask(client, user(picture(body)))
        assert refused.value.status_code == 413


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_signal_ends_it_also_while_it_answers(server: Running, number: int) -> None:
    """The last test of this server."""
    assert_ends(server, number, -number)
