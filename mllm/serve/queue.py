"""What stands between the server's routes and the one model behind them: key, places, queue, and their metrics."""

from __future__ import annotations

import asyncio
import hmac
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeVar

import anyio
from fastapi import Request
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mllm.chat.limits import Limits
from mllm.serve.schemas import ApiError

ROUTES = ("/v1/models", "/v1/chat/completions", "/v1/embeddings", "/health", "/metrics")
"""Names of routes in the metrics; whatever else is asked for is "other"."""
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


class AuthMiddleware:
    """ASGI middleware around everything: the key, a place in the queue before the body is read, metrics."""

    def __init__(self, app: ASGIApp, *, limits: Limits, api_key: str | None, metrics: Metrics) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics
        self.authorization = f"Bearer {api_key}".encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        route = scope["path"] if scope["path"] in ROUTES else "other"
        begin, status, placed = time.perf_counter(), 500, False

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            if refusal := self._refusal(scope):
                with anyio.move_on_after(self.limits.seconds):  # a body that nobody reads would cut the answer off
                    await read_body(Request(scope, receive), 0, self.limits.body_bytes)
                return await error_response(refusal)(scope, receive, watched)
            placed = scope["method"] == "POST"
            self.metrics.open += placed
            await self.app(scope, receive, watched)
        finally:
            self.metrics.open -= placed
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - begin)

    def _refusal(self, scope: Scope) -> ApiError | None:
        given = dict(scope["headers"]).get(b"authorization", b"")
        if (
            self.authorization is not None
            and scope["path"] != "/health"
            and not hmac.compare_digest(given, self.authorization)
        ):
            message = "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'"
            return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if scope["method"] == "POST" and self.metrics.open > self.limits.waiting:
            message = f"{self.metrics.open} requests are being answered or waiting: try again later"
            return ApiError(429, message, code="queue_full", headers={"Retry-After": "2"})
        return None


async def read_body(request: Request, keep: int, drop: int) -> bytes | None:
    """The body, None when it is longer than `keep` bytes.

    Of a longer one up to `drop` bytes more are read and forgotten, for only then does a client see the answer.
    """
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= keep:
            chunks.append(chunk)
        else:
            chunks.clear()
        if size > keep + drop:
            break
    return b"".join(chunks) if size <= keep else None


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)
