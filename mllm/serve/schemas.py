"""OpenAI's forms of chat and embeddings requests, checked, and OpenAI's form of errors."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from clips.common.errors import UserError
from mllm.chat.limits import Limits, download_image
from mllm.chat.model import Sampling
from mllm.chat.transcript import Turn


class ApiError(Exception):
    """Ends a request with an HTTP status and OpenAI's error object."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Any = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers: dict[str, str] | None = headers
        kind = {429: "rate_limit_error"}.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


# ---------------------------------------------------------------------------------------------- forms
MAX_STOP = 256
"""Characters of one stop text; each token of an answer is compared with all stop texts."""
MOST_VALUES = 10_000
"""Commas and brackets of a body beside those in its texts. Each JSON value has one, and takes up to 500 bytes."""
MOST_PARTS = 1000
"""Messages of a request, and parts of a message."""


class _Form(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


class TextPart(_Form):
    type: Literal["text"]
    text: str


class ImageUrl(_Form):
    url: str


class ImagePart(_Form):
    type: Literal["image_url"]
    image_url: ImageUrl


class VideoPart(_Form):
    """A video in the form of vLLM's server; OpenAI has none."""

    type: Literal["video_url"]
    video_url: ImageUrl


@dataclass(frozen=True)
class Shown:
    """The address of a picture or of a video."""

    url: str
    is_video: bool = False


class Message(_Form):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]],
        FailFast(),
        Field(max_length=MOST_PARTS),
        BeforeValidator(lambda said: [{"type": "text", "text": said}] if isinstance(said, str) else said),
    ]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def images(self) -> list[Shown]:
        """The pictures and videos, in their order."""
        return [
            Shown(part.image_url.url) if isinstance(part, ImagePart) else Shown(part.video_url.url, is_video=True)
            for part in self.content
            if not isinstance(part, TextPart)
        ]


class StreamOptions(_Form):
    include_usage: bool | None = None


class ChatForm(_Form):
    """The body of /v1/chat/completions."""

    model: str
    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MOST_PARTS)]
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP)]] | None,
        Field(max_length=4),
        BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop),
    ] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class EmbeddingInput(_Form):
    """One input: a text, or a picture as `{"image": "data:image/png;base64,…"}`."""

    text: str | None = None
    image: str | None = None

    @model_validator(mode="after")
    def _one(self) -> EmbeddingInput:
        if (self.text is None) == (self.image is None):
            raise ValueError('must be a text or {"image": URL}')
        return self


def _as_inputs(value: Any, info: ValidationInfo) -> list[Any]:
    inputs = value if isinstance(value, list) else [value]
    assert isinstance(info.context, Limits)  # given by `parse`
    if len(inputs) > (most := info.context.inputs):
        raise ValueError(f"more than this server's limit of {most} inputs")
    return inputs


class EmbeddingForm(_Form):
    """The body of /v1/embeddings."""

    model: str
    input: Annotated[
        list[Annotated[EmbeddingInput, BeforeValidator(lambda one: {"text": one} if isinstance(one, str) else one)]],
        FailFast(),
        Field(min_length=1),
        BeforeValidator(_as_inputs),
    ]
    encoding_format: Literal["float", "base64"] = "float"


UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "dimensions": (),
}
"""Fields that would change the answer and that the server does not support → values that change nothing."""
FormT = TypeVar("FormT", bound=_Form)


def parse(form: type[FormT], body: bytes, limits: Limits) -> FormT:
    """The checked `body`. Raises ApiError 400 with the field's name. Unknown fields are ignored.

    The number of values is bounded before any is built: a list of empty objects takes 600 times its bytes.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > (most := limits.prompt_chars + MOST_VALUES):
        raise ApiError(400, f"the body has more than {most:,} commas and brackets, this server's limit of JSON values")
    try:
        parsed = form.model_validate_json(body, context=limits)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = _param(first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{param}: {message}" if param else message, param=param) from None
    for name, value in (parsed.model_extra or {}).items():
        if name in UNSUPPORTED and value is not None and value not in UNSUPPORTED[name]:
            raise ApiError(400, f"{name} is not supported by this server", param=name, code="unsupported_parameter")
    return parsed


def _param(location: tuple[int | str, ...]) -> str | None:
    """`("messages", 0, "content", 1, "image_url", "image_url")` → `messages[0].content[1].image_url`."""
    path = ""
    for i, step in enumerate(location):
        if isinstance(step, int):
            path += f"[{step}]"
        elif i < 2 or location[i - 2] != "content":  # else the type of a part, which pydantic adds
            path += f".{step}" if path else step
    return path or None


# ---------------------------------------------------------------------------------------------- chat
@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A checked chat request without its pictures, for `ChatSession.from_turns`."""

    turns: list[Turn]
    system: str | None
    sampling: Sampling


