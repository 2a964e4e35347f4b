"""A small OpenAI-style server that misbehaves on demand, for tests of the endpoint captioner."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Deed = tuple[str, Any]
"""A method of `_Handler` without its underscore, and its argument."""


def echo(number: int, body: dict) -> Deed:
    """The caption is the last line of the prompt, which has the web caption."""
    return "say", asked_text(body).splitlines()[-1]


def asked_text(body: dict) -> str:
    return body["messages"][0]["content"][1]["text"]


class BadEndpoint:
    """Each POST is answered by what `decide(number, body)` says; everything that came is kept."""

    def __init__(self, decide: Callable[[int, dict], Deed], port: int = 0) -> None:
        self.decide = decide
        self.asked: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.open = self.most_open = 0
        self.lock, self.closing = threading.Lock(), threading.Event()
        endpoint = self

        class Handler(_Handler):
            server_of = endpoint

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


@contextlib.contextmanager
def endpoint(decide: Callable[[int, dict], Deed] = echo, port: int = 0) -> Iterator[BadEndpoint]:
    served = BadEndpoint(decide, port)
    try:
        yield served
    finally:
        served.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: BadEndpoint

    def log_message(self, *words: object) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, json.dumps({"object": "list", "data": [{"id": "tiny"}, {"id": "other"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        served = self.server_of
        with served.lock:
            number = len(served.asked)
            served.asked.append(body)
            served.headers.append(dict(self.headers))
            served.open += 1
            served.most_open = max(served.most_open, served.open)
        try:
            deed, what = served.decide(number, body)
            with contextlib.suppress(OSError):  # whoever asked has left
                getattr(self, f"_{deed}")(what)
        finally:
            with served.lock:
                served.open -= 1

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def _say(self, text: Any, reason: str = "stop") -> None:
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        usage = {"prompt_tokens": 9, "completion_tokens": 7}
        self._send(200, json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage}).encode())

    def _ended(self, what: tuple[str, str]) -> None:
        self._say(*what)

    def _status(self, status: int) -> None:
        self._send(status, b'{"error": {"message": "no"}}')

    def _busy(self, retry_after: str) -> None:
        self._send(429, b"{}", Retry_After=retry_after)

    def _raw(self, content: bytes) -> None:
        self._send(200, content)

    def _packed(self, content: bytes) -> None:
        self._send(200, content, Content_Encoding="gzip")

    def _half(self, content: bytes) -> None:
        """A length is promised, and the connection closed before."""
        self.send_response(200)
        self.send_header("Content-Length", str(2 * len(content)))
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = True

    def _never(self, _: Any) -> None:
        self.server_of.closing.wait(60)
        self.close_connection = True

    def _drip(self, _: Any) -> None:
        """A byte now and then, for ever."""
        self.send_response(200)
        self.end_headers()
        while not self.server_of.closing.wait(0.05):
            self.wfile.write(b" ")
            self.wfile.flush()

    def _endless(self, _: Any) -> None:
        self.send_response(200)
        self.end_headers()
        while not self.server_of.closing.is_set():
            self.wfile.write(b" " * 65_536)

    def _hang_up(self, _: Any) -> None:
        self.close_connection = True

    def _slowly(self, what: tuple[float, str]) -> None:
        time.sleep(what[0])
        self._say(what[1])
