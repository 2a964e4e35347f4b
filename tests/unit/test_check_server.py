"""tools/check_server.py against servers that answer otherwise than OpenAI's API."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from clips.common.errors import CommandError, UserError, run_command
from tools.check_server import check, parser

ESCAPE = "\x1b]0;owned\x07"


@contextmanager
def serving(answer: bytes, *headers: tuple[str, str]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            for header in headers:
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"question_id": 0, "prompt": "Which?", "text": "A cat."}), encoding="utf-8")
    return file


def run(answers: Path, url: str, *words: str) -> None:
    check(parser().parse_args([str(answers), "--url", url, "--model", f"m{ESCAPE}", *words]))


@pytest.mark.parametrize(
    "answer",
    [b"", b"[" * 100_000, b'{"choices": [{"message": {"content": [1]}}]}', b"\xff\xfe"],
    ids=range(4),
)
def test_a_malformed_answer_is_told(answer: bytes, answers: Path) -> None:
    with serving(answer) as url, pytest.raises(UserError, match="answer"):
        run(answers, url)


def test_a_compressed_answer_is_not_unpacked(answers: Path) -> None:
    bomb = gzip.compress(b" " * 50_000_000)
    with serving(bomb, ("Content-Encoding", "gzip")) as url, pytest.raises(UserError, match="OpenAI"):
        run(answers, url)


def test_escape_codes_of_a_server_do_not_reach_the_terminal(answers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("A cat.", f"A dog.{ESCAPE}"):
        with serving(json.dumps({"choices": [{"message": {"content": text}}]}).encode()) as url:
            assert run_command(lambda url=url: run(answers, url)) == (0 if text == "A cat." else CommandError.exit_code)
        output = capsys.readouterr()
        assert "\x1b" not in output.out + output.err


def test_a_limit_leaves_at_least_one_answer(answers: Path) -> None:
    with pytest.raises(UserError, match="--limit"):
        run(answers, "http://127.0.0.1:9/v1", "--limit", "0")
