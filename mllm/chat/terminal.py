"""The chat in a terminal: a talk with commands, or one answer for a script."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, url2pathname, urlopen

from PIL.Image import Image
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory

from clips import ENDINGS, MAX_BYTES, MAX_PIXELS
from clips.common.errors import Stopped, UserError, reason
from clips.common.escape import printable
from clips.common.paths import cache_root
from mllm.chat.limits import Limits, read_image, read_video
from mllm.chat.model import ChatModel, Sampling, Stats, model_options
from mllm.chat.session import ChatSession, ContextError
from mllm.chat.transcript import Picture, Video
from mllm.data.video import MAX_BYTES as MAX_VIDEO_BYTES
from mllm.data.video import MAX_SECONDS, is_video
from mllm.model.load import newest_model

OWN_IMAGES = Limits(
    image_bytes=MAX_BYTES, image_pixels=MAX_PIXELS, video_bytes=MAX_VIDEO_BYTES, video_seconds=MAX_SECONDS
)
"""Limits of pictures and videos that the person at the keyboard names."""


def load_image(place: str) -> Image | Video:
    """The picture or video behind a path, a file:// or an http(s) address; its ending says which.

    Raises UserError with the reason if it fails.
    """
    is_remote = place.startswith(("http://", "https://"))
    shows_video = is_video(urlsplit(place).path if is_remote else place)
    most = OWN_IMAGES.video_bytes if shows_video else OWN_IMAGES.image_bytes
    try:
        if is_remote:
            request = Request(place, headers={"User-Agent": "clips-mllm"})
            with urlopen(request, timeout=10) as response:
                data = response.read(most + 1)
        else:
            path = _local_path(place)
            if not os.path.isfile(path):
                raise UserError("there is no such file")
            if os.path.getsize(path) > most:
                raise UserError(f"the file is larger than {most:,} bytes")
            data = Path(path).read_bytes()
        if not shows_video:
            return read_image(data, OWN_IMAGES)
        read_video(data, 1, OWN_IMAGES)
        return Video(partial(_frames, data), lambda: data)
    except (UserError, OSError) as error:
        raise UserError(f"{place}: {reason(error)}") from None


def _frames(data: bytes, frames: int) -> list[Image]:
    return read_video(data, frames, OWN_IMAGES)


def _local_path(word: str) -> str:
    return url2pathname(urlsplit(word).path) if word.startswith("file://") else os.path.expanduser(word)


def dropped_files(line: str) -> list[str]:
    """The files of `line` if it holds nothing else, else nothing.

    Terminals write a dropped file plain, quoted, with escaped spaces, or as a file:// address.
    """

    def is_file(word: str) -> bool:
        named = word.startswith(("/", "~", "./", "../", "file://")) or word.lower().endswith(ENDINGS) or is_video(word)
        return named and os.path.isfile(_local_path(word))

    try:
        words = shlex.split(line)
    except ValueError:  # a text with a quotation mark
        words = []
    for found in ([line.strip()], words):
        if found and all(map(is_file, found)):
            return found
    return []


class Talk:
    """A talk line by line. Each method `do_NAME` is the command `/NAME`; its docstring is the help."""

    def __init__(self, session: ChatSession, sampling: Sampling, *, stats: bool = False) -> None:
        self.session = session
        self.sampling = sampling
        self.stats = stats
        self.waiting: list[Image | Video] = []  # pictures and videos of the next question

    def run(self, read: Callable[[], str]) -> None:
        """Handle lines of `read` until EOFError. A mistake prints one line; Ctrl-C stops only the answer."""
        while True:
            try:
                if not self.handle(read()):
                    return
            except EOFError:
                return
            except KeyboardInterrupt:
                print("(Ctrl-D or /exit leaves)")
            except ContextError as error:
                print(f"error: {error} (/undo, /reset)")
            except UserError as error:
                print(f"error: {error}")

    def handle(self, line: str) -> bool:
        """Handle one line; returns False if it ends the talk."""
        line = line.strip()
        files = dropped_files(line)
        if files:
            self.attach(files)
        elif line.startswith("/"):
            word, _, rest = line[1:].partition(" ")
            if word == "exit":
                return False
            command = getattr(self, f"do_{word}", None)
            if command is None:
                raise UserError(f"/{word} is neither a command nor a file; /help lists the commands")
            command(rest.strip())
        elif line or self.waiting:
            self.show(self.session.ask(line, self.waiting, self.sampling))
        return True

    def attach(self, places: Sequence[str]) -> None:
        """Add pictures to the next question. Raises UserError for a video if the model takes none."""
        for place in places:
            image = load_image(place)
            self.session.model.image_tokens([image])
            self.waiting.append(image)
            number = len(self.session.images) + len(self.waiting)
            what = "a video" if isinstance(image, Video) else f"{image.width} × {image.height}"
            print(f"picture {number}: {place} ({what}), goes with your next question")

    def show(self, answer: Generator[str, None, None]) -> None:
        """Print an answer while it is generated; Ctrl-C ends it."""
        try:
            with closing(answer):
                for piece in answer:  # a model may write escape sequences
                    print(printable(piece, None), end="", flush=True)
        except KeyboardInterrupt:
            print(" (stopped)", end="")
        print()
        self.waiting = []
        if self.stats and self.session.last:
            print(stats_line(self.session.last))

    def do_image(self, rest: str) -> None:
        """PATH_OR_URL  add {shown} to the next question (or drop its file here)"""
        if not rest:
            raise UserError("/image needs a path or an address")
        self.attach(dropped_files(rest) or [rest])

    def do_retry(self, rest: str) -> None:
        """[TEMPERATURE]  answer the last question again; above temperature 0 in other words"""
        try:
            temperature = float(rest) if rest else self.sampling.temperature
        except ValueError:
            raise UserError(f"/retry takes a temperature, a number, not {rest!r}") from None
        old = vars(self.sampling) | {"temperature": temperature}
        self.show(self.session.retry(Sampling(**old)))

    def do_undo(self, rest: str) -> None:
        """take back the last question, its pictures and its answer"""
        if self.waiting:
            self.waiting = []
            print("the pictures for the next question are taken back")
        else:
            print(f"taken back: {self.session.undo()}")

    def do_reset(self, rest: str) -> None:
        """start anew"""
        self.session.reset()
        self.waiting = []
        print("a new talk")

    def do_system(self, rest: str) -> None:
        """[TEXT]  set the system text; without a text the usual one"""
        self.session.set_system(rest)
        print("system text: " + (self.session.system or "the usual one"))

    def do_save(self, rest: str) -> None:
        """FILE.json  write the talk and its pictures"""
        print("written: " + ", ".join(map(str, self.session.save(os.path.expanduser(rest)))))

    def do_help(self, rest: str) -> None:
        """this list"""
        shown = "a picture or a video" if self.session.model.layout.frames else "a picture"
        for name in self.commands():
            print(f"  /{name} {getattr(self, f'do_{name}').__doc__.format(shown=shown)}")
        print("  /exit or Ctrl-D leaves, Ctrl-C stops an answer, Tab completes")

    @classmethod
    def commands(cls) -> list[str]:
        return [name.removeprefix("do_") for name in vars(cls) if name.startswith("do_")]


def stats_line(stats: Stats) -> str:
    return (
        f"[{stats.new_tokens} tokens at {stats.tokens_per_s:.1f}/s, the first after {stats.first_token_s:.2f} s; "
        f"prompt {stats.prompt_tokens}, of them {stats.cached_tokens} cached; {stats.finish_reason}]"
    )


class _Completer(Completer):
    """Completes commands, and paths after /image and /save."""

    def __init__(self, commands: Sequence[str]) -> None:
        self._commands = [f"/{name}" for name in (*commands, "exit")]
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
        word, space, rest = document.text_before_cursor.partition(" ")
        if word in ("/image", "/save") and space:
            yield from self._paths.get_completions(Document(rest), event)
        elif not space:
            yield from (Completion(name, -len(word)) for name in self._commands if word and name.startswith(word))


def line_reader(talk: Talk) -> Callable[[], str]:
    """Reads lines with editing, completion and a lasting history; plain lines if the input is no terminal."""
    if not sys.stdin.isatty():
        return input
    path = cache_root() / "chat_history"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    prompt: PromptSession[str] = PromptSession(
        history=FileHistory(str(path)), completer=_Completer(talk.commands()), complete_while_typing=False
    )
    return lambda: prompt.prompt(f"[{len(talk.waiting)} picture(s)] > " if talk.waiting else "> ")


def chat_from_flags(flags: argparse.Namespace) -> None:
    """The command scripts/chat.py. Raises UserError for wrong flags."""
    names = ("temperature", "top_p", "max_new_tokens", "seed")
    sampling = Sampling(stop=tuple(flags.stop or ()), **{name: getattr(flags, name) for name in names})
    if flags.web:
        _web(flags)
        return
    images = [load_image(place) for place in flags.image or ()]
    model = ChatModel.load(flags.model, **model_options(flags))
    session = ChatSession(model, system=flags.system)
    if flags.prompt is not None:
        _answer_once(session, flags.prompt, images, sampling, stats=flags.stats)
        return
    room = "" if model.most_pictures is None else f", {model.most_pictures} pictures in a talk at most"
    print(f"{model.name}: {model.layout} tokens for each picture, format {model.encoder.format.name}{room}. "
          "Drop a picture's file here and ask; /help lists the commands.")  # fmt: skip
    talk = Talk(session, sampling, stats=flags.stats)
    talk.waiting = images
    talk.run(line_reader(talk))


def _answer_once(
    session: ChatSession, prompt: str, images: Sequence[Picture], sampling: Sampling, *, stats: bool
) -> None:
    """Print one answer to stdout, and nothing else."""
    answer = session.ask(prompt, images, sampling)
    try:
        for piece in answer:
            print(printable(piece, None) if sys.stdout.isatty() else piece, end="", flush=True)
    except KeyboardInterrupt:
        raise Stopped("stopped", exit_code=130) from None
    finally:
        print(flush=True)
    if stats and session.last:
        print(stats_line(session.last), file=sys.stderr)


def _web(flags: argparse.Namespace) -> None:
    try:
        from mllm.chat.web import launch
    except ModuleNotFoundError as error:
        raise UserError(f"--web needs the package {error.name}: pip install 'clips-mllm[chat]'") from None
    others = flags.compare_with or []
    first = flags.model or (str(newest_model()) if others else None)
    names = [name for name in (first, *others) if name]
    launch(
        names,
        host=flags.host,
        port=flags.port,
        allowed_hosts=flags.allowed_hosts,
        pictures=flags.pictures,
        **model_options(flags),
    )
