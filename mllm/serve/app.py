"""A server with OpenAI's API for one chat model: chat completions, models, health.

It is meant for its owner's programs. For load and for untrusted clients, serve the same directory with vLLM
(docs/chat-and-serve.md). It opens no addresses and no files, so images come as data URLs. A request passes the checks
of host and key, is read in full, validated and queued. In its turn its images are decoded and its answer is generated.
"""

import argparse
import asyncio
import base64
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from hmac import compare_digest
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from openai.types import Model
from openai.types import chat as openai_chat
from pydantic import AliasChoices, BaseModel, BeforeValidator, Field, ValidationError
from starlette.concurrency import iterate_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from clips.common.errors import UserError
from clips.common.flags import from_flags
from mllm.chat.limits import Limits, check_values, image_size, read_image
from mllm.chat.model import ChatModel, Sampling, Stats, model_options
from mllm.chat.session import ChatSession, ContextError
from mllm.chat.transcript import LazyImage, Turn

READ_AT_ONCE = 32
"""Number of bodies that are read at once, because each takes memory before its request is in the queue."""
CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "queue_full"}


class Message(BaseModel):
    """A message of OpenAI's chat completions, with text and image parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[openai_chat.ChatCompletionContentPartTextParam | openai_chat.ChatCompletionContentPartImageParam],
        BeforeValidator(lambda value: [{"type": "text", "text": value}] if isinstance(value, str) else value),
    ]

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part["text"] for part in self.content if part["type"] == "text")

    @property
    def urls(self) -> list[str]:
        """The URLs of the image parts."""
        return [part["image_url"]["url"] for part in self.content if part["type"] == "image_url"]

    def turn(self) -> Turn:
        """Return the message as a turn of LLaVA's format, images before the text."""
        images = [{"type": "image"} for _ in self.urls]
        value = [*images, {"type": "text", "text": self.text}]
        return {"from": {"user": "human", "assistant": "gpt"}.get(self.role, "system"), "value": value}


class ChatRequest(BaseModel):
    """The body of /v1/chat/completions. Other fields of OpenAI's API are ignored."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, validation_alias=AliasChoices("max_completion_tokens", "max_tokens"))
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value or [])] = []
    stream: bool | None = None
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    tools: list[Any] | None = Field(None, max_length=0)
    functions: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None


def read_request(body: bytes, limits: Limits) -> ChatRequest:
    """Parse a request's body. Raises UserError with the name of a field that is invalid or above a limit."""
    check_values(body, limits)
    try:
        question = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise UserError(f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}") from None
    for name, amount, most in (
        ("images", sum(len(message.urls) for message in question.messages), limits.images),
        ("characters", sum(len(message.text) for message in question.messages), limits.prompt_chars),
        ("max_tokens", question.max_tokens or 1, limits.new_tokens),
    ):
        if amount > most:
            raise UserError(f"{name}: {amount:,} is above this server's limit of {most:,}")
    return question


def fetch_image(url: str, limits: Limits) -> LazyImage:
    """Return the image in a data URL, which is decoded when the model reads it. Raises UserError for other URLs."""
    head, _, encoded = url.partition(";base64,")
    if head[:5].lower() != "data:" or not encoded:
        raise UserError("images: send data:image/png;base64,…; this server opens no address and no file")
    try:
        data = base64.b64decode(encoded, validate=True)
    except ValueError:
        raise UserError("images: the base64 of one is broken") from None
    return LazyImage(partial(read_image, data, limits), partial(image_size, data, limits))


async def read_body(request: Request, most: int) -> bytes:
    """Read the full body. Raises HTTPException 413 if it is too large, and 415 if it is not JSON."""
    # Only JSON, because another site's page can make a browser post other types here without a preflight request.
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "send the body as Content-Type: application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise HTTPException(413, f"the body is above this server's limit of {most:,} bytes")
    return bytes(body)


def answer(chat: ChatModel, question: ChatRequest, limits: Limits, cancel: threading.Event) -> Iterator[str | Stats]:
    """Yield the answer in pieces, then its statistics. Raises UserError for a question that the model cannot read."""
    tokens = question.max_tokens or limits.new_tokens
    settings = question.model_dump(include={"temperature", "top_p", "seed"}, exclude_none=True)
    sampling = Sampling(max_new_tokens=tokens, stop=tuple(question.stop), **settings)
    images = [fetch_image(url, limits) for message in question.messages for url in message.urls]
    chat.check_crops(images, limits.crops)
    session = ChatSession.from_turns(chat, [message.turn() for message in question.messages], images)
    yield from session.answer(sampling, cancel)
    assert session.last is not None  # the answer has ended
    yield session.last