def chat_request(form: ChatForm, limits: Limits) -> tuple[ChatRequest, list[Shown]]:
    """The turns and settings of `form`, and the addresses of its pictures.

    Raises ApiError 400 for a wrong order of roles and for a value above a limit.
    """
    first, *rest = form.messages
    system = first.text if first.role in ("system", "developer") else None
    messages = form.messages if system is None else rest
    start = len(form.messages) - len(messages)
    for i, message in enumerate(messages):
        where, wanted = f"messages[{start + i}]", ("user", "assistant")[i % 2]
        if message.role != wanted:
            said = f"{where}: the role here must be {wanted!r}, found {message.role!r}"
            raise ApiError(400, said, param=f"{where}.role")
        if wanted == "user" and not message.text.strip() and not message.images:
            raise ApiError(400, f"{where}: the message is empty", param=f"{where}.content")
    if len(messages) % 2 == 0:
        raise ApiError(400, "messages: the last one must be from role 'user'", param="messages")
    if any(message.images for message in form.messages if message.role != "user"):
        raise ApiError(400, "messages: only messages from role 'user' may hold pictures", param="messages")
    images = [shown for message in messages for shown in message.images]
    check_amount(len(images), sum(len(message.text) for message in form.messages), limits, "messages")
    name = "max_tokens" if form.max_completion_tokens is None else "max_completion_tokens"
    tokens = getattr(form, name) or limits.new_tokens
    if tokens > limits.new_tokens:
        raise ApiError(400, f"{name}: {tokens} is above this server's limit of {limits.new_tokens}", param=name)
    given = {name: value for name in ("temperature", "top_p", "seed") if (value := getattr(form, name)) is not None}
    sampling = Sampling(max_new_tokens=tokens, stop=tuple(form.stop or ()), **given)
    return ChatRequest(turns=[_turn(message) for message in messages], system=system, sampling=sampling), images


def _turn(message: Message) -> Turn:
    value = [*({"type": "image"} for _ in message.images), {"type": "text", "text": message.text}]
    return {"from": "human" if message.role == "user" else "gpt", "value": value}


# ---------------------------------------------------------------------------------------------- sizes, pictures
def check_amount(images: int, characters: int, limits: Limits, param: str) -> None:
    """Raise ApiError 400 if a request has too many pictures or characters."""
    if images > limits.images:
        raise ApiError(400, f"{param}: {images} pictures are above this server's limit of {limits.images}", param=param)
    if characters > limits.prompt_chars:
        message = f"{param}: {characters:,} characters are above this server's limit of {limits.prompt_chars:,}"
        raise ApiError(400, message, param=param, code="string_above_max_length")


async def image_bytes(
    urls: list[Shown], limits: Limits, allow_image_urls: bool, param: str, hold: Callable[[int], None]
) -> list[bytes]:
    """The encoded pictures and videos of data URLs and, if allowed, of public addresses. Raises ApiError 400.

    It empties `urls`, so that no picture is held twice, and calls `hold` with the bytes of each fetched picture.
    """
    pictures, total = [], 0
    urls.reverse()
    for number in range(len(urls)):
        shown = urls.pop()
        url = shown.url
        try:
            if url[:5].lower() == "data:":
                pictures.append(_data_url(url))
            elif allow_image_urls:
                most = limits.video_bytes if shown.is_video else limits.image_bytes
                pictures.append(await download_image(url, limits, most))
                hold(len(pictures[-1]))
            else:
                raise UserError(
                    "send it as data:image/…;base64,… (this server does not fetch from addresses; its owner can allow "
                    "that by --allow-image-urls)"
                )
            total += len(pictures[-1])
            if total > limits.body_bytes:
                raise UserError(f"the pictures together are above this server's limit of {limits.body_bytes:,} bytes")
        except UserError as error:
            raise bad_image(number, error, param) from None
    return pictures


def bad_image(number: int, error: UserError, param: str) -> ApiError:
    return ApiError(400, f"picture {number}: {error}", param=param, code="invalid_image")


def _data_url(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise UserError("a data URL must look like data:image/png;base64,…")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise UserError("its base64 is broken") from None
