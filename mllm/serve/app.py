"""An OpenAI-style server for one chat model and one CLIPS encoder.

`transformers serve` (5.24) cannot carry the chat half of this. It tokenises the rendered chat template, so a typed
`<image>` becomes a picture's place; it opens any address and any local file that a client names as a picture; it has no
limits and no key, and `/load_model` loads whatever a client wants; the seed is set when a request comes, not when it is
its turn; its queue has no end, and an answer that is not streamed goes on when its client has left; its errors are not
OpenAI's. Its continuous batching is for text models only, so answers are generated one after the other here too.

Life of a request: middleware (host, key, what a client may hold) → body within its limits → a place → form checked →
pictures fetched → its turn in the queue → pictures decoded, answer generated. Pictures are decoded only then, one after
the other, and only what an encoder sees of each is kept: one picture at a time fills the memory. What waits holds its
encoded pictures alone, and all that is held is bounded (`Limits.held_bytes`).
"""

from __future__ import annotations

import argparse
import base64
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
from mllm.chat.hosts import HostMiddleware
from mllm.chat.limits import Limits, limits_from_flags, read_image
from mllm.chat.model import ChatModel, Stats, model_options
from mllm.chat.session import ChatSession, ContextError
from mllm.serve.connections import BoundedConnection
from mllm.serve.queue import AuthMiddleware, Metrics, RequestQueue, T, error_response, hold_of, placed_body, unless_gone
from mllm.serve.schemas import (
    ApiError,
    ChatForm,
    ChatRequest,
    EmbeddingForm,
    bad_image,
    chat_request,
    check_amount,
    image_bytes,
    parse,
)

ENCODER = "encoder"
"""The encoder's model name in /v1/embeddings."""
GRACE_SECONDS = 10
"""How long answers may go on after SIGTERM."""


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
    """The server as an ASGI app. `encoder` may be the reason why there is none."""
    app = FastAPI(title="CLIPS-MLLM", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    queue, started = RequestQueue(limits.seconds), int(time.time())
    metrics = Metrics(lambda: queue.busy)
    app.add_middleware(AuthMiddleware, limits=limits, api_key=api_key, metrics=metrics)
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
        return error_response(ApiError(500, "the server failed; its log says how"))  # which uvicorn writes

    async def body_of(request: Request) -> bytes:
        # A web page can post any other type to a server on its reader's machine without asking that server first.
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "send the body as Content-Type: application/json")
        return await placed_body(request, limits)

    def check_model(name: str, served: str) -> None:
        if name != served:
            message = f"the model {name[:200]!r} is not served here; known: {', '.join(map(repr, names))}"
            raise ApiError(404, message, param="model", code="model_not_found")

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
        if name not in models:
            check_model(name, "")
        return models[name]

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        form = parse(ChatForm, await body_of(request))
        check_model(form.model, chat.name)
        stream, usage = form.stream, form.stream_options is not None and bool(form.stream_options.include_usage)
        asked, urls = chat_request(form, limits)
        del form  # with the pictures as text, which are larger than what comes of them
        data = await unless_gone(request, image_bytes(urls, limits, allow_image_urls, "messages", hold_of(request)))
        items = queue.run(lambda cancel: _answer(chat, asked, data, limits, cancel))
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": chat.name}
        if stream:
            first = await unless_gone(request, anext(items))  # until then an error can still have its status
            events = _events(_chain(first, items), head, usage, metrics)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        said = await unless_gone(request, _collect(items))
        text = "".join(item for item in said if isinstance(item, str))
        [stats] = [item for item in said if isinstance(item, Stats)]
        _count(metrics, stats)
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish_reason(stats)}
        return JSONResponse(head | {"object": "chat.completion", "choices": [choice], "usage": _usage(stats)})

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        form = parse(EmbeddingForm, await body_of(request))
        if isinstance(encoder, str):
            raise ApiError(404, f"this server has no encoder: {encoder}", param="model", code="model_not_found")
        check_model(form.model, ENCODER)
        texts = [entry.text for entry in form.input]  # None where a picture stands
        urls = [entry.image for entry in form.input if entry.image is not None]
        as_base64 = form.encoding_format == "base64"
        del form
        if len(texts) > limits.inputs:
            raise ApiError(400, f"input: more than this server's limit of {limits.inputs} inputs", param="input")
        said = [text for text in texts if text is not None]
        check_amount(len(urls), sum(map(len, said)), limits, "input")
        if said and not encoder.has_text_features:
            raise ApiError(
                400, "this server's encoder learned from captions alone: it embeds pictures only", param="input"
            )
        data = await unless_gone(request, image_bytes(urls, limits, allow_image_urls, "input", hold_of(request)))

        def work(cancel: threading.Event) -> Iterator[tuple[np.ndarray, int]]:
            pixels = (encoder.preprocess(picture()) for picture in _pictures(data, limits, "input"))
            yield embed(encoder, [next(pixels) if text is None else text for text in texts]), encoder.count_tokens(said)

        [(rows, tokens)] = await unless_gone(request, _collect(queue.run(work)))
        metrics.tokens.labels("embedding").inc(tokens)
        vectors = [_base64(row) for row in rows] if as_base64 else rows.tolist()
        return JSONResponse(
            {
                "object": "list",
                "model": ENCODER,
                "data": [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(vectors)],
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }
        )

    return app


