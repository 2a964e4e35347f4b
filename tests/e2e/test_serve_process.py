"""scripts/serve.py as a user starts it, asked by the official client; how it ends."""

from __future__ import annotations

import re
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from serve_process import KEY, Running, assert_ends, started
from tiny_serve import models

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(made_once: Callable[..., Path]) -> Path:
    return models(made_once)


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Running]:
    with started(place, "--max-new-tokens", "400") as running:
        yield running


def test_the_greeting_can_be_copied(server: Running) -> None:
    """It says what is served, and its question works as it stands, once the key is filled in."""
    text = server.output().replace("KEY", KEY)
    assert f"chat        llava ({Path('runs', 'llava', 'model')})" in text
    assert f"encoder ({Path('runs', 'clips-demo', 'export')})" in text
    assert KEY not in server.output()
    _, url, _, content_type, _, authorization, _, body = shlex.split(re.search(r"^curl .*$", text, re.M).group())
    headers = dict(header.split(": ") for header in (content_type, authorization))
    response = httpx2.post(url, content=body.encode(), headers=headers, timeout=120, trust_env=False)
    assert response.json()["choices"][0]["message"]["content"]


def test_ctrl_c_ends_it_also_while_it_answers(server: Running) -> None:
    """The port closes, the answer may go on for the grace time, then the process ends. It is the last test."""
    assert_ends(server, signal.SIGINT, 130)
