"""The page of scripts/chat.py --web: a chat with pictures, and a CLIPS encoder's view of a picture with a search.

It listens on 127.0.0.1 and fetches nothing from elsewhere. Each visitor's talk stays in the memory of their browser's
session, and uploads stay in a temporary folder that is removed at the end.
"""

from __future__ import annotations

import html
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from clips import CLIPS, CONCEPTS, is_of_demo, newest_export
from clips.common.errors import UserError, in_one_line
from clips.common.escape import LONGEST, for_markdown, printable
from mllm.chat.limits import Limits, check_values, image_size, read_image, read_video
from mllm.chat.model import ChatModel, Sampling
from mllm.chat.patch_map import overlay, patch_map
from mllm.chat.session import ChatSession
from mllm.chat.transcript import LazyPicture, Picture, Video
from mllm.data.demo import IMAGES, QUESTIONS
from mllm.data.questions import Question, read_questions
from mllm.data.video import is_video
from mllm.model.load import data_of

RUNS, DEMO, UNSEEN_PICTURES = Path("runs"), Path("data/llava_demo"), "unseen-*"
LIMITS = Limits()
LABELS = ("a person", "an animal", "a plant", "food", "a vehicle", "a building", "a landscape", "a drawing", "a text")
"""What a word is compared with, for an encoder of other data than the demo's."""
FOUND = 12
"""Pictures that a search shows."""
SHOWN_EVERY_S = 0.1
"""A page that draws every token of a fast model has no time for the visitor's clicks."""
THEME = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = "button[aria-label='Share'] { display: none; }"  # it sends the talk to another site
HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


class PicturePath(gr.Image):
    """A picture as the path of its file: only clips/data/images.py opens strangers' pictures."""

    is_template = True

    def preprocess(self, payload: Any) -> str | None:
        return payload.path if payload is not None else None