def embed(encoder: CLIPS, inputs: Sequence[str | Image | torch.Tensor]) -> np.ndarray:
    """L2-normalised float32 [I, E], one row per text or picture, which may be pixels of the encoder's `preprocess`."""
    rows = torch.empty(len(inputs), encoder.embed_dim)
    texts = {i: entry for i, entry in enumerate(inputs) if isinstance(entry, str)}
    images = {i: entry for i, entry in enumerate(inputs) if not isinstance(entry, str)}
    rows[list(texts)] = encoder.encode_text(list(texts.values()))
    rows[list(images)] = encoder.encode_image(list(images.values()))
    return rows.numpy()


def _answer(
    chat: ChatModel, asked: ChatRequest, data: list[bytes], limits: Limits, cancel: threading.Event
) -> Iterator[str | Stats]:
    """The pieces of the answer, then what it took."""
    try:
        session = ChatSession.from_turns(chat, asked.turns, _pictures(data, limits, "messages"), asked.system)
        yield from session.answer(asked.sampling, cancel)
    except ContextError as error:
        raise ApiError(400, str(error), param="messages", code="context_length_exceeded") from None
    except UserError as error:
        raise ApiError(400, str(error), param="messages") from None
    assert session.last is not None  # an answer has come to its end
    yield session.last


def _pictures(data: list[bytes], limits: Limits, param: str) -> list[Callable[[], Image]]:
    """What decodes each of the encoded pictures; ApiError 400 then."""

    def decode(number: int) -> Image:
        try:
            return read_image(data[number], limits)
        except UserError as error:
            raise bad_image(number, error, param) from None

    return [partial(decode, number) for number in range(len(data))]


async def _collect(items: AsyncIterator[T]) -> list[T]:
    return [item async for item in items]


async def _chain(first: T, rest: AsyncIterator[T]) -> AsyncIterator[T]:
    yield first
    async for item in rest:
        yield item


async def _events(
    items: AsyncIterator[str | Stats], head: dict[str, Any], include_usage: bool, metrics: Metrics
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
            _count(metrics, item)
            yield event({}, _finish_reason(item))
            if include_usage:
                yield _event(chunk | {"choices": [], "usage": _usage(item)})
    except Exception as error:
        known = error if isinstance(error, ApiError) else None
        yield _event((known or ApiError(500, "the server failed; its log says how")).body)
        if known is None:
            raise
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _finish_reason(stats: Stats) -> str:
    """OpenAI's word; an answer that the time limit cut off is as incomplete as one that the token limit did."""
    return "stop" if stats.finish_reason == "stop" else "length"


def _usage(stats: Stats) -> dict[str, int]:
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.new_tokens,
        "total_tokens": stats.prompt_tokens + stats.new_tokens,
    }


