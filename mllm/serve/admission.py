"""Admission to the server: the API key, the bounds on what clients hold, and the metrics of both.

A request takes a place in the queue when its body has arrived, so a client that sends slowly delays nobody. Until then
the client's requests and the bytes of its bodies are bounded. The bytes of all requests together are bounded too.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections import Counter
from collections.abc import Callable

import prometheus_client as prometheus
from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mllm.chat.limits import SLOWEST, Limits
from mllm.serve.schemas import ApiError

ROUTES = ("/v1/models", "/v1/chat/completions", "/v1/embeddings", "/health", "/metrics")
"""Route names in the metrics; every other path is "other"."""
DROPPED = 4
"""A body that is too long is read and dropped up to so many times its limit."""


class Gate:
    """The places and bytes that all open requests hold."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.open = 0
        """POST requests that have a place."""
        self.held_bytes = 0
        """Bytes of all bodies, also while they arrive, and of the pictures fetched for them."""
        self.requests: Counter[str] = Counter()
        """Client address → its open POST requests."""
        self.arriving: Counter[str] = Counter()
        """Client address → bytes of its bodies that are not whole yet."""

    def check_place(self) -> None:
        """Raise ApiError 429 if all places are taken."""
        if self.open > self.limits.waiting:
            raise _busy(f"{self.open} requests are being answered or waiting: try again later", "queue_full")


class Visit:
    """One request's share of a gate; `end` returns it."""

    def __init__(self, gate: Gate, address: str, is_post: bool) -> None:
        self.gate, self.address, self.is_post = gate, address, is_post
        self.arriving = self.held_bytes = self.placed = 0
        gate.requests[address] += is_post

    def hold(self, size: int) -> None:
        """Hold `size` more bytes until the answer is there. Raises ApiError 429 if all requests hold too much."""
        self.held_bytes += size
        self.gate.held_bytes += size
        if self.gate.held_bytes > (limit := self.gate.limits.held_bytes):
            raise _busy(f"the requests that are open hold {limit:,} bytes: try again later", "queue_full")

    def receive(self, size: int) -> None:
        """Hold `size` more bytes of the body. Raises ApiError 429 if the client's bodies exceed the limit of one."""
        self.hold(size)
        self.arriving += size
        self.gate.arriving[self.address] += size
        if self.gate.arriving[self.address] > (limit := self.gate.limits.body_bytes):
            raise _busy(f"the bodies that this address sends at once are above {limit:,} bytes")

    def arrived(self) -> None:
        """The body is whole."""
        self.gate.arriving[self.address] -= self.arriving
        self.arriving = 0

    def drop(self) -> None:
        """Hold nothing any longer."""
        self.arrived()
        self.gate.held_bytes -= self.held_bytes
        self.held_bytes = 0

    def take_place(self) -> None:
        """Raises ApiError 429 if all places are taken."""
        self.gate.check_place()
        self.placed = 1
        self.gate.open += 1

    def end(self) -> None:
        self.drop()
        self.gate.open -= self.placed
        self.gate.requests[self.address] -= self.is_post
        if not self.gate.requests[self.address]:
            del self.gate.requests[self.address], self.gate.arriving[self.address]


class Metrics:
    """The figures of /metrics, in a registry of their own."""

    def __init__(self, gate: Gate, busy: Callable[[], bool]) -> None:
        self.registry = registry = prometheus.CollectorRegistry()
        buckets = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
        self.requests = prometheus.Counter(
            "clips_requests", "Requests answered", ["route", "status"], registry=registry
        )
        self.seconds = prometheus.Histogram(
            "clips_request_seconds", "From request to end of answer", ["route"], buckets=buckets, registry=registry
        )
        self.first_token = prometheus.Histogram(
            "clips_first_token_seconds", "From turn to first token", buckets=buckets, registry=registry
        )
        self.tokens = prometheus.Counter("clips_tokens", "Tokens read and written", ["kind"], registry=registry)
        for name, text, value in (
            ("running", "Requests whose turn it is", busy),
            ("waiting", "Requests in the queue", lambda: max(0, gate.open - busy())),
            ("open", "POST requests, those still arriving included", lambda: gate.requests.total()),
        ):
            prometheus.Gauge(f"clips_requests_{name}", text, registry=registry).set_function(value)


class AdmissionMiddleware:
    """ASGI middleware around the whole server. The `Visit` of a request is `scope["visit"]`."""

    def __init__(self, app: ASGIApp, *, gate: Gate, api_key: str | None, metrics: Metrics) -> None:
        self.app, self.gate, self.metrics = app, gate, metrics
        self.authorization = f"Bearer {api_key}".encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begin, status = time.perf_counter(), 500
        address = (scope["client"] or ("unknown", 0))[0]
        scope["visit"] = visit = Visit(self.gate, address, scope["method"] == "POST")

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            try:
                self._check(scope, visit)
            except ApiError as refusal:
                with contextlib.suppress(ApiError):  # slow; but an unread body would cut the answer off
                    await read_body(Request(scope, receive), keep=0)
                return await error_response(refusal)(scope, receive, watched)
            await self.app(scope, receive, watched)
        finally:
            visit.end()
            route = scope["path"] if scope["path"] in ROUTES else "other"
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - begin)

    def _check(self, scope: Scope, visit: Visit) -> None:
        given = dict(scope["headers"]).get(b"authorization", b"")
        needs_key = self.authorization is not None and scope["path"] != "/health"
        if needs_key and not hmac.compare_digest(given, self.authorization or b""):
            message = "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if visit.is_post:
            if self.gate.requests[visit.address] > (limit := self.gate.limits.per_client):
                raise _busy(f"{limit} requests of this address are open: try again later")
            self.gate.check_place()


async def placed_body(request: Request) -> bytes:
    """The whole body; the request has a place in the queue from then on. Raises ApiError 408, 413 or 429."""
    visit: Visit = request.scope["visit"]
    limit = visit.gate.limits.body_bytes
    body = await read_body(request, keep=limit)
    if body is None:
        raise ApiError(413, f"the body is above this server's limit of {limit:,} bytes")
    visit.take_place()
    return body


async def read_body(request: Request, *, keep: int) -> bytes | None:
    """The body, None if it is longer than `keep` bytes. Raises ApiError 408 if it comes too slowly.

    Some bytes of a longer body are read and dropped, because a client sees no answer before.
    """
    visit: Visit = request.scope["visit"]
    limits, begin = visit.gate.limits, time.monotonic()
    chunks, size, stream = [], 0, request.stream()
    while size <= keep + DROPPED * limits.body_bytes:
        left = begin + limits.body_seconds + size / SLOWEST - time.monotonic()
        try:
            chunk = await asyncio.wait_for(anext(stream), max(left, 0))
        except StopAsyncIteration:
            break
        except ClientDisconnect:
            raise ApiError(499, "the client has left") from None
        except asyncio.TimeoutError:
            message = f"the body came too slowly: {size:,} bytes in {time.monotonic() - begin:.0f} s"
            raise ApiError(408, message) from None
        size += len(chunk)
        if size <= keep:
            visit.receive(len(chunk))
            chunks.append(chunk)
        else:
            chunks.clear()
            visit.drop()
    visit.arrived()
    return b"".join(chunks) if size <= keep else None


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


def _busy(message: str, code: str = "too_many_requests") -> ApiError:
    return ApiError(429, message, code=code, headers={"Retry-After": "2"})
