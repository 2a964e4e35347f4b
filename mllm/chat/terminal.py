"""The chat in a terminal: a conversation with commands, or a single answer for a script."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress

from clips import ENDINGS, MAX_BYTES, MAX_PIXELS
from clips.common.errors import Stopped, UserError, reason
from clips.common.escape import printable
from clips.common.live import say
from mllm.chat.limits import Limits
from mllm.chat.model import ChatModel, Sampling, model_options
from mllm.chat.session import ChatSession
from mllm.chat.transcript import LazyImage, Video, open_visual, size_of
from mllm.data.video import ENDINGS as VIDEO_ENDINGS
from mllm.data.video import MAX_BYTES as MAX_VIDEO_BYTES
from mllm.data.video import is_video

OWN_IMAGES = Limits(image_bytes=MAX_BYTES, image_pixels=MAX_PIXELS)
"""Limits for images that the user opens by path."""
COMMANDS = """\
  /image PATH       add an image or a video to the next question (or drop its file here)
  /reset            start a new conversation
  /quit             leave, as Ctrl-D does; Ctrl-C stops an answer"""


def load_image(path: str) -> LazyImage | Video:
    """Read an image or, by its file name, a video. Raises UserError with the reason if that fails."""
    try:
        with open(os.path.expanduser(path), "rb") as file:
            return open_visual(file.read((MAX_VIDEO_BYTES if is_video(path) else MAX_BYTES) + 1), path, OWN_IMAGES)
    except (UserError, OSError) as error:
        raise UserError(f"{path}: {reason(error)}") from None


def dropped_files(line: str) -> list[str]:
    """Return the paths of the images and videos in `line`, or [] if it holds anything else or if a file is missing.

    Terminals may quote the path of a dropped file. A `~` in a path is kept.
    """
    try:
        words = shlex.split(line)
    except ValueError:  # an unpaired quotation mark
        words = []
    for paths in ([line.strip()], words):
        files = [path for path in paths if os.path.isfile(os.path.expanduser(path))]
        if files == paths != [] and all(path.lower().endswith((*ENDINGS, *VIDEO_ENDINGS)) for path in paths):
            return paths
    return []


class Talk:
    """A conversation that reads one line at a time."""

    def __init__(self, session: ChatSession, sampling: Sampling) -> None:
        self.session = session
        self.sampling = sampling
        self.waiting: list[LazyImage | Video] = []
        """Images and videos for the next question."""

    def run(self, read: Callable[[], str]) -> None:
        """Handle lines from `read` until EOFError. A UserError prints one line, and Ctrl-C stops only the answer."""
        while True:
            try:
                if not self.handle(read()):
                    return
            except EOFError:
                return
            except KeyboardInterrupt:
                print("(Ctrl-D or /quit leaves)")
            except UserError as error:
                print(f"error: {error}")

    def handle(self, line: str) -> bool:
        """Handle one line. Return False if it ends the conversation."""
        line = line.strip()
        files = dropped_files(line)
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if files:
            self.attach(files)
        elif command == "/quit":
            return False
        elif command == "/image" and rest:
            self.attach(dropped_files(rest) or [rest])
        elif command == "/reset":
            self.session.keep(0)
            self.waiting = []
            print("new conversation")
        elif command.startswith("/"):
            print(f"{line} is neither a command nor a file\n{COMMANDS}")
        elif line or self.waiting:
            self.show(self.session.ask(line, self.waiting, self.sampling))
        return True

    def attach(self, paths: Sequence[str]) -> None:
        """Add images and videos to the next question. Raises UserError for a video if the model takes no videos."""
        for path in paths:
            image = load_image(path)
            self.session.model.image_tokens([image])
            self.waiting.append(image)
            number = len(self.session.images) + len(self.waiting)
            height, width = size_of(image)
            what = "a video" if isinstance(image, Video) else f"{width} × {height}"
            print(f"image {number}: {path} ({what}) goes with your next question")

    def show(self, answer: Generator[str, None, None]) -> None:
        """Print an answer while it is generated; Ctrl-C ends it."""
        try:
            with closing(answer):
                for piece in answer:  # a model may write escape sequences
                    print(printable(piece, None), end="", flush=True)
            print(_cut_off(self.session), end="")
        except KeyboardInterrupt:
            print(" (stopped)", end="")
        print()
        self.waiting = []


def chat_from_flags(flags: argparse.Namespace) -> None:
    """Run scripts/chat.py. Raises UserError for wrong flags."""
    names = ("temperature", "top_p", "max_new_tokens", "seed")
    sampling = Sampling(stop=tuple(flags.stop or ()), **{name: getattr(flags, name) for name in names})
    if flags.web:
        unused = [name for name in ("prompt", "image", "system", "stop") if getattr(flags, name) is not None]
        if unused:
            raise UserError(f"--{unused[0]} is not for --web, whose page has its own controls: leave it out")
        try:
            from mllm.chat.web import launch
        except ModuleNotFoundError as error:
            raise UserError(f"--web needs the package {error.name}: pip install 'clips-mllm[chat]'") from None
        launch(flags.model, port=flags.port, **model_options(flags))
        return
    if flags.prompt is None and sys.stdin is None:
        raise UserError("there is no input to read questions from: ask one with --prompt")

    images = [load_image(path) for path in flags.image or ()]
    session = ChatSession(ChatModel.load(flags.model, **model_options(flags)), system=flags.system)
    if flags.prompt is not None:
        _answer_once(session.ask(flags.prompt, images, sampling))
        if remark := _cut_off(session):
            say(f"The answer is not whole:{remark}")
        return
    model = session.model
    room = "" if model.context_length is None else f", a context of {model.context_length:,}"
    print(f"{model.name}: {model.layout} tokens for each image, format {model.encoder.format.name}{room}."
          f"{model.scope} Drop an image file here and ask. Commands:\n{COMMANDS}")  # fmt: skip
    talk = Talk(session, sampling)
    talk.waiting = images
    with suppress(ImportError):
        import readline  # noqa: F401 - lets `input` edit lines and recall earlier ones
    talk.run(lambda: input("> " if sys.stdin.isatty() else ""))


def _cut_off(session: ChatSession) -> str:
    """Return a remark about the last answer if a limit cut it off, else ""."""
    remark = session.last.cut_off if session.last else ""
    return f" ({remark}: --max-new-tokens sets the limit)" if remark else ""


def _answer_once(answer: Generator[str, None, None]) -> None:
    """Print one answer to stdout, and nothing else."""
    try:
        for piece in answer:
            print(printable(piece, None) if sys.stdout.isatty() else piece, end="", flush=True)
        print(flush=True)
    except KeyboardInterrupt:
        raise Stopped("stopped", exit_code=130) from None
