"""OpenAI-style servers as a captioner: many requests in flight at several servers, and each request may fail.

A failed request is repeated at any free server, after a pause that doubles, with jitter. After `TRIES` failures its
pair has no caption. After `FAILURES` failures in a row, or if it cannot be reached, a server gets one request at a
time, again with doubling pauses, until it answers. A busy server (429, 503) gets the request again after its
Retry-After, and fewer requests at once. If no server gives a usable answer for `patience` seconds, the command ends.

Time and bytes of an answer are bounded. The openai client does not bound them: it reads and unpacks an answer of any
size.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import email.utils
import io
import json
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit, urlunsplit

import anyio
from anyio.from_thread import start_blocking_portal

from clips import BrokenSample, decode_image
from clips.common.errors import CommandError, UserError, first_line
from clips.common.escape import clip, one_line
from clips.common.files import from_json
from mllm.chat.limits import KEPT_PIXELS
from mllm.recaption.asking import RETRY_TEMPERATURE, Prompt, hint_of, temperature_of, without_control_tokens
from mllm.recaption.captioner import Pair, Written

if TYPE_CHECKING:
    import httpx2

KEY_VARIABLE = "CLIPS_API_KEY"
TRIES = 5
"""Failed requests after which a pair has no caption."""
FAILURES = 5
"""Failures of a server in a row after which it is taken out."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a request is repeated, and before a server that is out gets a request."""
LONGEST_RETRY_AFTER = 120.0
"""Longest Retry-After, seconds, that is obeyed."""
ANSWER_BYTES = 4 * 2**20
"""Longest answer; a caption has some thousand bytes."""
TOKEN_BYTES = 64
"""Longest token; a longer text than that for the tokens asked for is no caption."""
SENT_BYTES = 2 * 2**20
"""Larger encoded pictures, and pictures of more than KEPT_PIXELS, are sent smaller."""
OF_THE_PAIR = (400, 413, 415, 422, 451)
"""Statuses that refuse one pair: its picture or its text is wrong. Every other 3xx and 4xx concerns all pairs."""
PASSING = (408, 409, 425)
"""Statuses below 500, beside 429, that are asked again."""
HINT = "is the address right, and the model served there?"
HINTS = {401: f"set {KEY_VARIABLE}", 402: "its quota is used up", 403: f"set {KEY_VARIABLE}"}
"""Status that ends the command → how to mend it."""
ROUNDS = 8
"""How often one call of `write` fills all places; at its end fewer and fewer requests are in flight."""
KINDS = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png"}
"""First bytes → type, for the formats that every server reads."""
PICTURE_THREADS = 4
"""Pictures that are decoded at a time."""


class _Failed(Exception):
    """A request without a usable answer. `kind`: busy servers ask for a pause; a refused pair is not asked again."""

    def __init__(
        self, reason: str, kind: Literal["failed", "unreachable", "busy", "refused"] = "failed", pause: float = 0.0
    ) -> None:
        super().__init__(reason)
        self.kind, self.pause = kind, pause


@dataclass
class Server:
    """The state of one server."""

    url: str
    limit: float
    """Requests that it gets at once; below `in_flight` after it said that it is busy."""
    open: int = 0
    """Requests in flight."""
    failures: int = 0
    """Since its last usable answer, like `pauses`."""
    pauses: int = 0
    resumes: float = 0.0
    """Time of `time.monotonic` before which it gets no request."""
    last_error: str = "no answer"
    answers: int = 0
    client: httpx2.AsyncClient = field(init=False, repr=False)

    @property
    def is_out(self) -> bool:
        return self.failures >= FAILURES

    def is_free(self, now: float) -> bool:
        return now >= self.resumes and self.open < (1 if self.is_out else int(self.limit))

    def succeed(self, most: int) -> None:
        """A usable answer: each round of them adds one place, up to `most`."""
        self.answers += 1
        self.failures = self.pauses = 0
        self.limit = min(most, self.limit + 1 / self.limit)

    def fail(self, failed: _Failed) -> None:
        self.last_error = str(failed)
        if failed.kind == "busy":  # it can do the others in flight; without any it is left alone
            self.limit = max(1.0, min(self.limit, self.open - 1))
        else:
            self.failures += FAILURES if failed.kind == "unreachable" else 1
        if self.is_out or (failed.kind == "busy" and self.open == 1):
            now = time.monotonic()
            self.pauses += now >= self.resumes  # failures during a pause count once
            self.resumes = max(self.resumes, now + _jittered(max(failed.pause, _pause(self.pauses))))


