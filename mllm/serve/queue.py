"""What stands between the server's routes and the one model behind them: key, places, queue, and their metrics.

A place in the queue is taken when the body is there, so a client that sends slowly holds up nobody. What it may hold
meanwhile is bounded by client: requests, and bytes (one body's limit). All requests together are bounded in bytes too.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mllm.chat.limits import Limits
from mllm.serve.schemas import ApiError

ROUTES = ("/v1/models", "/v1/chat/completions", "/v1/embeddings", "/health", "/metrics")
"""Names of routes in the metrics; whatever else is asked for is "other"."""
SLOWEST = 100_000
"""Bytes per second that a body must come at, after a first `Limits.body_seconds`."""
DROPPED = 4
"""How much of a body that is too long is read and forgotten, in limits of one."""
T = TypeVar("T")


class RequestQueue:
    """One request at a time, in the order they come; a reader that leaves frees its place at once."""

    def __init__(self, seconds: float) -> None:
        self._turn = asyncio.Lock()
        self._seconds = seconds

    @property
    def busy(self) -> bool:
        return self._turn.locked()

    async def run(self, work: Callable[[threading.Event], Iterator[T]]) -> AsyncIterator[T]:
        """What `work(cancel)` yields, in a thread, once it is its turn.

        `cancel` is set when the reader leaves and when the time is up. The turn ends with the work, not with the
        reading, so a client that reads slowly holds up nobody.
        """
        loop, cancel, end = asyncio.get_running_loop(), threading.Event(), object()
        items: asyncio.Queue[Any] = asyncio.Queue()  # `end` comes after the last one

        def in_thread() -> None:
            for item in work(cancel):
                loop.call_soon_threadsafe(items.put_nowait, item)

        async def produce() -> None:
            try:
                async with self._turn:
                    timer = loop.call_later(self._seconds, cancel.set)
                    working = asyncio.ensure_future(asyncio.to_thread(in_thread))
                    try:
                        await asyncio.shield(working)
                    finally:  # given up by its reader, a thread goes on until it looks at `cancel`: so long is its turn
                        await asyncio.wait({working})
                        timer.cancel()
            finally:
                items.put_nowait(end)

        producer = asyncio.create_task(produce())
        try:
            while (item := await items.get()) is not end:
                yield item
            await producer  # raises what the work raised
        finally:
            cancel.set()
            producer.cancel()


async def unless_gone(request: Request, result: Awaitable[T]) -> T:
    """`result`, given up when the client leaves first."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    waited, left = asyncio.ensure_future(result), asyncio.create_task(gone())
    try:
        await asyncio.wait({waited, left}, return_when=asyncio.FIRST_COMPLETED)
        if not waited.done():
            raise ApiError(499, "the client has left")
        return waited.result()
    finally:
        waited.cancel()
        left.cancel()


class Metrics:
    """What /metrics shows, in a registry of its own."""

    def __init__(self, busy: Callable[[], bool]) -> None:
        self.registry = CollectorRegistry()
        self.open = 0
        """POST requests that have a place."""
        self.held_bytes = 0
        """Of all bodies, those still arriving included, and of what was fetched for them."""
        self.requests = Counter("clips_requests", "Requests answered", ["route", "status"], registry=self.registry)
        buckets = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
        self.seconds = Histogram(
            "clips_request_seconds", "From request to end of answer", ["route"], buckets=buckets, registry=self.registry
        )
        self.first_token = Histogram(
            "clips_first_token_seconds", "From turn to first token", buckets=buckets, registry=self.registry
        )
        self.tokens = Counter("clips_tokens", "Tokens read and written", ["kind"], registry=self.registry)
        running = Gauge("clips_requests_running", "Requests whose turn it is", registry=self.registry)
        running.set_function(lambda: float(busy()))
        waiting = Gauge("clips_requests_waiting", "Requests in the queue", registry=self.registry)
        waiting.set_function(lambda: float(max(0, self.open - busy())))
        self.posts = Gauge(
            "clips_requests_open", "POST requests, those still arriving included", registry=self.registry
        )


