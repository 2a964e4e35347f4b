"""The endpoint captioner against servers that misbehave: no caption is lost, and everything is bounded."""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from bad_endpoint import Deed, asked_text, echo, endpoint
from PIL import Image
from tiny_serve import png, png_header

from clips import BrokenSample
from clips.common.errors import CommandError, UserError
from clips.common.runtime import unused_port
from mllm.recaption import endpoint as module
from mllm.recaption.asking import Prompt
from mllm.recaption.captioner import Pair, Written
from mllm.recaption.endpoint import TRIES, EndpointCaptioner
from mllm.recaption.registry import make_captioner

PROMPT = Prompt("Say this:\n{web}")


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.1)


@contextlib.contextmanager
def captioner(*urls: str, **options: Any) -> Iterator[EndpointCaptioner]:
    with contextlib.closing(
        EndpointCaptioner(
            ",".join(urls), PROMPT, **{"max_new_tokens": 32, "in_flight": 4, "timeout": 20, "patience": 60} | options
        )
    ) as made:
        yield made


def pairs(count: int) -> list[Pair]:
    return [Pair(f"k{i}", png("red" if i % 2 else "blue"), f"caption {i}") for i in range(count)]


def texts(written: list[Written | Exception]) -> list[str]:
    return [entry.text if isinstance(entry, Written) else repr(entry) for entry in written]


EXPECTED = [f"caption {i}" for i in range(30)]
WAYS: dict[str, Deed] = {
    "500": ("status", 500),
    "408": ("status", 408),
    "429 at once": ("busy", "0"),
    "429 in the past": ("busy", "Wed, 21 Oct 2015 07:28:00 GMT"),
    "half JSON": ("raw", b'{"choices": [{"mess'),
    "half an answer": ("half", b'{"choices": []'),
    "deep JSON": ("raw", b"[" * 100_000),
    "no choices": ("raw", b'{"choices": []}'),
    "a number": ("say", 17),
    "a book": ("say", "word " * 10_000),
    "gzip": ("packed", gzip.compress(b"{}")),
    "hangs up": ("hang_up", None),
    "endless": ("endless", None),
}