class EndpointCaptioner:
    """`endpoint:URL[,URL…][#MODEL]`: each URL ends in /v1 or has no path. MODEL: default the first model served.

    The key is the environment's CLIPS_API_KEY. `write` may be called from several threads.

    Args:
        in_flight: requests at a time, for each server.
        timeout: seconds for one answer, including the wait in the server's queue.
        patience: seconds without any usable answer after which the command ends.

    Raises UserError for a wrong address, or if no server names its models.
    """

    def __init__(
        self,
        addresses: str,
        prompt: Prompt,
        *,
        max_new_tokens: int,
        in_flight: int = 32,
        timeout: float = 300.0,
        patience: float = 900.0,
    ) -> None:
        if in_flight < 1 or timeout <= 0 or patience <= 0:
            raise UserError("the requests in flight, the time of an answer and the patience must be above 0")
        urls, _, model = addresses.partition("#")
        self.servers = [Server(_base(url), in_flight) for url in filter(None, map(str.strip, urls.split(",")))]
        if not self.servers or len({server.url for server in self.servers}) < len(self.servers):
            raise UserError(f"endpoint:{addresses}: give at least one address, and none twice")
        self.prompt, self.max_new_tokens = prompt, max_new_tokens
        self.most, self.timeout, self.patience = in_flight, timeout, patience
        self.batch_size = ROUNDS * in_flight * len(self.servers)
        self._answered = time.monotonic()
        with contextlib.ExitStack() as resources:
            self._portal = resources.enter_context(start_blocking_portal(name="requests"))
            self._portal.call(self._connect)
            resources.callback(self._portal.call, self._disconnect)
            self.model = model or self._portal.call(self._first_model)
            self._resources = resources.pop_all()

    @property
    def in_flight(self) -> int:
        """Requests that servers work on now."""
        return sum(server.open for server in self.servers)

    def describe(self) -> dict[str, Any]:
        """The addresses are not in it: they do not change the captions."""
        return {
            "kind": "endpoint",
            "model": self.model,
            "prompt": self.prompt.digest,
            "max_new_tokens": self.max_new_tokens,
            "retry_temperature": RETRY_TEMPERATURE,
        }

    def write(self, pairs: Sequence[Pair], attempt: int) -> list[Written | Exception]:
        future = self._portal.start_task_soon(self._write, pairs, attempt)
        try:
            return future.result()
        except BaseException:  # an interrupt of the caller
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel the requests in flight."""
        self._resources.close()

    # -------------------------------------------------------------------------------------- pairs
    async def _write(self, pairs: Sequence[Pair], attempt: int) -> list[Written | Exception]:
        """A worker for each place, and as many again that prepare a picture or wait to try again."""
        written: list[Written | Exception] = [_Failed("not asked")] * len(pairs)
        left = iter(enumerate(pairs))
        if not self.in_flight:
            self._answered = time.monotonic()  # the captioner was idle

        async def work() -> None:
            for i, pair in left:
                written[i] = await self._one(pair, attempt)

        workers = [asyncio.ensure_future(work()) for _ in range(min(len(pairs), 2 * self.most * len(self.servers)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
        return written

    async def _one(self, pair: Pair, attempt: int) -> Written | Exception:
        try:
            kind, data = await anyio.to_thread.run_sync(sendable, pair, limiter=self._decoding)
        except BrokenSample as broken:
            return broken
        last, failed_at = "not asked", Counter[str]()
        while (tries := failed_at.total()) < TRIES:
            server = await self._free_server(failed_at)
            try:
                written = await self._ask(server, self._body(kind, data, pair.web, attempt))
            except _Failed as failed:
                if failed.kind == "refused":
                    self._succeed(server)
                    return ValueError(f"{server.url}: {failed}")
                server.fail(failed)
                wait = failed.pause
                if failed.kind == "failed":
                    last, wait = str(failed), _pause(tries + 1)
                    failed_at[server.url] += 1
            else:
                self._succeed(server)
                return written
            finally:
                server.open -= 1
                self._freed.set()
            if time.monotonic() - self._answered > self.patience:
                raise CommandError(
                    f"no server has given a usable answer for {self.patience:.0f} s ({self._errors()}). What is "
                    "written so far stays; the same command goes on"
                )
            await anyio.sleep(_jittered(wait))
        return ValueError(f"no usable answer in {TRIES} tries; the last: {last}")

    def _body(self, kind: str, data: bytes, web: str, attempt: int) -> bytes:
        picture = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        text = self.prompt.fill(without_control_tokens(hint_of(web)))
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": text}]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.max_new_tokens,
            "temperature": temperature_of(attempt),
            "seed": attempt,
            "stream": False,
        }
        return json.dumps(body).encode()

    # -------------------------------------------------------------------------------------- servers
    def _succeed(self, server: Server) -> None:
        self._answered = time.monotonic()
        server.succeed(self.most)

    def _errors(self) -> str:
        return "; ".join(f"{server.url}: {server.last_error}" for server in self.servers)

    async def _free_server(self, failed_at: Counter[str]) -> Server:
        """Wait for a free server, and take a place at the server with most room.

        A server that failed in this pair more often than another running server is left out. Otherwise a server that
        fails fast, and so has most room, would use up all tries of the pair.
        """
        while True:
            now = time.monotonic()
            least = min((failed_at[server.url] for server in self.servers if not server.is_out), default=TRIES)
            allowed = [server for server in self.servers if failed_at[server.url] <= least]
            if free := [server for server in allowed if server.is_free(now)]:
                server = min(free, key=lambda server: server.open / server.limit)
                server.open += 1
                return server
            later = [server.resumes - now for server in self.servers if server.resumes > now]
            self._freed.clear()
            with anyio.move_on_after(min(later, default=LONGEST_PAUSE)):
                await self._freed.wait()

    async def _connect(self) -> None:
        try:
            import httpx2
        except ImportError:
            raise UserError('endpoint: needs the package httpx2: pip install -e ".[chat]"') from None
        self._freed, self._decoding = asyncio.Event(), anyio.CapacityLimiter(PICTURE_THREADS)
        key = os.environ.get(KEY_VARIABLE)
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        for server in self.servers:
            # The environment's proxy does not serve this machine itself.
            local = urlsplit(server.url).hostname in ("localhost", "127.0.0.1", "::1")
            server.client = httpx2.AsyncClient(
                headers=headers,
                timeout=httpx2.Timeout(self.timeout, connect=min(10.0, self.timeout)),
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=self.most),
                trust_env=not local,
                follow_redirects=False,
            )

    async def _disconnect(self) -> None:
        for server in self.servers:
            await server.client.aclose()

    async def _first_model(self) -> str:
        """The first model that a server names."""
        for server in self.servers:
            try:
                found = await self._request(server, "GET", "/models", None, min(self.timeout, 30.0))
                if isinstance(name := found["data"][0]["id"], str) and 0 < len(name) < 500:
                    return name
                server.last_error = "it names no model"
            except (_Failed, KeyError, IndexError, TypeError) as error:
                server.last_error = str(error) if isinstance(error, _Failed) else "it names no model"
        raise UserError(
            f"no server tells its models ({self._errors()}). Is one running? endpoint:URL#MODEL names one, and waits"
        )

    # -------------------------------------------------------------------------------------- requests
    async def _ask(self, server: Server, body: bytes) -> Written:
        found = await self._request(server, "POST", "/chat/completions", body, self.timeout)
        try:
            choice = found["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason")
            tokens = (found.get("usage") or {}).get("completion_tokens", 0)
        except (KeyError, IndexError, TypeError, AttributeError):
            raise _Failed("an answer that is no chat completion") from None
        if reason == "content_filter":
            raise _Failed("its filter holds the caption back", "refused")
        if not isinstance(text, str):
            raise _Failed(f"an answer whose text is {type(text).__name__}")
        if len(text) > TOKEN_BYTES * self.max_new_tokens:
            raise _Failed(f"a text of {len(text):,} characters for {self.max_new_tokens} tokens")
        is_count = isinstance(tokens, int) and not isinstance(tokens, bool) and 0 <= tokens < 2**31
        return Written(text.strip(), reason != "length", tokens if is_count else 0)

    async def _request(
        self, server: Server, method: str, path: str, body: bytes | None, seconds: float
    ) -> dict[str, Any]:
        """The JSON object of an answer. httpx2 limits the time of single steps; `seconds` limits the whole."""
        import httpx2

        try:
            with anyio.fail_after(seconds):
                status, headers, content = await _exchange(server, method, path, body)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise _Failed(f"it cannot be reached ({first_line(error)})", "unreachable") from None
        except (TimeoutError, httpx2.TimeoutException):
            raise _Failed(f"no answer within {seconds:g} s") from None
        except httpx2.HTTPError as error:
            raise _Failed(f"the connection broke ({type(error).__name__})") from None
        if status in (429, 503):
            raise _Failed("it has too much to do", "busy", _seconds(headers.get("retry-after")))
        said = repr(one_line(clip(content[:1000].decode("utf-8", "replace"), 200)))
        if status in OF_THE_PAIR:
            raise _Failed(f"status {status}: {said}", "refused")
        if 300 <= status < 500 and status not in PASSING:
            raise UserError(f"{server.url} answers with status {status}: {said} ({HINTS.get(status, HINT)})")
        if not 200 <= status < 300:
            raise _Failed(f"status {status}: {said}")
        try:
            found = from_json(content)
        except ValueError:
            raise _Failed(f"an answer that is not JSON: {said}") from None
        if not isinstance(found, dict):
            raise _Failed("an answer that is no JSON object")
        return found


async def _exchange(server: Server, method: str, path: str, body: bytes | None) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and content; it reads at most ANSWER_BYTES of content."""
    headers = {"Content-Type": "application/json"} if body is not None else {}
    async with server.client.stream(method, server.url + path, content=body, headers=headers) as response:
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise _Failed("a packed answer, which was not asked for")
        content = bytearray()
        async for chunk in response.aiter_raw():
            content += chunk
            if len(content) > ANSWER_BYTES:
                raise _Failed(f"an answer of more than {ANSWER_BYTES:,} bytes")
        return response.status_code, dict(response.headers), bytes(content)