def _count(metrics: Metrics, stats: Stats) -> None:
    metrics.tokens.labels("prompt").inc(stats.prompt_tokens)
    metrics.tokens.labels("completion").inc(stats.new_tokens)
    metrics.first_token.observe(stats.first_token_s)


def _base64(row: np.ndarray) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode()


# ---------------------------------------------------------------------------------------------- the command
def serve_from_flags(flags: argparse.Namespace) -> None:
    """Load model and encoder, then open the port and answer until a signal; UserError for what cannot be served."""
    limits = limits_from_flags(flags)
    api_key = flags.api_key or os.environ.get("CLIPS_API_KEY") or None
    with bind_port(flags.host, flags.port) as bound:  # before the model is loaded: a port in use is known at once
        chat = ChatModel.load(flags.model_path, **model_options(flags))
        encoder = _find_encoder(flags)
        app = create_app(
            chat,
            encoder,
            limits,
            api_key=api_key,
            allow_image_urls=flags.allow_image_urls,
            allowed_hosts=flags.allowed_hosts,
        )
        config = server_config(app, timeout_graceful_shutdown=GRACE_SECONDS)
        host, port = bound.getsockname()[:2]
        print(_greeting(chat, encoder, limits, host, port, api_key, flags.allow_image_urls), flush=True)
        try:
            uvicorn.Server(config).run(sockets=[bound])
        except KeyboardInterrupt:
            raise Stopped("stopped by Ctrl-C", exit_code=130) from None


def server_config(app: FastAPI, **options: Any) -> uvicorn.Config:
    """How uvicorn serves `app`."""
    return uvicorn.Config(app, http=BoundedConnection, ws="none", lifespan="off", server_header=False, **options)


def bind_port(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet; UserError when the address is taken or not this machine's."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise UserError(f"cannot serve on {host} port {port}: {error}; choose another by --host, --port") from None
    return bound


def _find_encoder(flags: argparse.Namespace) -> CLIPS | str:
    try:
        return CLIPS.from_pretrained(flags.encoder or newest_export(Path("runs"), "clips"), device=flags.device)
    except UserError as error:
        if flags.encoder:
            raise
        return str(error)


def _greeting(
    chat: ChatModel,
    encoder: CLIPS | str,
    limits: Limits,
    host: str,
    port: int,
    api_key: str | None,
    allow_image_urls: bool,
) -> str:
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    ask = {"model": chat.name, "messages": [{"role": "user", "content": "Hello! Who are you?"}]}
    secret = " -H 'Authorization: Bearer KEY'" if api_key else ""
    embeddings = f"{ENCODER} ({encoder.path})" if isinstance(encoder, CLIPS) else f"none: {encoder}"
    fetched = "fetched from public addresses" if allow_image_urls else "data URLs only"
    lines = [
        f"chat        {chat.name} ({chat.directory}) on {chat.model.device}, {chat.tokens_per_image} tokens a picture, "
        f"context {chat.context_length or 'unknown'}",
        f"embeddings  {embeddings}",
        f"a picture   {limits.image_bytes / 2**20:g} MiB, {limits.image_pixels / 1e6:g} megapixels, {fetched}",
        f"a request   {limits.body_bytes / 2**20:g} MiB, {limits.images} pictures, {limits.prompt_chars:,} characters",
        f"an answer   {limits.new_tokens} tokens, {limits.seconds:g} s; one at a time, {limits.waiting} may wait",
        f"access      {'with the API key' if api_key else 'without a key'}, at {address}",
    ]
    if not api_key and host not in ("127.0.0.1", "::1", "localhost"):
        lines.append("warning: whoever reaches this address can use it; set --api-key or CLIPS_API_KEY")
    lines += [
        "",
        f"curl {address}/chat/completions -H 'Content-Type: application/json'{secret} -d '{json.dumps(ask)}'",
        "",
        "from openai import OpenAI",
        f'client = OpenAI(base_url="{address}", api_key="{"KEY" if api_key else "none"}")',
        f"answer = client.chat.completions.create(**{ask})",
        "print(answer.choices[0].message.content)",
        "",
    ]
    return "\n".join(lines)
