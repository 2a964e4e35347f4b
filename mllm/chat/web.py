"""The web page of scripts/chat.py --web: a chat, two models side by side, and a CLIPS encoder's view of an image.

The page fetches nothing from elsewhere: system fonts, no analytics, and a Content-Security-Policy by which the browser
refuses other servers, also for a picture that a model links to. Each visitor's questions and uploads are their own:
talks stay in the memory of the browser session, files in a temporary folder that is removed at the end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clips import CLIPS, CONCEPTS, is_of_demo
from clips.common.errors import UserError
from mllm.chat import web_talk
from mllm.chat.limits import Limits
from mllm.chat.model import ChatModel
from mllm.chat.patch_map import overlay, patch_map, share_in_corner, zero_shot
from mllm.chat.web_models import (
    Pool,
    about,
    choices,
    example_questions,
    example_things,
    takes_videos,
    trained_encoders,
    trained_models,
)
from mllm.chat.web_style import CSS, THEME
from mllm.chat.web_talk import Talk
from mllm.data.demo import IMAGES

CONTENT_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; form-action 'self'; "
    "frame-ancestors 'self'"
)
RUNS, EXAMPLES, UNSEEN_PICTURES = Path("runs"), Path("data/llava_demo"), "unseen-*"
SECOND = """### Which second model?

One model is here, `{name}`. Two models answer the same question side by side.

- A second model of another encoder: `bash scripts/train_llava.sh --vision clip`
- Then this page with both: `python scripts/chat.py --web`, or with a model elsewhere: `--compare-with MODEL`
"""
LABELS = ("a person", "an animal", "a plant", "food", "a vehicle", "a building", "a landscape", "a drawing", "a text")
"""Labels at the start for an encoder of other data than the demo's; the visitor writes better ones."""
BARS, FOUND = 8, 12
HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""For every event: no programming interface beside scripts/serve.py, no spinner over the answer."""


# ---------------------------------------------------------------------------------------------- conversations
@contextlib.contextmanager
def _errors_shown() -> Iterator[None]:
    """Show an error as a message in the page. Only the terminal shows the text of a defect."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), title="", print_exception=False) from None
    except Exception:
        traceback.print_exc()
        raise gr.Error("The server met an error; its terminal says which.", print_exception=False) from None