def sendable(pair: Pair) -> tuple[str, bytes]:
    """Type and bytes of a picture as it is sent: unchanged if every server reads it alike, else a new JPEG.

    It is decoded in any case. Raises BrokenSample if it is no whole picture.
    """
    try:
        image = decode_image(pair.image, pair.key, max_pixels=KEPT_PIXELS)
        is_small = len(pair.image) <= SENT_BYTES
    except BrokenSample:
        image, is_small = decode_image(pair.image, pair.key, reduce_to=KEPT_PIXELS), False
    kind = next((kind for start, kind in KINDS.items() if pair.image.startswith(start)), None)
    # Not every server turns a picture as its EXIF says.
    if kind is not None and is_small and b"Exif" not in pair.image[: 2**16] and b"eXIf" not in pair.image:
        return kind, pair.image
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, subsampling=0)
    return "jpeg", file.getvalue()


def _base(url: str) -> str:
    """`http://host:8000` → `http://host:8000/v1`. Raises UserError if `url` is no http(s) address."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address or parts.query or parts.username is not None:
        raise UserError(f"endpoint: {url!r} is no address such as http://127.0.0.1:8000/v1 (keys: {KEY_VARIABLE})")
    path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def _seconds(retry_after: str | None) -> float:
    """Retry-After (seconds or a date) in seconds, between FIRST_PAUSE and LONGEST_RETRY_AFTER."""
    found = 0.0
    with contextlib.suppress(ValueError, TypeError, OverflowError):  # neither a number nor a date
        text = (retry_after or "").strip()
        found = float(text[:9]) if text.isdigit() else email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    return min(max(found, FIRST_PAUSE), LONGEST_RETRY_AFTER)


def _pause(count: int) -> float:
    """Seconds of the pause number `count` in a row."""
    return min(FIRST_PAUSE * 2 ** min(count - 1, 20), LONGEST_PAUSE)


def _jittered(seconds: float) -> float:
    """Up to half of `seconds` more, so that requests that failed together do not come again together."""
    return seconds * random.uniform(1, 1.5)
