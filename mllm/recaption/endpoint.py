"""OpenAI-style servers as a captioner: many requests in flight over several of them, and each may fail in any way.

A request that fails is asked again, of whichever server is free, after a pause that doubles, with jitter; after `TRIES`
its pair is given up. A server is taken out when it cannot be reached, or after `FAILURES` failures with no answer
between, and then asked with one request at a time, again with doubling pauses, until it answers. What a server refuses
because it has too much to do (429, 503) comes again after the time that it names, and it gets no more at once than it
took. Where no server has given any usable answer for `patience` seconds, the whole command ends.

Bounded are the requests in flight (`in_flight` a server) and what they hold of memory (`HELD_BYTES`), the time and the
bytes of an answer, and the pictures that are decoded and encoded at a time.
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
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from clips import BrokenSample, decode_image
from clips.common.errors import CommandError, UserError, first_line
from clips.common.escape import clip, for_terminal, one_line
from mllm.chat.limits import KEPT_PIXELS
from mllm.recaption.asking import RETRY_TEMPERATURE, Prompt, hint_of, temperature_of, without_control_tokens
from mllm.recaption.captioner import Pair, Written

if TYPE_CHECKING:
    import httpx2

KEY_VARIABLE = "CLIPS_API_KEY"
TRIES = 5
"""Requests for one pair that a server takes and then fails in."""
FAILURES = 5
"""Failures of a server, one after the other, after which it is taken out."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a request is tried again, and before a server that is out is asked again."""
LONGEST_RETRY_AFTER = 120.0
"""Seconds that a server may ask to be left alone."""
ANSWER_BYTES = 4 * 2**20
"""Of one answer; a caption has some thousand."""
TOKEN_BYTES = 64
"""What one token of an answer may take; a longer text than the tokens asked for is none."""
SENT_BYTES = 2 * 2**20
"""Encoded pictures above it, and those of more than KEPT_PIXELS, are sent smaller."""
HELD_BYTES = 2**30
"""Of the requests in flight and of those that are ready: where pictures are large, fewer are in flight."""
ROUNDS = 8
"""How often one call of `write` fills all places: at its end fewer and fewer are in flight."""
KINDS = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png"}
"""How a picture begins that every server reads → its type."""
T = TypeVar("T")


class _Busy(Exception):
    """The server has too much to do: the request may come again after `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__("it has too much to do")
        self.seconds = seconds


class _Unreachable(Exception):
    """No connection: nothing was asked."""


class _Failed(Exception):
    """The request was taken, and no usable answer came; where it is `late`, fewer at once may help."""

    def __init__(self, reason: str, *, late: bool = False) -> None:
        super().__init__(reason)
        self.late = late


class _Refused(Exception):
    """The server does not caption this pair: asking again changes nothing."""


@dataclass
class Server:
    """What is known of one server."""

    url: str
    limit: float
    """Requests that it gets at once; below `in_flight` after it said that these are too many."""
    open: int = 0
    """Requests in flight."""
    failures: int = 0
    """Since its last usable answer."""
    is_out: bool = False
    resumes: float = 0.0
    """Not asked before this time."""
    pauses: int = 0
    """Since its last usable answer."""
    lowered: float = 0.0
    """Time of the last answer that came too late."""
    last_error: str = ""
    answers: int = 0
    client: httpx2.AsyncClient = field(init=False, repr=False)

    def is_free(self, now: float) -> bool:
        return now >= self.resumes and self.open < (1 if self.is_out else int(self.limit))

    def pause(self, least: float = 0.0) -> None:
        """Not to be asked for `least` seconds, and longer each time; what fails while it pauses is one failure."""
        now = time.monotonic()
        self.pauses += now >= self.resumes
        self.resumes = max(self.resumes, now + _jittered(max(least, _pause(self.pauses))))

    def succeed(self, most: int) -> None:
        """A usable answer: one place more for each round of them, up to `most`."""
        self.answers += 1
        self.failures, self.pauses, self.is_out = 0, 0, False
        self.limit = min(most, self.limit + 1 / self.limit)

    def fail(self, reason: str, count: int = 1) -> None:
        self.failures, self.last_error = self.failures + count, reason
        if self.failures >= FAILURES:
            self.is_out = True
            self.pause()

    def come_late(self) -> None:
        """Fewer at once; once for those that were sent together."""
        if time.monotonic() - self.lowered >= 1:
            self.limit, self.lowered = max(1.0, self.limit * 0.75), time.monotonic()

    def refuse(self, seconds: float) -> None:
        """Too much to do: the others in flight are what it can do at once; if there are none, it is left alone."""
        others = self.open - 1
        self.limit, self.last_error = max(1.0, min(self.limit, others)), "it has too much to do"
        if not others:
            self.pause(seconds)


class _Room:
    """Bytes that several tasks hold together, at most `limit`; one alone may hold more."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self._changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def holding(self, count: int) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: not self.held or self.held + count <= self.limit)
            self.held += count
        try:
            yield
        finally:
            self.held -= count
            async with self._changed:
                self._changed.notify_all()