def _conversation(models: Pool[ChatModel], columns: int, examples: list[tuple[str, str]], limits: Limits) -> None:
    """One tab: `columns` conversations and one box for questions."""
    about_models = {name: about(name) for name in models.names}
    talk = gr.State(Talk())
    chosen, lines, chats, remarks = [], [], [], []
    many = len(models.names) > 1
    if columns > 1 and not many:
        gr.Markdown(SECOND.format(name=models.names[0]), elem_classes="side")
        return
    with gr.Row():
        for column in range(columns):
            with gr.Column(min_width=300):
                name = models.names[min(column, len(models.names) - 1)]
                choice = gr.Dropdown(
                    choices(models.names), value=name, label="Model", container=False, visible=many or "hidden"
                )
                lines.append(gr.Markdown(about_models[name], elem_classes="about"))
                chosen.append(choice)
                chats.append(_chatbot(examples if columns == 1 else examples[:2]))
                remarks.append(gr.Markdown(elem_classes="remark"))
    box = gr.MultimodalTextbox(
        file_count="multiple", sources=["upload"], show_label=False, elem_classes="box",
        **_taken([choice.value for choice in chosen]),
    )  # fmt: skip
    clear = gr.Button("New conversation", size="sm", variant="secondary")
    with gr.Row():
        with gr.Column(min_width=300), gr.Accordion("Settings", open=False):
            temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature", info="0: always the likeliest word")
            length = gr.Slider(
                1, limits.new_tokens, min(256, limits.new_tokens), step=1, label="Longest answer", info="in tokens"
            )
        with gr.Column(min_width=300), gr.Accordion("Camera", open=False):
            camera = _ImagePath(sources=["webcam"], show_label=False, height=280)

    def begin(message: dict[str, Any], talk: Talk) -> dict[str, Any]:
        return web_talk.begin(message, talk, columns, limits)

    def answer(
        column: int, again: bool, talk: Talk, name: str, temperature: float, length: float
    ) -> Iterator[tuple[Any, Any, str]]:
        yield from web_talk.answer(talk, column, lambda: models.get(name), temperature, length, limits, again)
        yield gr.skip(), gr.skip(), gr.skip()  # gradio sends the last one twice, which would undo later changes

    def undo(column: int, talk: Talk) -> tuple[Any, Any, Any]:
        if talk.busy or column not in talk.sessions:
            return gr.skip(), gr.skip(), gr.skip()
        text = talk.sessions[column].undo()
        *talk.messages[column], question, _ = talk.messages[column]
        files = [part["path"] for part in question["content"] if "path" in part]
        return talk.messages[column], {"text": text, "files": files}, ""

    def switch(column: int, talk: Talk, *names: str) -> tuple[Any, ...]:
        web_talk.forget(talk, column)
        return about_models[names[column]], [], "", web_talk.ready(talk, **_taken(names))

    def new(talk: Talk) -> list[Any]:
        for column in range(columns):
            web_talk.forget(talk, column)
        return [*[[]] * columns, *[""] * columns, web_talk.ready(talk, value=None)]

    def pick(event: gr.SelectData) -> dict[str, Any]:
        if not isinstance(event.index, int) or not 0 <= event.index < len(examples):
            raise UserError("there is no such example")
        path, text = examples[event.index]  # a path from the browser would make gradio hand out that file
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
            start.success(partial(answer, column, False), inputs, outputs, **HIDDEN)
        again = chat.retry(web_talk.asking, None, box, queue=False, **HIDDEN)
        again.then(partial(answer, column, True), inputs, outputs, **HIDDEN)
        chat.undo(_shown(partial(undo, column)), talk, outputs, **HIDDEN)
        changed = [lines[column], chat, remark, box]
        chosen[column].change(_shown(partial(switch, column)), [talk, *chosen], changed, queue=False, **HIDDEN)
    box.stop(_shown(web_talk.stop), talk, box, queue=False, **HIDDEN)
    clear.click(_shown(new), talk, [*chats, *remarks, box], queue=False, **HIDDEN)
    camera.input(_shown(snap), [camera, box], [box, camera], **HIDDEN)


def _taken(names: Sequence[str]) -> dict[str, Any]:
    """What the box of a question to all models `names` says and accepts: videos only if each model takes videos."""
    kinds = ["image", "video"] if all(map(takes_videos, names)) else ["image"]
    shown = "a picture or a video" if "video" in kinds else "a picture"
    return {"placeholder": f"Ask about {shown}", "file_types": kinds}


