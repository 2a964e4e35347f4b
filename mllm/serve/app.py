"""An OpenAI-style server for one chat model and one CLIPS encoder.

`transformers serve` (5.24) does not do for chat: it turns a typed `<image>` into a picture's place, opens any address
and local file that a client names, has no limits and no key, and generates answers that nobody reads any more.

A request passes: middleware (host, key, bounds of a client) → body → place in the queue → form → pictures fetched →
turn → pictures decoded, answer generated. A waiting request holds its encoded pictures only, within
`Limits.held_bytes`. Pictures are decoded one after the other, and only the encoder's view of each is kept.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL.Image import Image
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from clips import CLIPS, newest_export
from clips.common.errors import Stopped, UserError
from clips.common.flags import from_flags
from mllm.chat.hosts import HostMiddleware
from mllm.chat.limits import Limits, image_size, read_image, read_video
from mllm.chat.model import ChatModel, Stats, model_options
from mllm.chat.session import ChatSession, ContextError
from mllm.chat.transcript import LazyPicture, Video
from mllm.serve.admission import AdmissionMiddleware, Gate, Metrics, error_response, placed_body
from mllm.serve.connections import BoundedConnection
from mllm.serve.queue import RequestQueue, T, unless_gone
from mllm.serve.schemas import (
    ApiError,
    ChatForm,
    ChatRequest,
    EmbeddingForm,
    FormT,
    Shown,
    bad_image,
    chat_request,
    check_amount,
    image_bytes,
    parse,
)

ENCODER = "encoder"
"""The encoder's model name in /v1/embeddings."""
GRACE_SECONDS = 10
"""Seconds for running answers after SIGTERM."""
DEFECT = ApiError(500, "the server failed; its log says how")


# ---------------------------------------------------------------------------------------------- the app
def create_app(
    chat: ChatModel,
    encoder: CLIPS | str,
    limits: Limits,
    *,
    api_key: str | None = None,
    allow_image_urls: bool = False,
    allowed_hosts: Sequence[str] = (),
) -> FastAPI:
    """The server as an ASGI app. A text as `encoder` is the reason why there is no encoder."""
    app = FastAPI(title="CLIPS-MLLM", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    queue, gate, started = RequestQueue(limits.seconds), Gate(limits), int(time.time())
    metrics = Metrics(gate, lambda: queue.busy)
    app.add_middleware(AdmissionMiddleware, gate=gate, api_key=api_key, metrics=metrics)
    app.add_middleware(
        HostMiddleware,
        allowed=allowed_hosts,
        refuse=lambda status, message: error_response(ApiError(status, message, code="host_not_allowed")),
    )
    names = [chat.name] if isinstance(encoder, str) else [chat.name, ENCODER]
    models = {name: {"id": name, "object": "model", "created": started, "owned_by": "clips-mllm"} for name in names}

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return error_response(ApiError(error.status_code, message, headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        return error_response(DEFECT)  # uvicorn logs the error

    async def form_of(kind: type[FormT], request: Request) -> FormT:
        # A web page can post any other type to a server on its reader's machine without asking that server first.
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "send the body as Content-Type: application/json")
        return await asyncio.to_thread(parse, kind, await placed_body(request), limits)

    async def fetched(request: Request, urls: list[Shown], param: str) -> list[bytes]:
        pictures = image_bytes(urls, limits, allow_image_urls, param, request.scope["visit"].hold)
        return await unless_gone(request, pictures)

    def check_model(name: str, *served: str) -> None:
        if name not in served:
            message = f"the model {name[:200]!r} is not served here; known: {', '.join(map(repr, names))}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def count(stats: Stats) -> None:
        metrics.tokens.labels("prompt").inc(stats.prompt_tokens)
        metrics.tokens.labels("completion").inc(stats.new_tokens)
        metrics.first_token.observe(stats.first_token_s)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": list(models.values())}

    @app.get("/v1/models/{name}")
    async def retrieve_model(name: str) -> dict[str, Any]:
        check_model(name, *names)
        return models[name]

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        form = await form_of(ChatForm, request)
        check_model(form.model, chat.name)
        stream, usage = form.stream, form.stream_options is not None and bool(form.stream_options.include_usage)
        asked, urls = chat_request(form, limits)
        if chat.most_pictures is not None and len(urls) > chat.most_pictures:
            too_many = f"messages: {len(urls)} pictures, but the model's context holds {chat.most_pictures} at most"
            raise ApiError(400, too_many, param="messages", code="context_length_exceeded")
        del form  # it holds the pictures as text
        are_videos = [shown.is_video for shown in urls]
        data = await fetched(request, urls, "messages")
        items = queue.run(lambda cancel: _answer(chat, asked, data, are_videos, limits, cancel))
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": chat.name}
        if stream:
            first = await unless_gone(request, anext(items))  # an error before it can still have its status
            events = _events(_chain(first, items), head, usage, count)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        *pieces, stats = await unless_gone(request, _collect(items))
        assert isinstance(stats, Stats)
        count(stats)
        message = {"role": "assistant", "content": "".join(map(str, pieces)), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish_reason(stats)}
        return JSONResponse(head | {"object": "chat.completion", "choices": [choice], "usage": _usage(stats)})

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        form = await form_of(EmbeddingForm, request)
        if isinstance(encoder, str):
            raise ApiError(404, f"this server has no encoder: {encoder}", param="model", code="model_not_found")
        check_model(form.model, ENCODER)
        texts = [entry.text for entry in form.input]  # None for a picture
        urls = [Shown(entry.image) for entry in form.input if entry.image is not None]
        as_base64 = form.encoding_format == "base64"
        del form
        said = [text for text in texts if text is not None]
        check_amount(len(urls), sum(map(len, said)), limits, "input")
        if said and not encoder.has_text_features:
            message = "this server's encoder learned from captions alone: it embeds pictures only"
            raise ApiError(400, message, param="input")
        data = await fetched(request, urls, "input")

        def work(cancel: threading.Event) -> Iterator[tuple[np.ndarray, int]]:
            pixels = (encoder.preprocess(_picture(data, i, limits, "input").decode()) for i in range(len(data)))
            yield embed(encoder, [next(pixels) if text is None else text for text in texts]), encoder.count_tokens(said)

        [(rows, tokens)] = await unless_gone(request, _collect(queue.run(work)))
        metrics.tokens.labels("embedding").inc(tokens)
        vectors = [base64.b64encode(row.astype("<f4")).decode() for row in rows] if as_base64 else rows.tolist()
        entries = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(vectors)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "model": ENCODER, "data": entries, "usage": usage})

    return app


