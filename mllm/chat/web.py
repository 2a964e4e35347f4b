"""The page of scripts/chat.py --web, on which one chats about images.

It listens on 127.0.0.1 and fetches nothing from elsewhere. Each visitor's conversation belongs to their browser session
and stays in memory. Uploads stay in a temporary directory that is removed at the end.
"""

import html
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from clips.common.errors import UserError, in_one_line
from clips.common.escape import LONGEST, for_markdown
from clips.common.live import say
from mllm.chat.limits import Limits, check_values
from mllm.chat.model import ChatModel, Sampling
from mllm.chat.session import ChatSession
from mllm.chat.transcript import open_visual
from mllm.data.demo import DEMO_DIR, IMAGES, QUESTIONS
from mllm.data.questions import Question, read_questions
from mllm.model.load import data_of

LIMITS = Limits()
SHOWN_EVERY_S = 0.1
"""Seconds between updates, because a page that draws every token of a fast model has no time for clicks."""
THEME = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = "button[aria-label='Share'] { display: none; }"  # it would send the conversation to another site


class Page(gr.Blocks):
    """A Gradio page that shows failed events as messages instead of logging a traceback for each."""

    async def process_api(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Run an event of the page; any error becomes a message for the visitor."""
        try:
            return await super().process_api(*arguments, **options)
        except Exception as error:
            raise gr.Error(html.escape(error_message(error)), title="", print_exception=False) from None


def error_message(error: Exception) -> str:
    """Return the message for the visitor. An error that is not a UserError is written to the log."""
    if isinstance(error, UserError):
        return str(error)
    say(f"an event of the page failed: {in_one_line(error)}")
    return "the page could not do this; its log says why"


async def bounded(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """Middleware that answers 400 to requests from pages of other sites and to requests beyond `LIMITS`.

    All other requests are passed on, and an exception that they raise also becomes a 400. Uploads have gradio's limit.
    """
    try:
        # A browser sends forms, also with files, to any site without asking, and names the page that it did so for.
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers["host"]:
            raise UserError("this page answers to no other site")
        if request.method == "POST" and not request.url.path.endswith("/upload"):  # gradio limits uploads
            if int(request.headers.get("content-length", LIMITS.body_bytes + 1)) > LIMITS.body_bytes:
                raise UserError(f"an event has a length of at most {LIMITS.body_bytes:,} bytes")
            check_values(await request.body(), LIMITS)
        return await call_next(request)
    except Exception as error:
        return JSONResponse({"error": error_message(error)}, 400)


# ---------------------------------------------------------------------------------------------- the chat
def answers(
    model: ChatModel,
    message: dict[str, Any],
    history: Sequence[dict[str, Any]],
    talk: dict[str, ChatSession],
    temperature: float,
    length: float,
) -> Iterator[str]:
    """Yield the answer so far as escaped HTML, at most every SHOWN_EVERY_S; LIMITS.seconds cuts it off.

    `talk` holds the visitor's session, which is cut to the answers that `history` still shows. Raises UserError
    for a question, image or video beyond LIMITS.
    """
    session = talk.setdefault("session", ChatSession(model))
    session.keep(sum(turn["role"] == "assistant" for turn in history))
    text, files = message["text"].strip(), message["files"]
    if len(text) > LIMITS.prompt_chars:
        raise UserError(f"the question is too long: it may have {LIMITS.prompt_chars:,} characters")
    if len(files) > LIMITS.images:
        raise UserError(f"too many images: a question may have {LIMITS.images}")
    images = [open_visual(Path(path).read_bytes(), path, LIMITS) for path in files]
    model.check_crops([*session.images, *images], LIMITS.crops)
    sampling = Sampling(temperature=temperature, max_new_tokens=min(int(length), LIMITS.new_tokens))
    cancel = threading.Event()
    start = shown_at = time.monotonic()
    answer = ""
    for piece in session.ask(text, images, sampling, cancel):
        answer += piece
        now = time.monotonic()
        if now - start > LIMITS.seconds:
            cancel.set()
        if now - shown_at > SHOWN_EVERY_S:
            shown_at = now
            yield html.escape(answer, quote=False)
    assert session.last is not None  # the answer has ended
    remark = f"\n\n({session.last.cut_off})" if session.last.cut_off else ""
    yield html.escape(answer + remark, quote=False)


def demo_questions() -> list[Question]:
    """Return the first question of each kind about the demo's test scenes, or none if there is no demo."""
    questions = read_questions(DEMO_DIR / QUESTIONS) if (DEMO_DIR / QUESTIONS).is_file() else []
    return list({question.kind: question for question in reversed(questions)}.values())[::-1]


def add_chat(model: ChatModel, questions: Sequence[Question]) -> None:
    """Add the chat with its examples and sampling controls to the page under construction."""
    kinds = ["image", "video"] if model.takes_videos else ["image"]
    box = gr.MultimodalTextbox(
        file_types=kinds, file_count="multiple", sources=["upload"], show_label=False,
        placeholder=f"Ask about an {' or a '.join(kinds)}",
    )  # fmt: skip
    files = [str(DEMO_DIR / IMAGES / question.images[0]) for question in questions]
    examples = [{"text": question.text, "files": [file]} for question, file in zip(questions, files, strict=True)]
    gr.ChatInterface(
        partial(answers, model),
        multimodal=True,
        chatbot=gr.Chatbot(
            render_markdown=False, show_label=False, buttons=["copy"], feedback_options=None, height=480
        ),
        textbox=box,
        additional_inputs=[
            gr.State({}, render=False),
            gr.Slider(0, 2, 0, step=0.1, label="Temperature", info="0: always the likeliest word", render=False),
            gr.Slider(1, LIMITS.new_tokens, 256, step=1, label="Longest answer", info="in tokens", render=False),
        ],
        additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
        examples=[[example, None, None, None] for example in examples] or None,  # settings stay as they are
        description=for_markdown(f"{model.name}: {model.layout} tokens for each image.{model.scope}", LONGEST),
        cache_examples=False,
        flagging_mode="never",
        api_visibility="private",
    )


def launch(name: str | None, *, port: int, block: bool = True, **options: Any) -> gr.Blocks:
    """Serve the page at http://127.0.0.1:port until Ctrl-C, or in the background with `block=False`.

    `options` go to `ChatModel.load`. Raises UserError if the model cannot be opened or the port is taken.
    """
    model = ChatModel.load(name, **options)
    questions = demo_questions() if data_of(model.directory) == ["demo"] else []
    uploads = tempfile.TemporaryDirectory(prefix="clips-mllm-web-", ignore_cleanup_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = uploads.name  # gradio has no other setting for the directory of uploads

    with Page(title="CLIPS-MLLM", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        add_chat(model, questions)
    page.queue(max_size=LIMITS.waiting)
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1"])
    try:
        page.launch(
            server_name="127.0.0.1", server_port=port, share=False, quiet=True, prevent_thread_lock=True,
            ssr_mode=False, pwa=False, mcp_server=False, footer_links=[], theme=THEME, css=CSS,
            max_file_size=2 * LIMITS.image_bytes,  # a video may be larger
            # gradio serves files under these paths only, and data/ may be a link to another disk
            allowed_paths=[str(named(DEMO_DIR / IMAGES)) for named in (Path.absolute, Path.resolve)],
            app_kwargs={"middleware": [hosts, Middleware(BaseHTTPMiddleware, dispatch=bounded)]},
        )  # fmt: skip
    except OSError:
        raise UserError(f"port {port} is used by another program: choose one with --port") from None
    print(f"The page is at http://127.0.0.1:{port} (Ctrl-C ends it)", flush=True)
    if block:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that SIGTERM also removes the uploads
        page.block_thread()
    return page
