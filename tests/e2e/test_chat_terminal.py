"""scripts/chat.py in a real pseudo-terminal, and for scripts."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
import test_chat
from conftest import ROOT, run_python

pytestmark = pytest.mark.slow
place = test_chat.place

TIMEOUT = 200  # seconds, for machines that are busy with something else
UP, LEFT, TAB, CTRL_C, CTRL_D = "\x1b[A", "\x1b[D", "\t", "\x03", "\x04"


@pytest.fixture
def terminal(place: Path, tmp_path: Path) -> Iterator:
    """Starts the command where the trained model is in runs/; keys go in, the screen comes out."""
    children = []

    def start(*flags: str) -> pexpect.spawn:
        child = pexpect.spawn(
            sys.executable,
            [str(ROOT / "scripts" / "chat.py"), "--device", "cpu", *flags],
            cwd=place,
            # The pseudo-terminal does not answer where its cursor is.
            env=os.environ | {"CLIPS_MLLM_CACHE": str(tmp_path), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"},
            encoding="utf-8",
            codec_errors="replace",
            dimensions=(40, 200),
            timeout=TIMEOUT,
        )
        children.append(child)
        child.expect("llava: 16 tokens for each picture, format auto")
        ready(child)
        return child

    yield start
    for child in children:
        child.close(force=True)


def ready(child: pexpect.spawn) -> str:
    """Wait for the prompt; returns what was shown before it."""
    child.expect(r"(\[\d picture\(s\)\] )?> (\x1b\[[\d;?]*[a-zA-Z])*$")
    return child.before


def ask(child: pexpect.spawn, line: str) -> str:
    child.send(line + "\r")
    child.expect("\r\n")  # the line itself
    return ready(child)


def talk_of(child: pexpect.spawn, path: Path) -> list[str]:
    """The texts of the talk, as /save writes them."""
    assert "written: " in ask(child, f"/save {path}")
    (record,) = json.loads(path.read_text())
    return [turn["value"] for turn in record["conversations"]]


def test_a_talk_in_a_terminal(terminal, place: Path, tmp_path: Path) -> None:
    picture = place / "images" / "0.png"
    child = terminal("--max-new-tokens", "8", "--stats")
    assert "picture 1: " in ask(child, f"'{picture}'")  # dropped
    assert "tokens at" in ask(child, "What is it?")
    shown = ask(child, "And two dogs?")
    cached = int(shown.split("of them ")[1].split()[0])
    assert cached > 16
    (tmp_path / "text.png").write_text("no picture")
    for wrong in ("text.png", "empty.png", "missing.png"):
        (tmp_path / "empty.png").write_bytes(b"")
        assert "error: " in ask(child, f"/image {tmp_path / wrong}")
    questions = ["<image>\nWhat is it?", "And two dogs?"]
    assert talk_of(child, tmp_path / "a.json")[::2] == questions
    assert "taken back: And two dogs?" in ask(child, "/undo")
    ask(child, "/retry")
    child.send("What cat")  # editing: put a word in
    child.send(LEFT * 3)
    ask(child, "red ")
    child.send("/sa" + TAB)  # completion
    child.expect("/save")
    ask(child, str(tmp_path / "b.json"))
    assert [turn["value"] for turn in json.loads((tmp_path / "b.json").read_text())[0]["conversations"]][::2] == [
        questions[0],
        "What red cat",
    ]
    child.send(CTRL_D)
    child.expect(pexpect.EOF)
    child.close()
    assert (child.exitstatus, child.signalstatus) == (0, None)

    child = terminal("--max-new-tokens", "8")  # the history outlives the program
    child.send(UP * 2)
    ask(child, "")
    assert talk_of(child, tmp_path / "c.json")[0] == "What red cat"
    child.sendline("/exit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_ctrl_c_stops_the_answer_not_the_program(terminal, tmp_path: Path) -> None:
    child = terminal("--max-new-tokens", "460")
    whole = ask(child, "Tell a long story")
    begin = time.monotonic()
    ask(child, "/retry")
    seconds = time.monotonic() - begin
    child.send("/retry\r")
    child.expect("\r\n")
    time.sleep(seconds / 4)
    child.send(CTRL_C)
    shown = ready(child)
    assert "(stopped)" in shown
    assert len(shown) < len(whole)
    stopped = talk_of(child, tmp_path / "a.json")
    assert len(stopped) == 2
    child.send("half a line" + CTRL_C)  # drops the line
    assert "/exit leaves" in ready(child)
    ask(child, "/undo")
    assert len(ask(child, "Tell a long story")) > len(shown)
    child.send(CTRL_D)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_for_scripts(place: Path, tmp_path: Path) -> None:
    """stdout has the answer alone; a killed batch goes on; mistakes end with 2 and no traceback."""
    script, model = ROOT / "scripts" / "chat.py", ["--device", "cpu", "--max-new-tokens", "8"]
    picture = place / "images" / "0.png"
    once = run_python(script, *model, "--prompt", "What is it?", "--image-file", picture, cwd=place)
    assert once.returncode == 0, once.stderr
    assert once.stdout.endswith("\n")
    assert once.stdout.strip()
    lines = [{"question_id": i, "text": "What is it?", "image": "0.png"} for i in range(3)]
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    batch = [*model, "--input", questions, "--output", answers, "--image-folder", place / "images"]
    done = run_python(script, *batch, cwd=place)
    assert done.returncode == 0, done.stderr
    texts = [json.loads(line)["text"] for line in answers.read_text().splitlines()]
    assert texts == [once.stdout.removesuffix("\n")] * 3
    for wrong, reason in [
        (["--prompt", "Hi", "--image-file", "gone.png"], "gone.png: there is no such file"),
        (["--prompt", "Hi", "--model-path", "nowhere"], "there is no directory nowhere"),
        (["--prompt", "Hi", "--max-new-tokens", "-3"], "max_new_tokens must be"),
    ]:
        failed = run_python(script, *model, *wrong, cwd=place)
        assert failed.returncode == 2
        assert reason in failed.stderr
        assert "Traceback" not in failed.stderr
        assert failed.stdout == ""


def test_a_stopped_batch_goes_on(place: Path, tmp_path: Path) -> None:
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    lines = [{"question_id": i, "text": f"What is {i}?", "image": f"{i % 4}.png"} for i in range(12)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--device", "cpu", "--max-new-tokens", "100", "--image-folder", "images"]
    flags = [str(ROOT / "scripts" / "chat.py"), *flags, "--input", str(questions), "--output", str(answers)]
    child = pexpect.spawn(sys.executable, flags, cwd=place, encoding="utf-8", timeout=TIMEOUT)
    while not answers.exists() or not answers.stat().st_size:
        time.sleep(0.02)
        assert child.isalive()
    child.kill(signal.SIGINT)
    child.expect("the same command goes on with the rest")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130
    first = answers.read_bytes()
    assert 0 < len(first.splitlines()) < 12
    answers.write_bytes(first + b'{"question_id": 11, "te')  # and one killed while it wrote
    done = run_python(*flags, cwd=place)
    assert done.returncode == 0, done.stderr
    assert answers.read_bytes().startswith(first)
    assert [json.loads(line)["question_id"] for line in answers.read_text().splitlines()] == list(range(12))