def embed(encoder: CLIPS, inputs: Sequence[str | Image | torch.Tensor]) -> np.ndarray:
    """L2-normalised float32 [I, E], one row for each text, picture, or pixels of the encoder's `preprocess`."""
    rows = torch.empty(len(inputs), encoder.embed_dim)
    texts = {i: entry for i, entry in enumerate(inputs) if isinstance(entry, str)}
    images = {i: entry for i, entry in enumerate(inputs) if not isinstance(entry, str)}
    rows[list(texts)] = encoder.encode_text(list(texts.values()))
    rows[list(images)] = encoder.encode_image(list(images.values()))
    return rows.numpy()


def _answer(
    chat: ChatModel,
    asked: ChatRequest,
    data: list[bytes],
    are_videos: list[bool],
    limits: Limits,
    cancel: threading.Event,
) -> Iterator[str | Stats]:
    """The pieces of the answer, then its statistics."""
    try:
        pictures = [
            (_video if is_video else _picture)(data, i, limits, "messages") for i, is_video in enumerate(are_videos)
        ]
        chat.check_squares(pictures, limits.squares)
        session = ChatSession.from_turns(chat, asked.turns, pictures, asked.system)
        yield from session.answer(asked.sampling, cancel)
    except ContextError as error:
        raise ApiError(400, str(error), param="messages", code="context_length_exceeded") from None
    except UserError as error:
        raise ApiError(400, str(error), param="messages") from None
    assert session.last is not None  # the answer has ended
    yield session.last


def _picture(data: list[bytes], number: int, limits: Limits, param: str) -> LazyPicture:
    """One of the encoded pictures; decoding or measuring a bad one raises ApiError 400."""

    def read(reader: Callable[[bytes, Limits], T]) -> T:
        with _blaming(number, param):
            return reader(data[number], limits)

    return LazyPicture(partial(read, read_image), partial(read, image_size))


def _video(data: list[bytes], number: int, limits: Limits, param: str) -> Video:
    """One of the encoded videos; decoding a bad one raises ApiError 400."""

    def decode(frames: int) -> list[Image]:
        with _blaming(number, param):
            return read_video(data[number], frames, limits)

    return Video(decode, lambda: data[number])


