"""scripts/chat.py in a real pseudo-terminal."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import pyte
import pytest
import tiny_chat
from conftest import ROOT
from tiny_mllm import write_export, write_llava_on

pytestmark = pytest.mark.slow

place = tiny_chat.place  # a fixture

TIMEOUT = 200  # seconds, for machines that are busy with something else
UP, LEFT, TAB, CTRL_C, CTRL_D = "\x1b[A", "\x1b[D", "\t", "\x03", "\x04"


class Terminal:
    """The command in a pseudo-terminal with a real terminal's screen: keys go in, what a person sees comes out."""

    def __init__(self, place: Path, cache: Path, *flags: str) -> None:
        self.child = pexpect.spawn(
            sys.executable,
            [str(ROOT / "scripts" / "chat.py"), "--device", "cpu", *flags],
            cwd=place,  # where the trained model is in runs/
            env=os.environ | {"CLIPS_MLLM_CACHE": str(cache), "TERM": "xterm"},
            encoding="utf-8",
            codec_errors="replace",
            dimensions=(60, 200),
        )
        self.screen = pyte.Screen(200, 60)
        self.screen.write_process_input = self.child.send  # a terminal answers where its cursor is
        self.stream = pyte.Stream(self.screen)
        self.ready()
        assert "llava: 16 tokens for each picture, format auto" in "\n".join(self.screen.display)

    def read(self) -> str:
        """What came since, at most for a moment; EOF is raised."""
        try:
            text = self.child.read_nonblocking(4096, timeout=0.1)
        except pexpect.TIMEOUT:
            return ""
        self.stream.feed(text)
        return text

    def line(self) -> str:
        """The line with the cursor, up to it."""
        return self.screen.display[self.screen.cursor.y][: self.screen.cursor.x]

    def wait(self, there: Callable[[str], Any]) -> str:
        """Read until the line with the cursor is as wanted; returns what came."""
        end, shown = time.monotonic() + TIMEOUT, ""
        while not there(self.line()):
            assert time.monotonic() < end, "\n".join(self.screen.display)
            shown += self.read()
        return shown

    def ready(self) -> str:
        return self.wait(re.compile(r"(\[\d picture\(s\)\] )?> ").fullmatch)

    def type(self, keys: str, shown: str | None = None) -> None:
        self.child.send(keys)
        self.wait(lambda line: line.endswith(keys if shown is None else shown))

    def ask(self, text: str) -> str:
        """Type a line and wait for the next prompt; returns what came between."""
        self.type(text)
        self.child.send("\r")
        return self.ready()

    def leave(self, keys: str) -> int:
        """The exit code."""
        self.child.send(keys)
        self.child.expect(pexpect.EOF, timeout=TIMEOUT)
        self.child.close()
        return self.child.exitstatus


@pytest.fixture
def terminal(place: Path, tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    started = []

    def start(*flags: str) -> Terminal:
        started.append(Terminal(place, tmp_path, *flags))
        return started[-1]

    yield start
    for one in started:
        if one.child.isalive():
            one.child.kill(signal.SIGKILL)
            one.child.wait()


def talk_of(chat: Terminal, path: Path) -> list[str]:
    """The texts of the talk, as /save writes them."""
    assert "written: " in chat.ask(f"/save {path}")
    (record,) = json.loads(path.read_text(encoding="utf-8"))
    return [turn["value"] for turn in record["conversations"]]


def test_a_talk_in_a_terminal(terminal: Callable[..., Terminal], place: Path, tmp_path: Path) -> None:
    picture = place / "images" / "0.png"
    chat = terminal("--max-new-tokens", "8", "--stats")
    assert "picture 1: " in chat.ask(f"'{picture}'")  # dropped
    assert chat.line() == "[1 picture(s)] > "
    assert "tokens at" in chat.ask("What is it?")
    cached = int(chat.ask("And two dogs?").split("of them ")[1].split()[0])
    assert cached > 16
    assert "error: " in chat.ask(f"/image {tmp_path / 'missing.png'}")
    questions = ["<image>\nWhat is it?", "And two dogs?"]
    assert talk_of(chat, tmp_path / "a.json")[::2] == questions
    chat.type("What cat")
    chat.type(LEFT * 3, "What ")  # editing: put a word in
    chat.ask("red ")
    (tmp_path / "folder").mkdir()
    chat.type(f"/save {tmp_path}/fo" + TAB, f"{tmp_path}/folder")  # completion
    chat.ask("/b.json")
    (record,) = json.loads((tmp_path / "folder" / "b.json").read_text())
    assert [turn["value"] for turn in record["conversations"]][::2] == [*questions, "What red cat"]
    assert chat.leave(CTRL_D) == 0

    # The history outlives the program. Ctrl-C stops the answer of a slow model, not the program.
    write_export(tmp_path / "runs" / "demo")
    slow = write_llava_on(
        tmp_path / "runs" / "llava", tmp_path / "runs" / "demo", num_hidden_layers=12, max_position_embeddings=2048
    )
    chat = terminal("--max-new-tokens", "250", "--model", str(slow))
    chat.type(UP, f"/save {tmp_path / 'folder' / 'b.json'}")
    chat.type(UP, "What red cat")
    chat.child.send("\r")
    whole = chat.ready()
    assert len(whole) > 200
    assert talk_of(chat, tmp_path / "c.json")[0] == "What red cat"
    chat.ask("/reset")
    chat.type("What red cat")
    chat.child.send("\r")
    shown = chat.wait(lambda line: line and not line.startswith(">"))  # some of the answer
    chat.child.send(CTRL_C)
    shown += chat.ready()
    assert "(stopped)" in shown
    assert len(shown) < len(whole)
    assert len(talk_of(chat, tmp_path / "d.json")) == 2
    chat.type("half a line")
    chat.child.send(CTRL_C)  # drops the line
    assert "/quit leaves" in chat.ready()
    assert chat.leave("/quit\r") == 0