class Queue:
    """A queue in which one request runs at a time, for at most `seconds`, while at most `waiting` others wait."""

    def __init__(self, waiting: int, seconds: float) -> None:
        self.waiting = waiting
        self.seconds = seconds
        self.places = 0
        """Number of requests in the queue, including the running one."""
        self._turn = asyncio.Semaphore(1)

    def check_place(self) -> None:
        """Raise HTTPException 429 if no further request may wait."""
        if self.places > self.waiting:
            raise HTTPException(429, "all places of the queue are taken: try again later")

    async def run(self, request: Request, work: Callable[[threading.Event], Iterator[Any]]) -> AsyncIterator[Any]:
        """Wait for a turn, then run `work(cancel)` in a thread and yield its items. Raises like `check_place`.

        `cancel` is set when the client has left or the time is up.
        """
        self.check_place()
        self.places += 1
        cancel = threading.Event()
        gone = asyncio.create_task(_disconnected(request))
        gone.add_done_callback(lambda _: cancel.set())
        turn = asyncio.create_task(self._turn.acquire())
        try:
            await asyncio.wait({turn, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not turn.done():
                raise ClientDisconnect
            asyncio.get_running_loop().call_later(self.seconds, cancel.set)
            async for item in iterate_in_threadpool(work(cancel)):
                yield item
        finally:
            gone.cancel()
            self.places -= 1
            if not turn.cancel():  # the turn had begun
                self._turn.release()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def error_response(request: Request, error: Exception) -> JSONResponse:
    """Return the status and OpenAI's error object for an error. Only the log has the text of an unexpected one."""
    status, message, code = 500, "the server failed; see its log", None
    if isinstance(error, HTTPException):
        status, message, code = error.status_code, error.detail, CODES.get(error.status_code)
    elif isinstance(error, UserError):
        code = "context_length_exceeded" if isinstance(error, ContextError) else None
        status, message = 400, str(error)
    elif isinstance(error, (ClientDisconnect, asyncio.TimeoutError)):
        status, message = 408, "the request did not arrive completely in time"
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status)


def ending(stats: Stats) -> dict[str, Any]:
    """Return the finish reason and usage of an answer. OpenAI has no reason for the time limit, so it is "length"."""
    read, written = stats.prompt_tokens, stats.new_tokens
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    return {"finish_reason": "stop" if stats.finish_reason == "stop" else "length", "usage": usage}


async def events(request: Request, items: AsyncIterator[Any], head: dict[str, Any], item: Any) -> AsyncIterator[str]:
    """Yield OpenAI's server-sent events for the first `item` of an answer and for `items`, with usage at the end."""

    def event(delta: dict[str, str], finish_reason: str | None = None, usage: Any = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        fields = head | {"object": "chat.completion.chunk", "choices": [choice], "usage": usage}
        return f"data: {openai_chat.ChatCompletionChunk.model_validate(fields).model_dump_json()}\n\n"

    yield event({"role": "assistant", "content": ""})
    try:
        while isinstance(item, str):
            yield event({"content": item})
            item = await anext(items)
        yield event({}, **ending(item))
    except Exception as error:
        response = await error_response(request, error)
        yield f"data: {bytes(response.body).decode()}\n\n"
        if not isinstance(error, UserError):
            raise
    yield "data: [DONE]\n\n"


def create_app(chat: ChatModel, limits: Limits, *, api_key: str = "", allowed_hosts: Sequence[str] = ()) -> FastAPI:
    """Return the ASGI app with /health, /v1/models and /v1/chat/completions of OpenAI's API.

    Args:
        api_key: key that clients must send as a bearer token; "" lets everyone in.
        allowed_hosts: host names to accept besides localhost.
    """
    queue, reading = Queue(limits.waiting, limits.seconds), asyncio.Semaphore(READ_AT_ONCE)
    model = Model(id=chat.name, created=int(time.time()), object="model", owned_by="clips-mllm")

    async def check_key(request: Request) -> None:
        sent = request.headers.get("authorization", "")
        if api_key and not compare_digest(sent.encode(), f"Bearer {api_key}".encode()):
            raise HTTPException(401, "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'")

    app = FastAPI(title="CLIPS-MLLM", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "::1", *allowed_hosts])
    for kind in (HTTPException, UserError, ClientDisconnect, asyncio.TimeoutError, Exception):
        app.add_exception_handler(kind, error_response)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models", dependencies=[Depends(check_key)])
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.post("/v1/chat/completions", dependencies=[Depends(check_key)])
    async def chat_completions(request: Request) -> Response:
        queue.check_place()
        async with reading:
            body = await asyncio.wait_for(read_body(request, limits.body_bytes), limits.body_seconds)
        question = await asyncio.to_thread(read_request, body, limits)
        if question.model != chat.name:
            raise HTTPException(404, f"the model {question.model[:200]!r} is not served here: it is {chat.name!r}")
        items = queue.run(request, partial(answer, chat, question, limits))
        first = await anext(items)  # an error up to here sets the status of the response
        head = {"id": f"chatcmpl-{time.time_ns()}", "created": int(time.time()), "model": chat.name}
        if question.stream:
            return StreamingResponse(events(request, items, head, first), media_type="text/event-stream")
        *pieces, stats = [first, *[item async for item in items]]
        end = ending(stats)
        message = {"role": "assistant", "content": "".join(pieces)}
        choice = {"index": 0, "message": message, "finish_reason": end["finish_reason"]}
        fields = head | {"object": "chat.completion", "choices": [choice], "usage": end["usage"]}
        completion = openai_chat.ChatCompletion.model_validate(fields)
        return Response(completion.model_dump_json(), media_type="application/json")

    return app


def serve_from_flags(flags: argparse.Namespace) -> None:
    """Run scripts/serve.py. Raises UserError for an invalid limit or a model that cannot be loaded."""
    limits = from_flags(Limits, flags, "max_")
    chat = ChatModel.load(flags.model, **model_options(flags))
    api_key = os.environ.get("CLIPS_API_KEY", "")
    app = create_app(chat, limits, api_key=api_key, allowed_hosts=[flags.host, *flags.allowed_hosts])
    access = "with the key of CLIPS_API_KEY" if api_key else "without a key (CLIPS_API_KEY sets one)"
    print(f"{chat.name} ({chat.directory}): {chat.layout} tokens for each image, {access}", flush=True)
    # Without limit_concurrency: it counts connections, not requests, and refuses all of a burst with a bare 503.
    uvicorn.run(
        app, host=flags.host, port=flags.port, ws="none", lifespan="off", server_header=False,
        timeout_graceful_shutdown=10,
    )  # fmt: skip
