"""A real HTTP server for files of a folder: ranges, tags, counts, and the ways in which servers fail."""

import contextlib
import gzip
import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Fault = Callable[[str, str, int], str | int | None]
"""(method, file's name, how often that was asked for before) → a status, "cut", "slow", or None: answer.

Or an attack: "endless", "packed", "drip" or "silent"."""


class RangeServer(ThreadingHTTPServer):
    """`sent` counts the bytes of bodies by file, `asked` the requests by (method, file)."""

    daemon_threads = True

    def __init__(self, root: Path, *, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.ranges = root, ranges
        self.sent: Counter[str] = Counter()
        self.asked: Counter[tuple[str, str]] = Counter()
        self.fault: Fault = lambda method, name, before: None
        self.guard = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RangeServer

    def log_message(self, *_: object) -> None:
        """Nothing: tests look at the counts."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        server, name = self.server, self.path.lstrip("/")
        with server.guard:
            before = server.asked[self.command, name]
            server.asked[self.command, name] += 1
        fault = server.fault(self.command, name, before)
        if fault == "silent":
            return time.sleep(3)
        if fault in ("endless", "packed", "drip") and body:
            return self._attack(fault)
        path = server.root / name
        if isinstance(fault, int) or not path.is_file():
            self.send_response(fault if isinstance(fault, int) else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        tag, size = hashlib.sha256(data).hexdigest()[:16], len(data)
        requested = self.headers.get("Range", "").removeprefix("bytes=")
        if requested and server.ranges:
            start, stop = requested.split("-")
            data = data[int(start) : int(stop) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{tag}"')
        self.end_headers()
        if not body:
            return
        if fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        for begin in range(0, len(data), 1 << 14):
            if fault == "slow":
                time.sleep(0.05)
            self.wfile.write(data[begin : begin + (1 << 14)])
        with server.guard:
            server.sent[name] += len(data)

    def _attack(self, fault: str) -> None:
        """Zeros without end, a gigabyte of them in a gzip of a megabyte, or one now and then."""
        self.send_response(206)
        if fault == "packed":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        self.close_connection = True
        piece = gzip.compress(bytes(1 << 24)) if fault == "packed" else bytes(1 if fault == "drip" else 1 << 16)
        with contextlib.suppress(OSError):  # the reader has left
            for _ in range(1 << 16):
                self.wfile.write(piece)
                self.server.sent[fault] += len(piece)
                time.sleep(0.02 if fault == "drip" else 0)


@contextlib.contextmanager
def serving(root: Path, *, ranges: bool = True) -> Iterator[RangeServer]:
    server = RangeServer(root, ranges=ranges)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
