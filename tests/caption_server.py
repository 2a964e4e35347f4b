"""Pairs as img2dataset leaves them, and a small OpenAI-style server that captions them as a test says."""

import contextlib
import json
import threading
from collections.abc import Callable, Collection, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from launched import make_images, write_shard


def write_pairs(path: Path, count: int, broken: Collection[int] = ()) -> str:
    samples = []
    for i, (image, web, _) in enumerate(make_images(count)):
        texts = {"txt": web.encode(), "json": json.dumps({"caption": web}).encode()}
        samples.append((b"no image" if i in broken else image, texts))
    return str(write_shard(path, samples))


def echo(text: str) -> str:
    """A caption that depends on the web caption, the last line of the prompt, from its first letters on."""
    caption = text.splitlines()[-1]
    letters = "".join(chr(ord("a") + int(digit)) for digit in caption if digit.isdigit())
    return f"{letters}: an image of {caption}."


@contextlib.contextmanager
def serving(answer: Callable[[str], str | dict | int | None] = echo, keys: list[str] | None = None) -> Iterator[str]:
    """The server's address. `answer` gives a caption, a choice, the status of half a JSON, or None to hang up.

    The keys that are sent with the question for its models go to `keys`.
    """
    keys = [] if keys is None else keys

    class Handler(BaseHTTPRequestHandler):
        def reply(self, content: bytes, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if content[:1] == b"<" else "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            keys.append(self.headers["Authorization"])
            self.reply(b'{"data": [{"id": "tiny"}]}' if self.path == "/v1/models" else b"<title>Welcome</title>")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            made = answer(body["messages"][0]["content"][1]["text"])
            if isinstance(made, str | dict):
                choice = {"message": {"role": "assistant", "content": made}, "finish_reason": "stop"}
                choice = made if isinstance(made, dict) else choice
                self.reply(json.dumps({"choices": [choice]}).encode())
            elif made:
                self.reply(b'{"choices": [', made)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
