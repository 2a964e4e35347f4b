"""The endpoint captioner on this project's own server, a real process that is killed and comes back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serve_process import KEY, started
from tiny_serve import models, png

from clips.common.runtime import unused_port
from mllm.recaption.asking import Prompt
from mllm.recaption.captioner import Pair, Written
from mllm.recaption.endpoint import EndpointCaptioner

pytestmark = pytest.mark.slow
COLOURS = ("red", "blue", "green", "yellow")
PAIRS = [Pair(str(i), png(COLOURS[i % 4], (20 + i, 20)), f"a picture of {COLOURS[i % 3]}") for i in range(60)]


@pytest.fixture(scope="module")
def place(made_once: Callable[..., Path]) -> Path:
    return models(made_once)


@contextlib.contextmanager
def captioner(port: int, in_flight: int) -> Iterator[EndpointCaptioner]:
    made = EndpointCaptioner(
        f"http://127.0.0.1:{port}", Prompt("What is it? {web}"), max_new_tokens=8, in_flight=in_flight, timeout=120
    )
    with contextlib.closing(made):
        yield made


def test_a_server_that_is_killed_and_comes_back(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every caption is there, in order, and the same as of a server that nobody disturbs.

    More are offered than the server lets one client ask at once (24): it says so by 429.
    """
    monkeypatch.setenv("CLIPS_API_KEY", KEY)
    port = unused_port()
    with contextlib.ExitStack() as processes:
        server = processes.enter_context(started(place, "--port", str(port)))
        asking = processes.enter_context(captioner(port, in_flight=40))
        undisturbed = asking.write(PAIRS, 0)
        assert all(isinstance(entry, Written) for entry in undisturbed), undisturbed
        assert len({entry.text for entry in undisturbed}) > 1
        assert asking.model == "llava"
        before = asking.servers[0].answers
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(asking.write, PAIRS, 0)
            while asking.servers[0].answers < before + 10:
                assert not writing.done()
                time.sleep(0.002)
            server.process.kill()
            server.process.wait()
            assert not writing.done()
            processes.enter_context(started(place, "--port", str(port)))
            assert writing.result(300) == undisturbed
