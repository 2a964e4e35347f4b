"""The terminal's commands, dropped files, bad pictures, and one answer for a script."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import pytest
import tiny_chat
from conftest import script_parser
from PIL import Image
from tiny_chat import SHORT
from tiny_serve import png, png_header

from clips.common.errors import UserError
from clips.data.images import MAX_BYTES
from mllm.chat.model import ChatModel, Sampling
from mllm.chat.session import ChatSession
from mllm.chat.terminal import Talk, chat_from_flags, dropped_files, load_image
from mllm.chat.transcript import turn_text

model, place = tiny_chat.model, tiny_chat.place  # fixtures


@pytest.fixture
def talk(model: ChatModel) -> Talk:
    return Talk(ChatSession(model), SHORT)


def say(talk: Talk, *lines: str) -> None:
    """Run the talk on these lines, as if typed, then Ctrl-D."""
    waiting = iter(lines)

    def read() -> str:
        line = next(waiting, None)
        if line is None:
            raise EOFError
        return line

    talk.run(read)


def questions(talk: Talk) -> list[str]:
    return [turn_text(turn) for turn in talk.session.turns[::2]]


# ---------------------------------------------------------------------------------------------- pictures


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A picture under a name that must be quoted or escaped."""
    path = tmp_path / "my red 'cat' (1).png"
    Image.new("RGB", (8, 6), "red").save(path)
    return path