def _shown(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose errors the page shows."""
    return _errors_shown()(function)


def _chatbot(examples: list[tuple[str, str]]) -> gr.Chatbot:
    return gr.Chatbot(
        show_label=False, layout="bubble", buttons=["copy"],
        render_markdown=False, feedback_options=None, elem_classes="chat", container=False, allow_file_downloads=False,
        placeholder="### Ask about a picture",
        examples=[{"text": text, "files": [path], "icon": path} for path, text in examples] or None,
    )  # fmt: skip


class _ImagePath(gr.Image):
    """A picture as the path of its file: only clips/data/images.py opens strangers' pictures."""

    is_template = True

    def preprocess(self, payload: Any) -> str | None:
        return payload.path if payload is not None else None


# ---------------------------------------------------------------------------------------------- the encoder's view
def _encoder_view(
    tab: gr.Tab, encoders: Pool[CLIPS], things: list[tuple[str, str]], known: Sequence[str], limits: Limits
) -> None:
    """The tab with zero-shot bars of the `known` labels and the patch map; it opens with the first of `things`."""
    names = encoders.names
    with gr.Row(elem_classes="encoder"):
        with gr.Column(min_width=300):
            encoder = gr.Dropdown(
                names, value=names[0], label="Encoder", container=False, visible=len(names) > 1 or "hidden"
            )
            first, thing = things[0] if things else (None, "")
            picture = _ImagePath(first, sources=["upload", "clipboard", "webcam"], show_label=False, height=280)
            word = gr.Textbox(thing, label="Look for", placeholder="a word or a sentence", submit_btn=True)
            if things:
                gr.Examples(
                    [list(example) for example in things[:5]], [picture, word], label="Demo scenes", elem_id="scenes"
                )
        with gr.Column(min_width=300):
            heat = gr.Image(show_label=False, format="png", interactive=False, buttons=[], height=340)
            remark = gr.Markdown(elem_classes="remark")
            bars = gr.Label(label="Which label?", num_top_classes=BARS, show_heading=False)
            with gr.Accordion("Labels to choose from", open=False):
                labels = gr.Textbox(
                    ", ".join(known), label="Labels", show_label=False, container=False, lines=4, max_lines=8
                )

    def see(encoder: str, path: str | None, word: str, labels: str) -> tuple[Any, Any, str]:
        if path is None:
            return None, None, "Add a picture."
        if len(word) + len(labels) > limits.prompt_chars:
            raise UserError(f"word and labels have more than {limits.prompt_chars:,} characters")
        opened, image = encoders.get(encoder), web_talk.read_upload(path, limits)
        names = labels.replace("\n", ",").split(",")
        odds = zero_shot(opened, image, names)
        word = word.strip() or next(iter(odds))
        match = patch_map(opened, image, word, names)
        text = (
            f"“{word}”: similarity {match.similarity:.2f}, that of an average label {match.usual:.2f}. The map says "
            f"where the difference comes from; the strongest of {match.patches.size} patches adds "
            f"{match.patches.max():.2f}."
        )
        return odds, overlay(image, match.patches), text

    inputs, outputs = [encoder, picture, word, labels], [bars, heat, remark]
    changes = [tab.select, picture.change, word.submit, labels.submit, labels.blur, encoder.change]
    gr.on(changes, _shown(see), inputs, outputs, trigger_mode="always_last", **HIDDEN)


def _search_view(encoders: Pool[CLIPS], folder: Path, pattern: str, limits: Limits) -> None:
    """The tab that looks through the pictures of `folder`."""
    with gr.Column(elem_classes="encoder"):
        encoder = gr.Dropdown(
            encoders.names, value=encoders.names[0], container=False, visible=len(encoders.names) > 1 or "hidden"
        )
        with gr.Row():
            text = gr.Textbox(label="Look for", placeholder="a word or a sentence", submit_btn=True, min_width=300)
            picture = _ImagePath(sources=["upload", "clipboard"], label="or the like of a picture", height=160)
        remark = gr.Markdown(f"Looks through the pictures of `{folder}`.", elem_classes="remark")
        found = gr.Gallery(
            show_label=False, columns=4, height="auto", object_fit="contain", interactive=False, elem_classes="found"
        )

    def search(by_picture: bool, encoder: str, text: str, path: str | None) -> tuple[Any, str]:
        if not (path if by_picture else text.strip()):
            return gr.skip(), "Type a word or a sentence."
        if len(text) > limits.prompt_chars:
            raise UserError(f"the text has more than {limits.prompt_chars:,} characters")
        index, _ = encoders.get(encoder).kept_index(folder, pattern)
        matches = index.search(web_talk.read_upload(path, limits) if by_picture and path else text, FOUND)
        shown = [(web_talk.read_upload(match.path, limits), f"{match.score:.2f}") for match in matches]
        looked_for = "the picture" if by_picture else f"“{text.strip()}”"
        return shown, f"The nearest of {len(index):,} pictures to {looked_for}, with their cosines."

    inputs, outputs = [encoder, text, picture], [found, remark]
    text.submit(_shown(partial(search, False)), inputs, outputs, **HIDDEN)
    picture.input(_shown(partial(search, True)), inputs, outputs, **HIDDEN)


def build(
    models: Pool[ChatModel],
    encoders: Pool[CLIPS],
    examples: list[tuple[str, str]],
    limits: Limits,
    *,
    things: list[tuple[str, str]],
    labels: Sequence[str],
    pictures: tuple[Path, str] | None,
) -> gr.Blocks:
    """The page; it has two tabs without `encoders`, and no search without `pictures`, a folder and a pattern in it."""
    with gr.Blocks(title="CLIPS-MLLM", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        gr.HTML("<h1>CLIPS-MLLM</h1>", elem_classes="title", padding=False)
        with gr.Tab("Chat"):
            _conversation(models, 1, examples, limits)
        with gr.Tab("Side by side"):
            _conversation(models, 2, examples, limits)
        if encoders.names:
            with gr.Tab("Encoder") as tab:
                _encoder_view(tab, encoders, things, labels, limits)
        if encoders.names and pictures is not None:
            with gr.Tab("Search"):
                _search_view(encoders, *pictures, limits)
    return page.queue(max_size=limits.waiting)


class ContentPolicy:
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


def _points_at(encoder: CLIPS, path: Path, thing: str, place: str) -> float:
    """How well the encoder's map points at `thing`; 0 for an encoder that has no map."""
    try:
        image = web_talk.read_upload(str(path), Limits())
        return share_in_corner(encoder, image, thing, place, list(CONCEPTS))
    except UserError:  # the tab will say it
        return 0.0


def _opening(encoders: Pool[CLIPS], examples: Path) -> tuple[list[tuple[str, str]], Sequence[str]]:
    """Examples and labels of the encoder's tab: the demo's if the first encoder was trained on it, else LABELS."""
    with contextlib.suppress(UserError):  # the tab will say it
        first = encoders.get(encoders.names[0]) if encoders.names else None
        if first is not None and is_of_demo(first.data):
            return example_things(examples, partial(_points_at, first)), list(CONCEPTS)
    return [], LABELS


def launch(
    model_names: Sequence[str] = (),
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    allowed_hosts: Sequence[str] = (),
    pictures: str | None = None,
    block: bool = True,
    **options: Any,
) -> gr.Blocks:
    """Serve the page at http://host:port until Ctrl-C, or with `block=False` in the background (`close()` ends it).

    `model_names` are directories or hub ids, by default all models trained under runs/, newest first. The first model
    is loaded at once. `pictures` is the folder of the search, by default the demo's pictures of the unseen artist.
    `options` go to `ChatModel.load`. Encoders are the newest CLIPS and CLIP exports under runs/.
    Raises UserError if a model cannot be opened or the port is taken.
    """
    limits, names = Limits(), list(dict.fromkeys(model_names)) or trained_models(RUNS)
    models = Pool({name: partial(ChatModel.load, name, **options) for name in names})
    for name in names:
        about(name)  # a wrong name is reported before the first model is loaded
    models.get(names[0])
    folder = tempfile.TemporaryDirectory(prefix="clips-mllm-web-", ignore_cleanup_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = folder.name  # gradio has no other setting for the folder of uploads
    encoders = trained_encoders(RUNS, options.get("device", "auto"))
    unseen = EXAMPLES / IMAGES if any((EXAMPLES / IMAGES).glob(UNSEEN_PICTURES)) else None
    place = (Path(pictures), "**/*") if pictures else (unseen, UNSEEN_PICTURES) if unseen else None
    examples, (things, labels) = example_questions(EXAMPLES, names[0]), _opening(encoders, EXAMPLES)
    page = build(models, encoders, examples, limits, things=things, labels=labels, pictures=place)
    try:
        page.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False,
            pwa=False, mcp_server=False, run_history=False, footer_links=[],
            max_file_size=max(limits.image_bytes, limits.video_bytes),
            # data/ may be a link to another disk, of which gradio would hand out nothing
            allowed_paths=[str(named(EXAMPLES / IMAGES)) for named in (Path.absolute, Path.resolve)],
            theme=THEME, css=CSS, app_kwargs={"middleware": [
                Middleware(ContentPolicy),
                Middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", host, *allowed_hosts]),
            ]},
        )  # fmt: skip
    except OSError:
        raise UserError(f"port {port} of {host} cannot be used: another program has it; choose one by --port") from None
    weakref.finalize(page, folder.cleanup)  # uploads live as long as the page
    print(f"The page is at http://{host}:{port} (Ctrl-C ends it)", flush=True)
    if block:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # it removes the uploads too
        page.block_thread()
    return page