class EndpointCaptioner:
    """`endpoint:URL[,URL…][#MODEL]`: each URL ends in /v1 or has no path, MODEL is by default the first that is served.

    The key is the environment's CLIPS_API_KEY. `write` may be called from several threads.

    Args:
        in_flight: requests at a time, of each server.
        timeout: seconds that one answer may take, waiting in the server's own queue included.
        patience: seconds without any usable answer after which the servers are given up.

    Raises UserError for addresses that are none, CommandError where no server answers.
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
        self._loop = asyncio.new_event_loop()
        threads = min(4, os.cpu_count() or 1)
        self._loop.set_default_executor(ThreadPoolExecutor(threads, "pictures"))
        self._freed, self._room, self._getting_ready = (
            asyncio.Event(),
            _Room(HELD_BYTES),
            asyncio.Semaphore(2 * threads),
        )
        self._thread = threading.Thread(target=self._loop.run_forever, name="requests", daemon=True)
        self._thread.start()
        try:
            self._run(self._connect())
            self.model = model or self._run(self._first_model())
        except BaseException:
            self.close()
            raise

    @property
    def in_flight(self) -> int:
        """Requests that are with a server now."""
        return sum(server.open for server in self.servers)

    def describe(self) -> dict[str, Any]:
        """Which servers they are changes nothing of the captions."""
        return {
            "kind": "endpoint",
            "model": self.model,
            "prompt": self.prompt.digest,
            "max_new_tokens": self.max_new_tokens,
            "retry_temperature": RETRY_TEMPERATURE,
        }

    def write(self, pairs: Sequence[Pair], attempt: int) -> list[Written | Exception]:
        return self._run(self._write(pairs, attempt))

    def close(self) -> None:
        """Requests in flight are given up."""
        if self._loop.is_closed():
            return

        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            for server in self.servers:
                if hasattr(server, "client"):
                    await server.client.aclose()

        self._run(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, done in the thread of the requests; given up when the caller is interrupted."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    # -------------------------------------------------------------------------------------- pairs
    async def _write(self, pairs: Sequence[Pair], attempt: int) -> list[Written | Exception]:
        """As many workers as may be in flight, and as many again that get a picture ready or wait to try again."""
        written: list[Written | Exception] = [_Failed("not asked")] * len(pairs)
        left = iter(enumerate(pairs))
        if not self.in_flight:
            self._answered = time.monotonic()  # nothing was asked meanwhile

        async def work() -> None:
            for i, pair in left:
                written[i] = await self._one(pair, attempt)

        count = min(len(pairs), 2 * self.most * len(self.servers))
        workers = [asyncio.ensure_future(work()) for _ in range(count)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
        return written

    async def _one(self, pair: Pair, attempt: int) -> Written | Exception:
        async with contextlib.AsyncExitStack() as held:
            async with self._getting_ready:
                try:
                    kind, data = await asyncio.to_thread(sendable, pair)
                except BrokenSample as broken:
                    return broken
                # Its body in base64, and the picture where that is not the pair's own.
                size = 4 * len(data) // 3 + (0 if data is pair.image else len(data))
                await held.enter_async_context(self._room.holding(size))
            return await self._captioned(pair, kind, data, attempt)

    async def _captioned(self, pair: Pair, kind: str, data: bytes, attempt: int) -> Written | Exception:
        error: Exception = _Failed("not asked")
        failed_at: Counter[str] = Counter()
        while (tries := failed_at.total()) < TRIES:
            server, wait = await self._free_server(failed_at), 0.0
            try:
                written = await self._ask(server, self._body(kind, data, pair.web, attempt))
            except _Busy as busy:
                wait = busy.seconds
                server.refuse(busy.seconds)
            except _Unreachable as unreachable:
                server.fail(str(unreachable), FAILURES)
            except _Failed as failed:
                error, wait = failed, _pause(tries + 1)
                failed_at[server.url] += 1
                server.fail(str(failed))
                if failed.late:
                    server.come_late()
            except _Refused as refused:
                self._succeed(server)
                return ValueError(f"{server.url}: {refused}")
            else:
                self._succeed(server)
                return written
            finally:
                server.open -= 1
                self._freed.set()
            if time.monotonic() - self._answered > self.patience:
                said = "; ".join(f"{server.url}: {server.last_error or 'no answer'}" for server in self.servers)
                raise CommandError(
                    f"no server has given a usable answer for {self.patience:.0f} s ({said}). What is written so far "
                    "stays; the same command goes on"
                )
            await asyncio.sleep(_jittered(wait))
        return ValueError(f"no usable answer in {TRIES} tries; the last: {error}")

    def _body(self, kind: str, data: bytes, web: str, attempt: int) -> bytes:
        picture = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        text = self.prompt.fill(without_control_tokens(hint_of(web)))
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": text}]
        return json.dumps(
            {
                "model": self.model,
                "messages": [{"role": "user", "content": content}],
                "max_tokens": self.max_new_tokens,
                "temperature": temperature_of(attempt),
                "seed": attempt,
                "stream": False,
            }
        ).encode()

    def _succeed(self, server: Server) -> None:
        self._answered = time.monotonic()
        server.succeed(self.most)

    # -------------------------------------------------------------------------------------- servers
    async def _free_server(self, failed_at: Counter[str]) -> Server:
        """The server with most room, its place taken; waits for one.

        Never one that failed in this pair more often than another one that is not out: else a server that fails fast,
        and so has most room, would use up all of a pair's tries.
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
            try:
                await asyncio.wait_for(self._freed.wait(), min(later, default=LONGEST_PAUSE))
            except asyncio.TimeoutError:
                continue

    # -------------------------------------------------------------------------------------- requests
    async def _connect(self) -> None:
        try:
            import httpx2
        except ImportError:
            raise UserError('endpoint: needs the package httpx2: pip install -e ".[chat]"') from None
        key = os.environ.get(KEY_VARIABLE)
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        for server in self.servers:
            # A proxy of the environment is not asked for this machine itself.
            local = urlsplit(server.url).hostname in ("localhost", "127.0.0.1", "::1")
            server.client = httpx2.AsyncClient(
                headers=headers,
                timeout=httpx2.Timeout(self.timeout, connect=min(10.0, self.timeout)),
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=self.most),
                trust_env=not local,
                follow_redirects=False,
            )

    async def _first_model(self) -> str:
        """The first model that a server names, asked again until `patience` is over."""
        pause = FIRST_PAUSE
        while True:
            for server in self.servers:
                try:
                    found = await self._request(server, "GET", "/models", None, min(self.timeout, 30.0))
                    if isinstance(name := found["data"][0]["id"], str) and 0 < len(name) < 500:
                        return name
                    server.last_error = "it names no model"
                except (_Busy, _Unreachable, _Failed, _Refused) as error:
                    server.last_error = str(error)
                except (KeyError, IndexError, TypeError):
                    server.last_error = "it names no model"
            said = "; ".join(f"{server.url}: {server.last_error}" for server in self.servers)
            if time.monotonic() - self._answered > self.patience:
                raise UserError(f"no server tells its models ({said}). Is one running? endpoint:URL#MODEL names one")
            if pause == FIRST_PAUSE:
                print(f"waiting for a server: {for_terminal(said)}", file=sys.stderr, flush=True)
            await asyncio.sleep(_jittered(pause))
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _ask(self, server: Server, body: bytes) -> Written:
        found = await self._request(server, "POST", "/chat/completions", body, self.timeout)
        try:
            choice = found["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason")
            tokens = (found.get("usage") or {}).get("completion_tokens", 0)
        except (KeyError, IndexError, TypeError, AttributeError):
            raise _Failed("an answer that is no chat completion") from None
        if reason == "content_filter":
            raise _Refused("its filter holds the caption back")
        if not isinstance(text, str):
            raise _Failed(f"an answer whose text is {type(text).__name__}")
        if len(text) > TOKEN_BYTES * self.max_new_tokens:
            raise _Failed(f"a text of {len(text):,} characters for {self.max_new_tokens} tokens")
        is_count = isinstance(tokens, int) and not isinstance(tokens, bool) and 0 <= tokens < 2**31
        return Written(text.strip(), reason != "length", tokens if is_count else 0)

    async def _request(
        self, server: Server, method: str, path: str, body: bytes | None, seconds: float
    ) -> dict[str, Any]:
        """The JSON object of an answer; httpx2's own time limits are of single steps, `seconds` is of the whole."""
        import httpx2

        try:
            status, headers, content = await asyncio.wait_for(self._exchange(server, method, path, body), seconds)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise _Unreachable(f"it cannot be reached ({first_line(error)})") from None
        except (asyncio.TimeoutError, httpx2.TimeoutException):
            raise _Failed(f"no answer within {seconds:g} s", late=True) from None
        except httpx2.HTTPError as error:
            raise _Failed(f"the connection broke ({type(error).__name__})") from None
        if status in (429, 503):
            raise _Busy(_seconds(headers.get("retry-after")))
        said = _excerpt(content)
        if status in (401, 403, 404):
            hint = f"set {KEY_VARIABLE}" if status != 404 else "is the address right, and the model served there?"
            raise UserError(f"{server.url} answers with status {status}: {said} ({hint})")
        if status in (408, 409, 425) or status >= 500 or status < 200:
            raise _Failed(f"status {status}: {said}")
        if status >= 300:
            raise _Refused(f"status {status}: {said}")
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            raise _Failed(f"an answer that is not JSON: {said}") from None
        if not isinstance(found, dict):
            raise _Failed("an answer that is no JSON object")
        return found

    async def _exchange(
        self, server: Server, method: str, path: str, body: bytes | None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content, of which no more than ANSWER_BYTES are read."""
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
    """Type and bytes of a picture as it is sent: as it is where every server reads the same in it, else a new JPEG.

    It is decoded in any case, so that what is broken is known here. BrokenSample for what is no whole picture.
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
    """`http://host:8000` → `http://host:8000/v1`; UserError for what is no http(s) address."""
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
    """Retry-After in seconds, also where it names a date, between FIRST_PAUSE and LONGEST_RETRY_AFTER."""
    found = 0.0
    with contextlib.suppress(ValueError, TypeError, OverflowError):  # what is neither number nor date
        text = (retry_after or "").strip()
        found = float(text[:9]) if text.isdigit() else email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    return min(max(found, FIRST_PAUSE), LONGEST_RETRY_AFTER)


def _pause(count: int) -> float:
    """Seconds of the pause number `count` in a row."""
    return min(FIRST_PAUSE * 2 ** min(count - 1, 20), LONGEST_PAUSE)


def _jittered(seconds: float) -> float:
    """Up to half of `seconds` more: those who failed together do not come again together."""
    return seconds * random.uniform(1, 1.5)


def _excerpt(content: bytes) -> str:
    return repr(one_line(clip(content[:1000].decode("utf-8", "replace"), 200)))
