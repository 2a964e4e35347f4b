"""The web page: chat with a model, two models side by side, and what an image says to a CLIPS encoder.

    launch(model_names, host="127.0.0.1", port=7860, …)      blocks until Ctrl-C; scripts/chat.py --web calls it

The page fetches nothing from elsewhere: system fonts, no analytics, and a Content-Security-Policy that makes the
browser refuse whatever is not on this server, also when a model answers with a link to a picture. What a visitor asks
and uploads is kept for that visitor alone: talks in the memory of the browser session, files in a temporary folder that
is removed at the end.
"""

from __future__ import annotations

import contextlib
import html
import json
import os
import re
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clips.data.demo import CONCEPTS
from clips.errors import UserError
from mllm.chat import ChatModel, ChatSession, Sampling, Stats
from mllm.demo import IMAGES, QUESTIONS
from mllm.evaluate import model_name, newest_model, read_questions
from mllm.hub import resolve
from mllm.limits import Limits, read_image
from mllm.look import Look, overlay
from mllm.vision import newest_export

CONTENT_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; form-action 'self'; "
    "frame-ancestors 'self'"
)
EXAMPLES = 6
SHOWN_EVERY_S = 0.1
"""A page that draws every token of a quick model has no time left for the visitor's clicks."""
FILE_TYPES = ["image"]
BARS = 8

HIDDEN = {"api_visibility": "private", "show_progress": "hidden"}
"""Of every event: no programming interface beside scripts/serve.py, no spinner over what is being read."""


@dataclass(frozen=True, kw_only=True)
class _Question:
    text: str
    images: list[Image.Image]
    message: dict[str, Any]
    """What was in the box: `text` and `files`."""

    def content(self) -> list[dict[str, Any]]:
        """What the chat shows of it."""
        pictures = [{"path": path} for path in self.message["files"]]
        return [*pictures, {"type": "text", "text": _literal(self.text)}] if self.text else pictures


@dataclass
class _Talk:
    """What one browser session asked in one tab; a column is one conversation with one model."""

    sessions: dict[int, ChatSession] = field(default_factory=dict)
    messages: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    waiting: dict[int, _Question] = field(default_factory=dict)
    """Questions that a column has not begun to answer."""
    running: dict[int, threading.Event] = field(default_factory=dict)
    """Of each column that is answering, what stops it."""

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)


class _Models:
    """The models by the names they were given by; each is loaded when it is first asked, and shared by all visitors."""

    def __init__(self, names: Sequence[str], load: Callable[[str], ChatModel]) -> None:
        self.names = list(names)
        self.lines = {name: about(name) for name in names}
        self._load, self._loaded, self._lock = load, {}, threading.Lock()

    def get(self, name: str) -> ChatModel:
        if name not in self.names:  # what the browser sends is not trusted
            raise UserError(f"there is no model {name!r} here")
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = self._load(name)
            return self._loaded[name]

    def choices(self) -> list[tuple[str, str]]:
        """(label, name): the short name where it is clear."""
        short = list(map(model_name, self.names))
        return [(s if short.count(s) == 1 else name, name) for s, name in zip(short, self.names, strict=True)]


