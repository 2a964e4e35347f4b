"""The terminal's commands, dropped files, bad pictures, and one answer for a script."""

from pathlib import Path

import bad_corpus
import pytest
import tiny_chat
from conftest import script_parser
from PIL import Image
from serve_process import png
from tiny_chat import SHORT, turn_text

from clips.common.errors import UserError
from clips.data.images import MAX_BYTES
from mllm.chat.model import ChatModel
from mllm.chat.session import ChatSession
from mllm.chat.terminal import Talk, chat_from_flags, dropped_files, load_image

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
    quoted_home = f'"~/{odd.name}"'
    for line in (str(odd), f'"{odd}"', escaped, f"  {odd} ", odd.name, quoted_home, "./" + odd.name):
        (found,) = dropped_files(line)
        assert load_image(found).size == (8, 6), line
    Image.new("RGB", (2, 2)).save("b.png")
    assert dropped_files(f'{escaped} "b.png"') == [str(odd), "b.png"]
    Path("notes").write_text("", encoding="utf-8")
    texts = ["notes", "What is b.png", "it's b.png", "missing.png", "/help", "", "''", "/", "~", "a" * 10_000, "\0.png"]
    for line in texts:
        assert dropped_files(line) == [], line


def test_bad_pictures_are_one_line_each_and_the_talk_goes_on(talk: Talk, tmp_path: Path, capsys) -> None:
    files = {"text.png": b"hello", "empty.png": b"", "cut.png": png()[:45], "huge.png": bad_corpus.png(50_000, 50_000)}
    files["big.png"] = b"x" * (MAX_BYTES + 1)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for name in (*files, "missing.png", "."):
        say(talk, f"/image {tmp_path / name}")
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith(f"error: {tmp_path / name}: ")
    say(talk, "/image http://127.0.0.1:1/a.png", f"{tmp_path / 'text.png'}")
    assert [line[:6] for line in capsys.readouterr().out.splitlines()] == ["error:"] * 2
    assert talk.waiting == []
    say(talk, "Still there?")
    assert questions(talk) == ["Still there?"]


def test_a_model_cannot_steer_the_terminal(talk: Talk, capsys) -> None:
    talk.show(piece for piece in ["a\x1b[2Jb\x07", "c\x9b31md\n\te"])
    assert capsys.readouterr().out == "a\ufffd[2Jb\ufffdc\ufffd31md\n\te\n"


def test_one_answer_alone_on_stdout(model: ChatModel, place: Path, capsys) -> None:
    picture = str(place / "images" / "0.png")
    parser = script_parser("chat")
    common = ["--model", model.directory, "--device", "cpu", "--max-new-tokens", "8"]
    chat_from_flags(parser.parse_args([*common, "--prompt", "What is it?", "--image", picture, "--stats"]))
    printed = capsys.readouterr()
    expected = "".join(ChatSession(model).ask("What is it?", [load_image(picture)], SHORT))
    assert printed.out == expected + "\n"
    assert "cached" in printed.err
    with pytest.raises(UserError, match="tokens"):
        chat_from_flags(parser.parse_args([*common, "--prompt", "w " * 5000]))
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=r"missing\.png"):
        chat_from_flags(parser.parse_args([*common, "--prompt", "What?", "--image", "missing.png"]))
