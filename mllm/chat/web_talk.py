"""The talk behind the web page: its questions, the shown part of an answer, and how an answer is stopped.

Each function runs in its own thread, and several may run on one talk: the visitor stops, clears or switches the model
while an answer streams. So each answer owns an event, and its output counts only while that event is in `Talk.running`.
"""

from __future__ import annotations

import contextlib
import html
import math
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import gradio as gr
from PIL import Image

from clips.common.errors import UserError
from mllm.chat.limits import Limits, image_size, read_image, read_video
from mllm.chat.model import ChatModel, Sampling, Stats
from mllm.chat.session import ChatSession
from mllm.chat.transcript import LazyPicture, Picture, Video
from mllm.data.video import is_video

T = TypeVar("T")
SHOWN_EVERY_S = 0.1
"""A page that draws every token of a fast model has no time for the visitor's clicks."""


@dataclass(frozen=True, kw_only=True)
class UserMessage:
    text: str
    images: list[Picture]
    message: dict[str, Any]
    """The content of the box: `text` and `files`."""

    def content(self) -> list[dict[str, Any]]:
        """The message as the chat shows it."""
        pictures = [{"path": path} for path in self.message["files"]]
        return [*pictures, {"type": "text", "text": _literal(self.text)}] if self.text else pictures


@dataclass
class Talk:
    """The talk of one browser session in one tab; a column is a conversation with one model."""

    sessions: dict[int, ChatSession] = field(default_factory=dict)
    messages: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    waiting: dict[int, UserMessage] = field(default_factory=dict)
    """Column → question that is not being answered yet."""
    running: dict[int, threading.Event] = field(default_factory=dict)
    """Column → the event that stops its answer."""

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)


def _literal(text: str) -> str:
    """`text` escaped for the chat, which reads HTML: a typed <image> is shown as typed."""
    return html.escape(text, quote=False)


def read_upload(path: str, limits: Limits) -> Image.Image:
    return _read(read_image, path, limits)


def read_frames(path: str, limits: Limits, frames: int) -> list[Image.Image]:
    return _read(lambda data, limits: read_video(data, frames, limits), path, limits)


def uploaded(path: str, limits: Limits) -> Picture:
    """The picture or video of an upload. Raises UserError if it cannot be decoded.

    The model decodes it again: a visitor's files are bounded, decoded pictures would not be.
    """
    if is_video(path):
        read_frames(path, limits, 1)
        return Video(partial(read_frames, path, limits), partial(_read, lambda data, _: data, path, limits))
    read_upload(path, limits)
    return LazyPicture(partial(read_upload, path, limits), partial(_read, image_size, path, limits))


def _read(reader: Callable[[bytes, Limits], T], path: str, limits: Limits) -> T:
    most = limits.video_bytes if is_video(path) else limits.image_bytes
    try:
        with open(path, "rb") as file:
            return reader(file.read(most + 1), limits)
    except OSError:
        raise UserError("A picture of this talk is no longer here: begin a new conversation.") from None


def asking(**value: Any) -> dict[str, Any]:
    """The box with its stop button."""
    return gr.update(submit_btn=False, stop_btn=True, **value)


def ready(talk: Talk, **value: Any) -> dict[str, Any]:
    """The box with its send button. During an answer the button is unchanged: the answer's end sets it.

    Events reach the browser in any order, so a "still answering" could come after the answer's end.
    """
    buttons: dict[str, Any] = {} if talk.busy else {"submit_btn": True, "stop_btn": False}
    return gr.update(**buttons, **value)


def begin(message: dict[str, Any], talk: Talk, columns: int, limits: Limits) -> dict[str, Any]:
    """Accept a question with its pictures. Raises UserError for a bad question, which stays in the box."""
    if talk.busy:
        raise UserError("The last question is still being answered: wait, or stop it.")
    text, paths = (message.get("text") or "").strip(), message.get("files") or []
    if not text and not paths:
        raise UserError("Ask something, or add a picture.")
    if len(text) > limits.prompt_chars:
        raise UserError(f"The question has {len(text):,} characters, the limit is {limits.prompt_chars:,}.")
    if len(paths) > limits.images:
        raise UserError(f"{len(paths)} pictures are too many, the limit is {limits.images}.")
    images = [uploaded(path, limits) for path in paths]
    question = UserMessage(text=text, images=images, message={"text": text, "files": paths})
    talk.waiting = dict.fromkeys(range(columns), question)
    return asking(value=None)