class AuthMiddleware:
    """ASGI middleware around everything: the key, what one client may hold at a time, metrics."""

    def __init__(self, app: ASGIApp, *, limits: Limits, api_key: str | None, metrics: Metrics) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics
        self.authorization = f"Bearer {api_key}".encode() if api_key else None
        self.clients: dict[str, Client] = {}
        """Those that have a POST request open."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        route = scope["path"] if scope["path"] in ROUTES else "other"
        begin, status = time.perf_counter(), 500
        address = (scope["client"] or ("unknown", 0))[0]
        client = self.clients.setdefault(address, Client())
        is_post = scope["method"] == "POST"
        client.requests += is_post
        self.metrics.posts.inc(is_post)
        scope["visit"] = visit = Visit(client, self.limits, self.metrics)

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            if refusal := self._refusal(scope, client):
                with contextlib.suppress(ApiError):  # slow; but an unread body would cut the answer off
                    await read_body(Request(scope, receive), visit, keep=0)
                return await error_response(refusal)(scope, receive, watched)
            await self.app(scope, receive, watched)
        finally:
            visit.end()
            client.requests -= is_post
            self.metrics.posts.dec(is_post)
            if not client.requests:
                self.clients.pop(address, None)
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - begin)

    def _refusal(self, scope: Scope, client: Client) -> ApiError | None:
        given = dict(scope["headers"]).get(b"authorization", b"")
        if (
            self.authorization is not None
            and scope["path"] != "/health"
            and not hmac.compare_digest(given, self.authorization)
        ):
            message = "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'"
            return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if scope["method"] != "POST":
            return None
        if client.requests > self.limits.per_client:
            message = f"{self.limits.per_client} requests of this address are open: try again later"
            return ApiError(429, message, code="too_many_requests", headers={"Retry-After": "2"})
        return _no_place(self.metrics, self.limits)


@dataclass
class Client:
    """What one address holds."""

    requests: int = 0
    body_bytes: int = 0
    """Of bodies that are not whole yet."""


@dataclass
class Visit:
    """One request's share in what is limited."""

    client: Client
    limits: Limits
    metrics: Metrics
    body_bytes: int = 0
    """Of a body that is not whole yet."""
    held_bytes: int = 0
    placed: bool = False

    def receive(self, size: int) -> None:
        """`size` more bytes came; ApiError 429 where this client's bodies together are above the limit of one."""
        self.hold(size)
        self.body_bytes += size
        self.client.body_bytes += size
        if self.client.body_bytes > self.limits.body_bytes:
            message = f"the bodies that this address sends at once are above {self.limits.body_bytes:,} bytes"
            raise ApiError(429, message, code="too_many_requests", headers={"Retry-After": "2"})

    def hold(self, size: int) -> None:
        """`size` more bytes are held until the answer is there; ApiError 429 where all requests hold too much."""
        self.held_bytes += size
        self.metrics.held_bytes += size
        if self.metrics.held_bytes > self.limits.held_bytes:
            message = f"the requests that are open hold {self.limits.held_bytes:,} bytes: try again later"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": "2"})

    def arrived(self) -> None:
        """The body is whole."""
        self.client.body_bytes -= self.body_bytes
        self.body_bytes = 0

    def drop(self) -> None:
        """Nothing is held any longer."""
        self.arrived()
        self.metrics.held_bytes -= self.held_bytes
        self.held_bytes = 0

    def take_place(self) -> None:
        """ApiError 429 where all are taken."""
        if refusal := _no_place(self.metrics, self.limits):
            raise refusal
        self.placed = True
        self.metrics.open += 1

    def end(self) -> None:
        self.drop()
        self.metrics.open -= self.placed


def _no_place(metrics: Metrics, limits: Limits) -> ApiError | None:
    if metrics.open <= limits.waiting:
        return None
    message = f"{metrics.open} requests are being answered or waiting: try again later"
    return ApiError(429, message, code="queue_full", headers={"Retry-After": "2"})


def hold_of(request: Request) -> Callable[[int], None]:
    """What is to be told of each amount of bytes that a request holds beside its body; see `Visit.hold`."""
    visit: Visit = request.scope["visit"]
    return visit.hold


async def placed_body(request: Request, limits: Limits) -> bytes:
    """The whole body, with a place in the queue from then on; ApiError 408, 413 or 429."""
    visit: Visit = request.scope["visit"]
    body = await read_body(request, visit, keep=limits.body_bytes)
    if body is None:
        raise ApiError(413, f"the body is above this server's limit of {limits.body_bytes:,} bytes")
    visit.take_place()
    return body


async def read_body(request: Request, visit: Visit, *, keep: int) -> bytes | None:
    """The body, None when it is longer than `keep` bytes; ApiError 408 when it comes too slowly.

    Of a longer one some more are read and forgotten, for only then does a client see the answer.
    """
    limits, begin = visit.limits, time.monotonic()
    chunks, size = [], 0
    stream = request.stream()
    while True:
        left = begin + limits.body_seconds + size / SLOWEST - time.monotonic()
        try:
            chunk = await asyncio.wait_for(anext(stream), max(left, 0))
        except StopAsyncIteration:
            break
        except asyncio.TimeoutError:
            raise ApiError(
                408, f"the body came too slowly: {size:,} bytes in {time.monotonic() - begin:.0f} s"
            ) from None
        size += len(chunk)
        if size <= keep:
            visit.receive(len(chunk))
            chunks.append(chunk)
        else:
            chunks.clear()
            visit.drop()
        if size > keep + DROPPED * limits.body_bytes:
            break
    visit.arrived()
    return b"".join(chunks) if size <= keep else None


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)