def about(name: str) -> str:
    """One line: which model, which encoder, how many tokens an image takes. Read from files, nothing is loaded."""
    directory = resolve(name, "model")
    try:
        config = json.loads((directory / "config.json").read_text())
        llm, vision = config["text_config"]["model_type"], config["vision_config"]["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"model {name}: its config.json is not that of a LLaVA model ({error!r})") from None
    card = directory / "README.md"
    row = re.search(ENCODER_ROW, card.read_text() if card.is_file() else "", re.MULTILINE)
    encoder = f"{vision}, {config.get('image_seq_length', '?')} tokens"
    if row:
        encoder = f"{row['kind']} {row['run'] or Path(row['argument'] or '').name}".strip() + f", {row['facts']}"
    return f"{model_name(name)} · language model {llm} · encoder {encoder}"


ENCODER_ROW = (
    r"^\| Vision encoder \| (?P<kind>\w+)(?::(?P<argument>\S+))? "
    r"\(\w+ from (?:(?:\S*/)?(?P<run>[^/\s;]+)/export/hf_vit|[^;]+); (?P<facts>.+), layer .*\) \|$"
)
"""The card's line (`VisionEncoder.describe`), from which paths and layers are left out."""


def example_questions(data: Path) -> list[tuple[str, str]]:
    """(picture, question) of demo test scenes, one of each kind of question first; none where `data` is not there."""
    if not (data / QUESTIONS).is_file():
        return []
    kinds: dict[str, list[tuple[str, str]]] = {}
    for question in read_questions(data / QUESTIONS):
        if question.image and (data / IMAGES / question.image).is_file():
            kinds.setdefault(question.kind, []).append((str(data / IMAGES / question.image), question.text))
    # One of each kind, then the second of each, …
    turns = zip(*(_padded(found, EXAMPLES) for found in kinds.values()), strict=True)
    return [example for turn in turns for example in turn if example][:EXAMPLES]


def _padded(items: list[Any], length: int) -> list[Any]:
    return [*items[:length], *[None] * (length - len(items))]


# ---------------------------------------------------------------------------------------------- conversations


@contextlib.contextmanager
def _friendly() -> Iterator[None]:
    """Errors as a message in the page; what is not the visitor's mistake is printed in full in the terminal only."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), title="", print_exception=False) from None
    except Exception:
        traceback.print_exc()
        raise gr.Error("The server met an error; its terminal says which.", print_exception=False) from None


def _literal(text: str) -> str:
    """`text` for the chat, which takes it for HTML: a typed <image> is shown as typed."""
    return html.escape(text, quote=False)


def _read(path: str, limits: Limits) -> Image.Image:
    with open(path, "rb") as file:
        return read_image(file.read(limits.image_bytes + 1), limits)


def _asking(**value: Any) -> dict[str, Any]:
    """The question's box with its button for stopping."""
    return gr.update(submit_btn=False, stop_btn=True, **value)


def _ready(talk: _Talk, **value: Any) -> dict[str, Any]:
    """The box with its button for sending; while something is answered, the button is left to the end of that.

    Events reach the browser in any order: one that said "still answering" could come after the answer's end.
    """
    return gr.update(**{} if talk.busy else {"submit_btn": True, "stop_btn": False}, **value)


def _begin(message: dict[str, Any], talk: _Talk, columns: int, limits: Limits) -> dict[str, Any]:
    """Take a question with its pictures; what is wrong with it is said, and then it stays in the box."""
    if talk.busy:
        raise UserError("The last question is still being answered: wait, or stop it.")
    text, paths = (message.get("text") or "").strip(), message.get("files") or []
    if not text and not paths:
        raise UserError("Ask something, or add a picture.")
    if len(text) > limits.prompt_chars:
        raise UserError(f"The question has {len(text):,} characters, the limit is {limits.prompt_chars:,}.")
    if len(paths) > limits.images:
        raise UserError(f"{len(paths)} pictures are too many, the limit is {limits.images}.")
    images = [_read(path, limits) for path in paths]
    question = _Question(text=text, images=images, message={"text": text, "files": paths})
    talk.waiting = dict.fromkeys(range(columns), question)
    return _asking(value=None)


def _stop(talk: _Talk) -> dict[str, Any]:
    """End what is being answered and drop what waits."""
    talk.waiting.clear()
    for cancel in list(talk.running.values()):
        cancel.set()
    return _ready(talk)


def _forget(talk: _Talk, column: int) -> None:
    """Begin a new conversation in one column."""
    for kept in (talk.sessions, talk.messages, talk.waiting):
        kept.pop(column, None)
    if (cancel := talk.running.pop(column, None)) is not None:
        cancel.set()


def _answer(
    talk: _Talk,
    column: int,
    model: Callable[[], ChatModel],
    temperature: float,
    length: float,
    limits: Limits,
    again: bool,
) -> Iterator[tuple[Any, Any, str]]:
    """Stream (messages, box, remark) of one column: the answer to its waiting question, or `again` to its last one."""
    question = talk.waiting.pop(column, None)
    if column in talk.running or (question is None and not again):
        yield gr.skip(), _ready(talk), gr.skip()
        return
    cancel = talk.running[column] = threading.Event()  # gone from there once a new conversation has begun
    begin, before = time.monotonic(), talk.messages.get(column, [])
    asked = before[:-1] if again else [*before, {"role": "user", "content": question.content()}]
    text, remark, late, shown_at = "", "", False, 0.0
    box = {"value": question.message} if question else {}  # comes back where nothing is answered
    try:
        yield asked, gr.skip(), "…"
        sampling = Sampling(temperature=temperature, max_new_tokens=min(int(length), limits.new_tokens))
        loaded, session = model(), talk.sessions.get(column)
        if session is None or session.model is not loaded:
            session = ChatSession(loaded)
            if talk.running.get(column) is cancel:  # else a new conversation began while the model was loaded
                talk.sessions[column] = session
        pieces = (
            session.retry(sampling, cancel) if again else session.ask(question.text, question.images, sampling, cancel)
        )
        with contextlib.closing(pieces):
            for piece in pieces:
                text += piece
                if late := time.monotonic() - begin > limits.seconds:
                    cancel.set()
                if talk.running.get(column) is cancel and time.monotonic() - shown_at > SHOWN_EVERY_S:
                    shown_at = time.monotonic()
                    talk.messages[column] = [*asked, {"role": "assistant", "content": _literal(text)}]
                    yield talk.messages[column], gr.skip(), "…"
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
        yield shown, _ready(talk, **box), remark
    else:  # what was sent before may reach the browser after the new conversation did
        yield talk.messages.get(column, []), gr.skip(), gr.skip()


def _remark(stats: Stats, late: bool) -> str:
    """What an answer took, and why it ended where that is not plain to see."""
    ended = {
        "stop": "",
        "length": " · cut off at the longest length",
        "cancelled": " · cut off, it took too long" if late else " · stopped",
    }
    speed = f", then {stats.tokens_per_s:.0f} tokens/s" if stats.tokens_per_s else ""
    return f"{stats.new_tokens} tokens · first after {stats.first_token_s:.1f} s{speed}{ended[stats.finish_reason]}"


def _conversation(models: _Models, columns: int, examples: list[tuple[str, str]], limits: Limits) -> None:
    """The components and events of one tab with `columns` conversations under one box."""
    talk = gr.State(_Talk())
    chosen, lines, chats, remarks = [], [], [], []
    many = len(models.names) > 1
    if columns > 1 and not many:
        gr.Markdown("One model is here. To compare two, start with `--compare-with MODEL`.", elem_classes="about")
    with gr.Row():
        for column in range(columns):
            with gr.Column(min_width=300):
                name = models.names[min(column, len(models.names) - 1)]
                choice = gr.Dropdown(
                    models.choices(), value=name, label="Model", container=False, visible=many or "hidden"
                )
                lines.append(gr.Markdown(models.lines[name], elem_classes="about"))
                chosen.append(choice)
                chats.append(_chatbot(examples if columns == 1 else examples[:2]))
                remarks.append(gr.Markdown(elem_classes="remark"))
    box = gr.MultimodalTextbox(
        placeholder="Ask about a picture: paste, drop or attach it",
        file_types=FILE_TYPES, file_count="multiple", sources=["upload"], show_label=False, elem_classes="box",
    )  # fmt: skip
    clear = gr.Button("New conversation", size="sm", variant="secondary")
    with gr.Row():
        with gr.Column(min_width=300), gr.Accordion("Settings", open=False):
            temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature", info="0: always the likeliest word")
            length = gr.Slider(
                1, limits.new_tokens, min(256, limits.new_tokens), step=1, label="Longest answer", info="in tokens"
            )
        with gr.Column(min_width=300), gr.Accordion("Camera", open=False):
            camera = _Picture(sources=["webcam"], show_label=False, height=280)

    def begin(message: dict[str, Any], talk: _Talk) -> dict[str, Any]:
        return _begin(message, talk, columns, limits)

    def answer(column: int, again: bool) -> Callable[..., Iterator[tuple[Any, Any, str]]]:
        def stream(talk: _Talk, name: str, temperature: float, length: float) -> Iterator[tuple[Any, Any, str]]:
            yield from _answer(talk, column, lambda: models.get(name), temperature, length, limits, again)
            yield gr.skip(), gr.skip(), gr.skip()  # gradio sends the last one twice: what came since would be undone

        return stream

    def undo(column: int) -> Callable[[_Talk], tuple[Any, Any, Any]]:
        def take_back(talk: _Talk) -> tuple[Any, Any, Any]:
            if talk.busy or column not in talk.sessions:
                return gr.skip(), gr.skip(), gr.skip()
            text = talk.sessions[column].undo()
            *talk.messages[column], question, _ = talk.messages[column]
            files = [part["path"] for part in question["content"] if "path" in part]
            return talk.messages[column], {"text": text, "files": files}, ""

        return take_back

    def switch(column: int) -> Callable[[str, _Talk], tuple[Any, ...]]:
        def other(name: str, talk: _Talk) -> tuple[Any, ...]:
            _forget(talk, column)
            return models.lines[name], [], "", _ready(talk)

        return other

    def new(talk: _Talk) -> list[Any]:
        for column in range(columns):
            _forget(talk, column)
        return [*[[]] * columns, *[""] * columns, _ready(talk, value=None)]

    def pick(event: gr.SelectData) -> dict[str, Any]:
        if not isinstance(event.index, int) or not 0 <= event.index < len(examples):
            raise UserError("there is no such example")
        path, text = examples[event.index]  # never a path that a browser sends: gradio would hand out that file
        return {"text": text, "files": [path]}

    def snap(path: str | None, message: dict[str, Any] | None) -> tuple[Any, Any]:
        if path is None:
            return gr.skip(), gr.skip()
        message = message or {}
        return {"text": message.get("text", ""), "files": [*message.get("files", []), path]}, None

    started = [box.submit(_shown(begin), [box, talk], box, **HIDDEN)]
    for chat in chats:
        picked = chat.example_select(_shown(pick), None, box, **HIDDEN)
        started.append(picked.success(_shown(begin), [box, talk], box, **HIDDEN))
    for column, (chat, remark) in enumerate(zip(chats, remarks, strict=True)):
        inputs, outputs = [talk, chosen[column], temperature, length], [chat, box, remark]
        for start in started:
            start.success(answer(column, again=False), inputs, outputs, **HIDDEN)
        chat.retry(_asking, None, box, queue=False, **HIDDEN).then(
            answer(column, again=True), inputs, outputs, **HIDDEN
        )
        chat.undo(_shown(undo(column)), talk, outputs, **HIDDEN)
        changed = [lines[column], chat, remark, box]
        chosen[column].change(_shown(switch(column)), [chosen[column], talk], changed, queue=False, **HIDDEN)
    box.stop(_shown(_stop), talk, box, queue=False, **HIDDEN)
    clear.click(_shown(new), talk, [*chats, *remarks, box], queue=False, **HIDDEN)
    camera.input(_shown(snap), [camera, box], [box, camera], **HIDDEN)


def _shown(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its errors shown in the page."""
    return _friendly()(function)


def _chatbot(examples: list[tuple[str, str]]) -> gr.Chatbot:
    return gr.Chatbot(
        show_label=False, layout="bubble", buttons=["copy"],
        # A typed * is shown as typed.
        render_markdown=False, feedback_options=None, elem_classes="chat", container=False, allow_file_downloads=False,
        placeholder="### Ask about a picture",
        examples=[{"text": text, "files": [path], "icon": path} for path, text in examples] or None,
    )  # fmt: skip


class _Picture(gr.Image):
    """A picture as the path of its file: only clips/data/images.py opens what strangers send."""

    is_template = True

    def preprocess(self, payload: Any) -> str | None:
        return payload.path if payload is not None else None


# ---------------------------------------------------------------------------------------------- the encoder's view


def _encoder_view(looks: dict[str, Callable[[], Look]], examples: list[tuple[str, str]], limits: Limits) -> None:
    """The tab with zero-shot bars and the patch map."""
    first = next(iter(looks))
    with gr.Row(elem_classes="encoder"):
        with gr.Column(min_width=300):
            encoder = gr.Dropdown(
                list(looks), value=first, label="Encoder", container=False, visible=len(looks) > 1 or "hidden"
            )
            picture = _Picture(sources=["upload", "clipboard", "webcam"], show_label=False, height=280)
            if examples:
                gr.Examples([[path] for path, _ in examples[:5]], picture, label="Demo scenes")
            word = gr.Textbox(label="Look for", placeholder="a word or a sentence", submit_btn=True)
        with gr.Column(min_width=300):
            heat = gr.Image(show_label=False, format="png", interactive=False, buttons=[], height=340)
            remark = gr.Markdown(elem_classes="remark")
            bars = gr.Label(label="Which label?", num_top_classes=BARS, show_heading=False)
            with gr.Accordion("Labels to choose from", open=False):
                labels = gr.Textbox(
                    ", ".join(CONCEPTS), label="Labels", show_label=False, container=False, lines=4, max_lines=8
                )

    def see(encoder: str, path: str | None, word: str, labels: str) -> tuple[Any, Any, str]:
        if path is None:
            return None, None, "Add a picture."
        if encoder not in looks:
            raise UserError(f"there is no encoder {encoder!r} here")
        if len(word) + len(labels) > limits.prompt_chars:
            raise UserError(f"word and labels have more than {limits.prompt_chars:,} characters")
        look, image, names = looks[encoder](), _read(path, limits), labels.replace("\n", ",").split(",")
        odds = look.zero_shot(image, names)
        word = word.strip() or next(iter(odds))
        match = look.match(image, word, names)
        text = (
            f"“{word}”: similarity {match.similarity:.2f}, that of an average label {match.usual:.2f}. The map says "
            f"where the difference comes from; the strongest of {match.patches.size} patches adds "
            f"{match.patches.max():.2f}."
        )
        return odds, overlay(image, match.patches), text

    inputs, outputs = [encoder, picture, word, labels], [bars, heat, remark]
    changes = [picture.change, word.submit, labels.submit, labels.blur, encoder.change]
    gr.on(changes, _shown(see), inputs, outputs, trigger_mode="always_last", **HIDDEN)


# ---------------------------------------------------------------------------------------------- the page

THEME = gr.themes.Base(
    primary_hue=gr.themes.colors.orange,
    secondary_hue=gr.themes.colors.stone,
    neutral_hue=gr.themes.colors.stone,
    radius_size=gr.themes.sizes.radius_lg,
    text_size=gr.themes.sizes.text_md,
    font=("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Liberation Sans", "sans-serif"),
    font_mono=("ui-monospace", "Menlo", "Consolas", "Liberation Mono", "monospace"),
).set(
    body_background_fill="*neutral_50",
    body_background_fill_dark="*neutral_950",
    block_border_width="1px",
    block_shadow="none",
    block_label_background_fill="transparent",
    block_label_background_fill_dark="transparent",
    block_label_border_width="0px",
    block_label_text_color="*neutral_500",
    button_primary_background_fill="*neutral_800",
    button_primary_background_fill_hover="*neutral_700",
    button_primary_text_color="white",
    button_primary_background_fill_dark="*neutral_200",
    button_primary_background_fill_hover_dark="white",
    button_primary_text_color_dark="*neutral_900",
)

CSS = """
.gradio-container { width: 100%; max-width: 1040px !important; margin: 0 auto; padding: 0 !important; }
.gradio-container .main { padding: 12px 20px 24px !important; max-width: 100%; }
.gradio-container main { padding: 0 !important; }
.title h1 { font-size: 1.1rem; font-weight: 650; letter-spacing: -0.01em; margin: 0; }
.about, .about p, .remark, .remark p { font-size: 0.82rem; line-height: 1.45; }
.about *, .remark * { color: var(--body-text-color-subdued) !important; }
.remark { min-height: 1.3em; }
.chat { border: 1px solid var(--border-color-primary) !important; border-radius: 14px !important;
        background: var(--block-background-fill);
        height: calc(100dvh - 350px) !important; min-height: 300px !important; }
.chat .examples { gap: 8px; padding: 12px; width: 100%; }
.chat .example { padding: 10px 12px; min-width: 0; }
.chat .example-content { flex-direction: row; align-items: center; gap: 12px; }
.chat .example-text-content { margin: 0; }
.encoder .image-frame img { width: 100%; height: 100%; object-fit: contain; }
.encoder .label, .encoder .output-class, .encoder .confidence-set, .encoder dl * { font-family: var(--font); }
/* The talk is cleared by the button below, for all columns together; nothing is shared with other sites. */
.chat button[aria-label="Clear"], .chat button[aria-label="Share"] { display: none; }
@media (max-width: 600px) {
  .gradio-container .main { padding: 8px 12px 16px !important; }
  .chat .examples { grid-template-columns: 1fr; }
  .chat .example { width: 100%; max-width: none; }
}
"""


def build(
    models: _Models, looks: dict[str, Callable[[], Look]], examples: list[tuple[str, str]], limits: Limits
) -> gr.Blocks:
    """The page; `looks` are the encoders of its third tab, which is left out where there is none."""
    with gr.Blocks(title="CLIPS-MLLM", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        gr.HTML("<h1>CLIPS-MLLM</h1>", elem_classes="title", padding=False)
        with gr.Tab("Chat"):
            _conversation(models, 1, examples, limits)
        with gr.Tab("Side by side"):
            _conversation(models, 2, examples, limits)
        if looks:
            with gr.Tab("Encoder"):
                _encoder_view(looks, examples, limits)
    return page.queue(max_size=limits.waiting)


class _ContentPolicy:
    """Adds CONTENT_POLICY to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", CONTENT_POLICY.encode())
                message["headers"] = [*message.get("headers", []), policy]
            await send(message)

        await self.app(scope, receive, with_policy)


def launch(
    model_names: Sequence[str] = (),
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    device: str = "auto",
    dtype: str = "auto",
    bits: int = 16,
    conv_mode: str = "auto",
    limits: Limits = Limits(),  # noqa: B008 - frozen
    runs: Path | str = "runs",
    data: Path | str = "data/llava_demo",
    block: bool = True,
) -> gr.Blocks:
    """Serve the page at http://host:port until Ctrl-C, or with `block=False` in the background (`close()` ends it).

    `model_names`: directories or hub ids, the first for the chat, the first two for the side-by-side; without any, all
    that were trained under `runs`, newest first. The first is loaded now, others when they are asked. Encoders are the
    newest CLIPS and CLIP exports under `runs`; examples come from the demo questions in `data`.
    Raises UserError for a model that cannot be opened and for a port that is taken.
    """
    names = list(dict.fromkeys(model_names)) or _trained(Path(runs))
    models = _Models(
        names, lambda name: ChatModel.load(name, device=device, dtype=dtype, bits=bits, conv_mode=conv_mode)
    )
    models.get(names[0])
    folder = tempfile.TemporaryDirectory(prefix="clips-mllm-web-", ignore_cleanup_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = folder.name  # the only way to tell gradio where uploads go
    page = build(models, _looks(Path(runs), device), example_questions(Path(data)), limits)
    try:
        page.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False,
            pwa=False, mcp_server=False, run_history=False, footer_links=[], max_file_size=limits.image_bytes,
            theme=THEME, css=CSS, app_kwargs={"middleware": [Middleware(_ContentPolicy)]},
        )  # fmt: skip
    except OSError:
        raise UserError(f"port {port} of {host} cannot be used: another program has it; choose one by --port") from None
    page.folder = folder  # lives as long as the page
    print(f"The page is at http://{host}:{port} (Ctrl-C ends it)", flush=True)
    if block:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that uploads are removed then, too
        page.block_thread()
    return page


def _trained(runs: Path) -> list[str]:
    newest = newest_model(runs)  # says what to do where there is none
    found = sorted(runs.glob("*/model/config.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    return list(dict.fromkeys(map(str, [newest, *(path.parent for path in found)])))


def _looks(runs: Path, device: str) -> dict[str, Callable[[], Look]]:
    """The newest CLIPS and CLIP exports by name, each opened once, when it is first needed."""
    looks = {}
    for objective in ("clips", "clip"):
        with contextlib.suppress(UserError):  # none was trained
            export = newest_export(runs, objective)
            looks[f"{objective} · {export.parent.name}"] = _once(lambda export=export: Look.load(export, device=device))
    return looks


def _once(load: Callable[[], Look]) -> Callable[[], Look]:
    lock, loaded = threading.Lock(), []

    def get() -> Look:
        with lock:
            if not loaded:
                loaded.append(load())
            return loaded[0]

    return get