def test_a_dropped_file_is_recognised_however_it_is_written(odd: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    escaped = str(odd)
    for character in " '()":
        escaped = escaped.replace(character, "\\" + character)
    for line in (str(odd), f'"{odd}"', escaped, odd.as_uri(), f"  {odd} ", odd.name, "~/" + odd.name, "./" + odd.name):
        (found,) = dropped_files(line)
        assert load_image(found).size == (8, 6), line
    Image.new("RGB", (2, 2)).save("b.png")
    assert dropped_files(f'{escaped} "b.png"') == [str(odd), "b.png"]
    Path("notes").write_text("", encoding="utf-8")
    texts = ["notes", "What is b.png", "it's b.png", "missing.png", "/help", "", "''", "/", "~", "a" * 10_000, "\0.png"]
    for line in texts:
        assert dropped_files(line) == [], line


def test_bad_pictures_are_one_line_each_and_the_talk_goes_on(talk: Talk, tmp_path: Path, capsys) -> None:
    files = {"text.png": b"hello", "empty.png": b"", "cut.png": png()[:45], "huge.png": png_header(50_000, 50_000)}
    files["big.png"] = b"x" * (MAX_BYTES + 1)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for name in (*files, "missing.png", "."):
        say(talk, f"/image {tmp_path / name}")
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith(f"error: {tmp_path / name}: ")
    say(talk, "/image", "/image http://127.0.0.1:1/a.png", "/image ftp://a/b.png", f"{tmp_path / 'text.png'}")
    printed = capsys.readouterr().out.splitlines()
    assert [line[:6] for line in printed] == ["error:"] * 4
    assert talk.waiting == []
    say(talk, "Still there?")
    assert questions(talk) == ["Still there?"]


# ---------------------------------------------------------------------------------------------- the talk


def test_a_talk_with_every_command(talk: Talk, odd: Path, tmp_path: Path, capsys) -> None:
    say(talk, f"/image {odd}", str(odd))
    assert len(talk.waiting) == 2
    assert "picture 2: " in capsys.readouterr().out
    say(talk, "/undo")
    assert talk.waiting == []
    say(talk, str(odd), "What is <image>?", shlex.quote(str(odd)), "And this?", "Why?")
    assert questions(talk) == ["What is <image>?", "And this?", "Why?"]
    assert len(talk.session.images) == 2
    capsys.readouterr()
    say(talk, "/undo", "/undo")
    assert capsys.readouterr().out == "taken back: Why?\ntaken back: And this?\n"
    assert len(talk.session.images) == 1
    first = turn_text(talk.session.turns[-1])
    say(talk, "/retry")
    assert len(capsys.readouterr().out) == len(first + "\n")
    assert turn_text(talk.session.turns[-1]) == first
    say(talk, "/retry 5")
    assert turn_text(talk.session.turns[-1]) != first
    assert talk.sampling.temperature == 0
    say(talk, "/system Be rude.")
    assert talk.session.system == "Be rude."
    say(talk, f"/save {tmp_path / 'talk.json'}")
    assert "What is <image>?" in (tmp_path / "talk.json").read_text()
    capsys.readouterr()
    say(talk, "/help")
    printed = capsys.readouterr().out
    for name in ("image", "retry", "undo", "reset", "system", "save", "help", "exit"):
        assert f"/{name} " in printed
    say(talk, "/system", "/reset", "", "   ")
    assert talk.session.turns == []
    assert talk.session.system is None
    say(talk, "/exit", "Never asked")
    assert talk.session.turns == []


def test_mistakes_are_one_line_each(talk: Talk, capsys) -> None:
    lines = ["/what", "/retry", "/retry hot", "/retry -1", "/undo", "/save", "/save talk.txt", "w " * 5000]
    say(talk, *lines)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(lines)
    assert all(line.startswith("error: ") for line in printed)
    assert "/help lists the commands" in printed[0]
    assert "/undo" in printed[-1]


def test_ctrl_c_stops_the_answer_only(talk: Talk, capsys, monkeypatch) -> None:
    talk.sampling = Sampling(max_new_tokens=400)
    pieces = []

    def interrupted_print(text: str = "", **options) -> None:
        pieces.append(text)
        if len(pieces) == 2:
            raise KeyboardInterrupt  # where Ctrl-C strikes most of the time

    with monkeypatch.context() as patch:
        patch.setattr("builtins.print", interrupted_print)
        say(talk, "What is it?")
    assert talk.session.last.finish_reason == "cancelled"
    assert talk.session.last.new_tokens < 400
    talk.sampling = SHORT
    talk.stats = True
    say(talk, "And now?")
    assert questions(talk) == ["What is it?", "And now?"]
    assert "tokens at" in capsys.readouterr().out

    def pressed() -> str:
        if not hints:
            hints.append(1)
            raise KeyboardInterrupt
        raise EOFError

    hints: list[int] = []
    talk.run(pressed)
    assert "/exit leaves" in capsys.readouterr().out


def test_a_model_cannot_steer_the_terminal(talk: Talk, capsys) -> None:
    talk.show(piece for piece in ["a\x1b[2Jb\x07", "c\x9b31md\n\te"])
    assert capsys.readouterr().out == "a\ufffd[2Jb\ufffdc\ufffd31md\n\te\n"


# ---------------------------------------------------------------------------------------------- the command


def flags(*arguments: str) -> argparse.Namespace:
    return script_parser("chat").parse_args(arguments)


def test_one_answer_alone_on_stdout(model: ChatModel, place: Path, capsys) -> None:
    picture = str(place / "images" / "0.png")
    common = ["--model", model.directory, "--device", "cpu", "--max-new-tokens", "8"]
    chat_from_flags(flags(*common, "--prompt", "What is it?", "--image", picture, "--stats"))
    printed = capsys.readouterr()
    expected = "".join(ChatSession(model).ask("What is it?", [load_image(picture)], SHORT))
    assert printed.out == expected + "\n"
    assert "cached" in printed.err
    with pytest.raises(UserError, match="the talk takes"):
        chat_from_flags(flags(*common, "--prompt", "w " * 5000))
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="temperature must be"):
        chat_from_flags(flags(*common, "--prompt", "What?", "--temperature", "-1"))
    with pytest.raises(UserError, match=r"missing\.png: there is no such file"):
        chat_from_flags(flags(*common, "--prompt", "What?", "--image", "missing.png"))
    with pytest.raises(UserError, match="format 'mine' is not known"):
        chat_from_flags(flags(*common, "--prompt", "What?", "--conv-mode", "mine"))