def stop(talk: Talk) -> dict[str, Any]:
    """Stop the running answers and drop the waiting questions."""
    talk.waiting.clear()
    for cancel in list(talk.running.values()):
        cancel.set()
    return ready(talk)


def forget(talk: Talk, column: int) -> None:
    """Begin a new conversation in one column."""
    for kept in (talk.sessions, talk.messages, talk.waiting):
        kept.pop(column, None)
    if (cancel := talk.running.pop(column, None)) is not None:
        cancel.set()


def answer(
    talk: Talk,
    column: int,
    model: Callable[[], ChatModel],
    temperature: float,
    length: float,
    limits: Limits,
    again: bool,
) -> Iterator[tuple[Any, Any, str]]:
    """Stream (messages, box, remark) of one column: the answer to its waiting question, or `again` to its last."""
    question = talk.waiting.pop(column, None)
    if column in talk.running or (question is None and not again):
        yield gr.skip(), ready(talk), gr.skip()
        return
    cancel = talk.running[column] = threading.Event()  # a new conversation removes it
    asked_at, before = time.monotonic(), talk.messages.get(column, [])
    asked = before[:-1] if question is None or again else [*before, {"role": "user", "content": question.content()}]
    text, remark, late, shown_at = "", "", False, -math.inf
    box = {"value": question.message} if question else {}  # the question comes back if it fails
    try:
        yield asked, gr.skip(), "…"
        sampling = Sampling(temperature=temperature, max_new_tokens=min(int(length), limits.new_tokens))
        loaded, session = model(), talk.sessions.get(column)
        if session is None or session.model is not loaded:
            session = ChatSession(loaded)
            if talk.running.get(column) is cancel:  # no new conversation began while the model was loaded
                talk.sessions[column] = session
        if question is None or again:
            pieces = session.retry(sampling, cancel)
        else:
            loaded.check_squares([*session.images, *question.images], limits.squares)
            pieces = session.ask(question.text, question.images, sampling, cancel)
        with contextlib.closing(pieces):
            for piece in pieces:
                text += piece
                if late := time.monotonic() - asked_at > limits.seconds:
                    cancel.set()
                if talk.running.get(column) is cancel and time.monotonic() - shown_at > SHOWN_EVERY_S:
                    shown_at = time.monotonic()
                    talk.messages[column] = [*asked, {"role": "assistant", "content": _literal(text)}]
                    yield talk.messages[column], gr.skip(), "…"
        assert session.last is not None  # the answer has ended
        shown, remark, box = [*asked, {"role": "assistant", "content": _literal(text)}], _remark(session.last, late), {}
    except UserError as error:
        shown = before
        gr.Warning(str(error), title="")
    except Exception:
        shown = before
        traceback.print_exc()
        gr.Warning("The server met an error; its terminal says which.", title="")
    finally:
        mine = talk.running.get(column) is cancel
        if mine:
            del talk.running[column]
    if mine:
        talk.messages[column] = shown
        yield shown, ready(talk, **box), remark
    else:  # older messages may reach the browser after the new conversation
        yield talk.messages.get(column, []), gr.skip(), gr.skip()


def _remark(stats: Stats, late: bool) -> str:
    """The statistics of an answer, and the reason of its end unless it is complete."""
    ended = {
        "stop": "",
        "length": " · cut off at the longest length",
        "cancelled": " · cut off, it took too long" if late else " · stopped",
    }
    speed = f", then {stats.tokens_per_s:.0f} tokens/s" if stats.tokens_per_s else ""
    return f"{stats.new_tokens} tokens · first after {stats.first_token_s:.1f} s{speed}{ended[stats.finish_reason]}"