class Page(gr.Blocks):
    """Shows an event that fails as a message; gradio would log a traceback for each malformed one."""

    async def process_api(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        try:
            return await super().process_api(*arguments, **options)
        except Exception as error:
            raise gr.Error(html.escape(told(error)), title="", print_exception=False) from None


def told(error: Exception) -> str:
    """Return what a visitor is told of an error; one that is no UserError is a line of the log."""
    if isinstance(error, UserError):
        return str(error)
    print(printable(f"an event of the page failed: {in_one_line(error)}"), file=sys.stderr, flush=True)
    return "this event cannot be answered, the page's log says why"


async def bounded(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """Answer 400 to an event above the bounds of bytes and JSON values, and to one that gradio cannot read."""
    try:
        if request.method == "POST" and not request.url.path.endswith("/upload"):  # gradio bounds files
            if int(request.headers.get("content-length", LIMITS.body_bytes + 1)) > LIMITS.body_bytes:
                raise UserError(f"an event has a length of at most {LIMITS.body_bytes:,} bytes")
            check_values(await request.body(), LIMITS)
        return await call_next(request)
    except Exception as error:
        return JSONResponse({"error": told(error)}, 400)


# ---------------------------------------------------------------------------------------------- the chat
def open_upload(path: str) -> Picture:
    """The picture or video of an upload. Raises UserError if it cannot be decoded.

    The model decodes it again: encoded pictures are bounded, decoded ones would take far more.
    """
    data = Path(path).read_bytes()
    if is_video(path):
        read_video(data, 1)
        return Video(partial(read_video, data))
    read_image(data, LIMITS)
    return LazyPicture(partial(read_image, data, LIMITS), partial(image_size, data, LIMITS))


def answers(
    model: ChatModel,
    message: dict[str, Any],
    history: Sequence[dict[str, Any]],
    talk: dict[str, ChatSession],
    temperature: float,
    length: float,
) -> Iterator[str]:
    """Stream the text of an answer so far, escaped for the chat, which reads HTML.

    `talk` holds the visitor's session. It is cut to the answers that `history` still shows.
    """
    session = talk.setdefault("session", ChatSession(model))
    session.keep(sum(turn["role"] == "assistant" for turn in history))
    text, files = message["text"].strip(), message["files"]
    if len(text) > LIMITS.prompt_chars or len(files) > LIMITS.images:
        raise UserError(f"a question has at most {LIMITS.prompt_chars:,} characters, {LIMITS.images} pictures")
    pictures = [open_upload(path) for path in files]
    model.check_squares([*session.images, *pictures], LIMITS.squares)
    sampling = Sampling(temperature=temperature, max_new_tokens=min(int(length), LIMITS.new_tokens))
    cancel = threading.Event()
    start = shown_at = time.monotonic()
    answer = ""
    for piece in session.ask(text, pictures, sampling, cancel):
        answer += piece
        now = time.monotonic()
        if now - start > LIMITS.seconds:
            cancel.set()
        if now - shown_at > SHOWN_EVERY_S:
            shown_at = now
            yield html.escape(answer, quote=False)
    yield html.escape(answer, quote=False)


def about(model: ChatModel) -> str:
    """A line of Markdown: the model, and what it was trained on."""
    data = data_of(model.directory)
    learned = f"drawings of {len(CONCEPTS)} things; it knows nothing else" if "demo" in data else ", ".join(data)
    trained = f" It was trained on {learned}." if data else ""
    return for_markdown(f"{model.name}: {model.layout} tokens for each picture.{trained}", LONGEST)


def demo_questions() -> list[Question]:
    """The first question of each kind about the demo's test scenes, if they are there."""
    questions = read_questions(DEMO / QUESTIONS) if (DEMO / QUESTIONS).is_file() else []
    return list({question.kind: question for question in reversed(questions)}.values())[::-1]


def chat_tab(model: ChatModel, questions: Sequence[Question]) -> None:
    kinds = ["image", "video"] if model.takes_videos else ["image"]
    box = gr.MultimodalTextbox(
        file_types=kinds, file_count="multiple", sources=["upload"], show_label=False,
        placeholder=f"Ask about a {' or a '.join(kinds).replace('image', 'picture')}",
    )  # fmt: skip
    examples = [{"text": question.text, "files": [str(DEMO / IMAGES / question.images[0])]} for question in questions]
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
        description=about(model),
        cache_examples=False,
        flagging_mode="never",
        api_visibility="private",
    )


# ---------------------------------------------------------------------------------------------- the encoder
def encoder_tab(encoder: CLIPS, scenes: Sequence[Question], folder: Path | None, pattern: str) -> None:
    """The patch map of a word, and the pictures of `folder` nearest to the word."""
    labels = list(CONCEPTS) if is_of_demo(encoder.data) else LABELS
    scene = next((scene for scene in scenes if scene.kind == "identity" and is_of_demo(encoder.data)), None)
    with gr.Row():
        with gr.Column(min_width=300):
            path = str(DEMO / IMAGES / scene.images[0]) if scene else None
            picture = PicturePath(path, sources=["upload", "clipboard"], label="Picture", height=280)
            thing = re.sub("^An? |[.]$", "", str(scene.answer)) if scene else ""
            word = gr.Textbox(thing, label="Look for", placeholder="a word or a sentence", submit_btn=True)
        with gr.Column(min_width=300):
            heat = gr.Image(label="Patches that match", format="png", interactive=False, buttons=[], height=280)
            remark = gr.Textbox(label="What the map says", interactive=False)
    nearest = gr.Gallery(label="Nearest pictures", columns=6, height="auto", interactive=False, visible=bool(folder))

    def see(path: str | None, word: str) -> tuple[Any, str]:
        text = word[: LIMITS.prompt_chars].strip()
        if path is None or not text:
            return None, "Add a picture and a word."
        image = read_image(Path(path).read_bytes(), LIMITS)
        match = patch_map(encoder, image, text, labels)
        note = (
            f"“{text}”: similarity {match.similarity:.2f}, that of an average label {match.usual:.2f}. The map says "
            f"where the difference comes from: the strongest of {match.patches.size} patches adds "
            f"{match.patches.max():.2f}."
        )
        return overlay(image, match.patches), note

    def search(path: str | None, word: str) -> Any:
        """The nearest pictures to the word, or to the picture where there is no word."""
        if folder is None or not (path or word.strip()):
            return gr.skip()
        index, _ = encoder.kept_index(folder, pattern)
        query = word[: LIMITS.prompt_chars] if word.strip() else read_image(Path(str(path)).read_bytes(), LIMITS)
        matches = index.search(query, FOUND)
        return [(read_image(Path(m.path).read_bytes(), LIMITS), f"{m.score:.2f}") for m in matches]

    changes = [word.submit, picture.change]
    gr.on(changes, see, [picture, word], [heat, remark], trigger_mode="always_last", **HIDDEN)
    gr.on(changes, search, [picture, word], nearest, trigger_mode="always_last", **HIDDEN)


def launch(
    name: str | None, *, port: int, pictures: str | None = None, block: bool = True, **options: Any
) -> gr.Blocks:
    """Serve the page at http://127.0.0.1:port until Ctrl-C, or with `block=False` in the background.

    `pictures` is the folder of the search, by default the demo's pictures of the unseen artist. `options` go to
    `ChatModel.load`. Raises UserError if the model cannot be opened or the port is taken.
    """
    model = ChatModel.load(name, **options)
    encoder = None
    for objective in ("clip", "clips"):  # a CLIPS export is preferred
        with suppress(UserError):
            encoder = CLIPS.from_pretrained(newest_export(RUNS, objective), device=options.get("device", "auto"))
    questions = demo_questions() if "demo" in data_of(model.directory) else []
    unseen = DEMO / IMAGES if any((DEMO / IMAGES).glob(UNSEEN_PICTURES)) else None
    folder, pattern = (Path(pictures), "**/*") if pictures else (unseen, UNSEEN_PICTURES)
    uploads = tempfile.TemporaryDirectory(prefix="clips-mllm-web-", ignore_cleanup_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = uploads.name  # gradio has no other setting for the folder of uploads

    with Page(title="CLIPS-MLLM", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        with gr.Tab("Chat"):
            chat_tab(model, questions)
        if encoder is not None:
            with gr.Tab("Encoder"):
                encoder_tab(encoder, demo_questions(), folder, pattern)
    page.queue(max_size=LIMITS.waiting)
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1"])
    try:
        page.launch(
            server_name="127.0.0.1", server_port=port, share=False, quiet=True, prevent_thread_lock=True,
            ssr_mode=False, pwa=False, mcp_server=False, footer_links=[], theme=THEME, css=CSS,
            max_file_size=2 * LIMITS.image_bytes,  # a video may be larger
            # data/ may be a link to another disk, of which gradio would hand out nothing
            allowed_paths=[str(named(DEMO / IMAGES)) for named in (Path.absolute, Path.resolve)],
            app_kwargs={"middleware": [hosts, Middleware(BaseHTTPMiddleware, dispatch=bounded)]},
        )  # fmt: skip
    except OSError:
        raise UserError(f"port {port} cannot be used: another program has it; choose one by --port") from None
    print(f"The page is at http://127.0.0.1:{port} (Ctrl-C ends it)", flush=True)
    if block:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # it removes the uploads too
        page.block_thread()
    return page