@contextlib.contextmanager
def _blaming(number: int, param: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise bad_image(number, error, param) from None


async def _collect(items: AsyncIterator[T]) -> list[T]:
    return [item async for item in items]


async def _chain(first: T, rest: AsyncIterator[T]) -> AsyncIterator[T]:
    yield first
    async for item in rest:
        yield item


async def _events(
    items: AsyncIterator[str | Stats], head: dict[str, Any], include_usage: bool, count: Callable[[Stats], None]
) -> AsyncIterator[str]:
    """Server-sent events in OpenAI's form."""

    def event(delta: dict[str, str], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _event(chunk | {"choices": [choice]})

    chunk = head | {"object": "chat.completion.chunk"} | ({"usage": None} if include_usage else {})
    yield event({"role": "assistant", "content": ""})
    try:
        async for item in items:
            if isinstance(item, str):
                yield event({"content": item})
                continue
            count(item)
            yield event({}, _finish_reason(item))
            if include_usage:
                yield _event(chunk | {"choices": [], "usage": _usage(item)})
    except ApiError as error:
        yield _event(error.body)
    except Exception:
        yield _event(DEFECT.body)
        raise
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _finish_reason(stats: Stats) -> str:
    """OpenAI has no word for the time limit: "length", since the answer is incomplete."""
    return "stop" if stats.finish_reason == "stop" else "length"


def _usage(stats: Stats) -> dict[str, int]:
    read, written = stats.prompt_tokens, stats.new_tokens
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


# ---------------------------------------------------------------------------------------------- the command
def serve_from_flags(flags: argparse.Namespace) -> None:
    """Load model and encoder, then answer until a signal comes. Raises UserError for what cannot be served."""
    limits = from_flags(Limits, flags, "max_")
    api_key = flags.api_key or os.environ.get("CLIPS_API_KEY") or None
    with bind_port(flags.host, flags.port) as bound:  # a port in use is reported before the model is loaded
        chat = ChatModel.load(flags.model, **model_options(flags))
        encoder = _find_encoder(flags)
        asking = {"allow_image_urls": flags.allow_image_urls, "allowed_hosts": flags.allowed_hosts}
        app = create_app(chat, encoder, limits, api_key=api_key, **asking)
        config = server_config(app, timeout_graceful_shutdown=GRACE_SECONDS)
        print(_greeting(chat, encoder, limits, bound, bool(api_key), flags.allow_image_urls), flush=True)
        try:
            uvicorn.Server(config).run(sockets=[bound])
        except KeyboardInterrupt:
            raise Stopped("stopped by Ctrl-C", exit_code=130) from None


def server_config(app: FastAPI, **options: Any) -> uvicorn.Config:
    return uvicorn.Config(app, http=BoundedConnection, ws="none", lifespan="off", server_header=False, **options)


def bind_port(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. Raises UserError if the address is taken or not this machine's."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise UserError(f"cannot serve on {host} port {port}: {error}; choose another by --host, --port") from None
    return bound


def _find_encoder(flags: argparse.Namespace) -> CLIPS | str:
    reasons = []
    for objective in ("clips", "clip"):
        try:
            return CLIPS.from_pretrained(flags.encoder or newest_export(Path("runs"), objective), device=flags.device)
        except UserError as error:
            if flags.encoder:
                raise
            reasons.append(str(error))
    return reasons[0]


def _greeting(
    chat: ChatModel, encoder: CLIPS | str, limits: Limits, bound: socket.socket, has_key: bool, fetches: bool
) -> str:
    """Models, limits, and a question to copy; docs/chat-and-serve.md shows the openai client."""
    host, port = bound.getsockname()[:2]
    pictures = limits.images if chat.most_pictures is None else min(limits.images, chat.most_pictures)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    ask = {"model": chat.name, "messages": [{"role": "user", "content": "Hello! Who are you?"}]}
    secret = " -H 'Authorization: Bearer KEY'" if has_key else ""
    fetched = "fetched from public addresses" if fetches else "data URLs only"
    video = ""
    if chat.layout.frames:
        seen = f"{chat.layout.frames} frames, {limits.video_seconds:g} s of decoding"
        video = f"a video     {limits.video_bytes / 2**20:g} MiB, {seen}\n"
    is_open = not has_key and host not in ("127.0.0.1", "::1", "localhost")
    warning = "warning: everybody who reaches this address can use it; set --api-key or CLIPS_API_KEY\n"
    return f"""\
chat        {chat.name} ({chat.directory}) on {chat.model.device}, {chat.layout} tokens a picture, context \
{chat.context_length or "unknown"}
embeddings  {f"{ENCODER} ({encoder.path})" if isinstance(encoder, CLIPS) else f"none: {encoder}"}
a picture   {limits.image_bytes / 2**20:g} MiB, {limits.image_pixels / 1e6:g} megapixels, {fetched}
{video}\
a request   {limits.body_bytes / 2**20:g} MiB, {pictures} pictures, {limits.prompt_chars:,} characters
an answer   {limits.new_tokens} tokens, {limits.seconds:g} s; one at a time, {limits.waiting} may wait
access      {"with the API key" if has_key else "without a key"}, at {address}
{warning if is_open else ""}
curl {address}/chat/completions -H 'Content-Type: application/json'{secret} -d '{json.dumps(ask)}'
"""