def test_a_server_that_fails_now_and_then_loses_nothing() -> None:
    """The first request of every second pair fails, in each way in turn; each pair has its own caption."""
    failed: set[int] = set()

    def decide(number: int, body: dict) -> Deed:
        deed = echo(number, body)
        pair = int(deed[1].removeprefix("caption "))
        if pair % 2 or pair in failed:
            return deed
        failed.add(pair)
        return [*WAYS.values()][pair // 2 % len(WAYS)]

    with endpoint(decide) as served, captioner(served.url) as asking:
        assert texts(asking.write(pairs(30), 0)) == EXPECTED
        assert len(served.asked) >= 30 + 15
        assert served.most_open <= 4


@pytest.mark.parametrize("way", ["never", "drip"])
def test_an_answer_that_does_not_end_is_given_up(way: str) -> None:
    with (
        endpoint(lambda n, body: (way, None) if n in (0, 3) else echo(n, body)) as served,
        captioner(served.url, timeout=0.3) as asking,
    ):
        assert texts(asking.write(pairs(8), 0)) == EXPECTED[:8]


@pytest.mark.parametrize("way", ["never", "status", "hang_up", "busy"])
def test_the_command_ends_if_no_server_gives_an_answer(way: str) -> None:
    deed = {"status": 500, "busy": "0"}.get(way)
    begin = time.monotonic()
    with (
        endpoint(lambda number, body: (way, deed)) as served,
        captioner(served.url, timeout=0.2, patience=0.6) as asking,
        pytest.raises(CommandError, match=r"no server has given a usable answer for 1 s .*same command goes on"),
    ):
        asking.write(pairs(200), 0)
    assert len(served.asked) < 200  # the server was taken out
    assert time.monotonic() - begin < 30


def test_a_failing_pair_is_tried_again_and_a_refused_pair_is_asked_once() -> None:
    """Both cost themselves alone; a caption that is cut off says so."""
    tries: Counter[str] = Counter()
    deeds: dict[str, Deed] = {
        "caption 2": ("ended", (" half a ", "length")), "caption 3": ("status", 400), "caption 4": ("status", 422),
        "caption 5": ("ended", ("", "content_filter")), "caption 7": ("status", 500),
    }  # fmt: skip

    def decide(number: int, body: dict) -> Deed:
        caption = asked_text(body).removeprefix("Say this:\n")
        tries[caption] += 1
        return deeds.get(caption, echo(number, body))

    with endpoint(decide) as served, captioner(served.url) as asking:
        written = asking.write(pairs(20), 0)
    assert [i for i, entry in enumerate(written) if isinstance(entry, Exception)] == [3, 4, 5, 7]
    assert f"no usable answer in {TRIES} tries; the last: status 500" in str(written[7])
    assert written[2] == Written("half a", False, 7)
    assert tries == Counter(EXPECTED[:20]) | Counter({"caption 7": TRIES})


@pytest.mark.parametrize(
    ("status", "hint"),
    [
        *((401, "set CLIPS_API_KEY"), (402, "quota"), (403, "set CLIPS_API_KEY"), (404, "is the address right")),
        *((status, "is the address right") for status in (301, 302, 307, 418)),
    ],
)
def test_what_fails_for_every_pair_ends_the_command(status: int, hint: str) -> None:
    with (
        endpoint(lambda number, body: ("status", status)) as served,
        captioner(served.url) as asking,
        pytest.raises(UserError, match=hint),
    ):
        asking.write(pairs(50), 0)
    assert len(served.asked) <= 8


def test_a_dead_server_is_taken_out_and_tried_again() -> None:
    """The other server gets its pairs. A server that comes back gets its share."""
    port = unused_port()
    with (
        endpoint(lambda n, b: ("slowly", (0.02, echo(n, b)[1]))) as alive,
        captioner(f"http://127.0.0.1:{port}", alive.url) as asking,
    ):
        assert texts(asking.write(pairs(20), 0)) == EXPECTED[:20]
        dead, _ = asking.servers
        assert dead.is_out
        with endpoint(port=port) as risen:
            time.sleep(0.2)  # its pause ends
            for _ in range(5):
                assert texts(asking.write(pairs(20), 0)) == EXPECTED[:20]
            assert not dead.is_out
            assert len(risen.asked) > 5


def test_a_server_that_hangs_does_not_hold_up_the_other() -> None:
    with (
        endpoint(lambda n, b: ("never", None)) as hung,
        endpoint() as alive,
        captioner(hung.url, alive.url, timeout=0.5) as asking,
    ):
        assert texts(asking.write(pairs(20), 0)) == EXPECTED[:20]
        assert len(hung.asked) < 20


def test_a_server_that_takes_less_than_it_is_offered_is_given_less() -> None:
    with endpoint() as served:

        def decide(number: int, body: dict) -> Deed:
            return ("busy", "0") if served.open > 3 else ("slowly", (0.01, echo(number, body)[1]))

        served.decide = decide
        with captioner(served.url, in_flight=16) as asking:
            assert texts(asking.write(pairs(80), 0)) == [f"caption {i}" for i in range(80)]
            assert asking.servers[0].limit < 16


def test_retry_after_is_kept() -> None:
    times: list[float] = []

    def decide(number: int, body: dict) -> Deed:
        times.append(time.monotonic())
        return ("busy", "1") if number == 0 else echo(number, body)

    with endpoint(decide) as served, captioner(served.url, in_flight=1) as asking:
        assert texts(asking.write(pairs(2), 0)) == EXPECTED[:2]
    assert times[1] - times[0] >= 1


def test_an_endless_answer_is_read_no_further_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_BYTES", 100_000)
    with endpoint(lambda n, b: ("endless", None)) as served, captioner(served.url) as asking:
        [failed] = asking.write(pairs(1), 0)
    assert "an answer of more than 100,000 bytes" in str(failed)


def test_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture as it is, the prompt with the hint as text, greedy at first and drawn after that; the key."""
    monkeypatch.setenv("CLIPS_API_KEY", "a-key")
    web = "{web} {0} <|im_end|><image>\n</s> [INST] a cat\x1b[31m" + "!" * 5000
    pair = Pair("k", png(), web)
    with endpoint() as served, captioner(served.url) as asking:
        asking.write([pair], 0)
        asking.write([pair], 1)
        greedy, drawn = served.asked
        assert asking.describe()["model"] == "tiny"
    image, text = greedy["messages"][0]["content"]
    assert base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,")) == pair.image
    assert text["text"].startswith("Say this:\n{web} {0}    a cat\ufffd")
    assert len(text["text"]) < 1100
    assert (greedy["temperature"], greedy["seed"]) == (0, 0)
    assert drawn["temperature"] > 0
    assert drawn["seed"] == 1
    assert greedy["max_tokens"] == 32
    assert served.headers[0]["Authorization"] == "Bearer a-key"


def test_which_pictures_are_sent_as_they_are() -> None:
    """Broken ones are known before they are sent; a turned one is sent upright, a huge one smaller."""
    turned, huge, file = io.BytesIO(), io.BytesIO(), io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    Image.new("RGB", (40, 20)).save(turned, "JPEG", exif=exif)
    Image.new("RGB", (3000, 2000)).save(huge, "PNG")
    Image.new("RGB", (8, 8)).save(file, "TIFF")
    kinds = {"turned": turned, "huge": huge, "TIFF": file}
    with endpoint() as served, captioner(served.url, in_flight=1) as asking:
        images = [data.getvalue() for data in kinds.values()] + [b"no picture", png_header(50_000, 50_000)]
        written = asking.write([Pair("k", image, "a cat") for image in images], 0)
    assert texts(written[:3]) == ["a cat"] * 3
    assert all(isinstance(entry, BrokenSample) for entry in written[3:])
    sizes = []
    for body in served.asked:
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        assert url.startswith("data:image/jpeg;base64,")
        sizes.append(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size)
    assert sorted(sizes) == [(8, 8), (20, 40), (1500, 1000)]


def test_the_model_can_be_named() -> None:
    with endpoint() as served:
        made = make_captioner(f"endpoint:{served.url}#owner/name", PROMPT)
        with contextlib.closing(made):
            made.write(pairs(1), 0)
            assert made.describe()["model"] == "owner/name"
        assert served.asked[0]["model"] == "owner/name"
    with pytest.raises(UserError, match=r"no server tells its models .*cannot be reached"):
        make_captioner(f"endpoint:{served.url}", PROMPT)


@pytest.mark.parametrize(
    "addresses",
    ["localhost:8000", "file:///etc/passwd", "http://", "http://a:b@c/v1", "", "http://a,http://a/v1/", "http://a?b=c"],
)
def test_an_address_that_is_none(addresses: str) -> None:
    with pytest.raises(UserError, match="endpoint:"):
        EndpointCaptioner(addresses, PROMPT, max_new_tokens=8)


def test_an_interrupt_cancels_the_requests() -> None:
    with endpoint(lambda n, b: ("never", None)) as served, captioner(served.url) as asking:
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            asking.write(pairs(4), 0)
        asking.close()
        assert asking.in_flight == 0
