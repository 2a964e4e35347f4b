"""What strangers may send: names of the host, uploads, pictures that are none or too large, addresses to fetch from."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest
from conftest import script_parser
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from tiny_serve import png

from clips.common.errors import UserError
from clips.common.flags import from_flags
from mllm.chat import limits as module
from mllm.chat.hosts import HostMiddleware
from mllm.chat.limits import Limits, fetch_image, is_public, read_image
from mllm.chat.web import QUESTION_BYTES, BodyLimit

LIMITS = Limits()


def test_flags_carry_every_limit() -> None:
    parser = script_parser("serve")
    assert from_flags(Limits, parser.parse_args([]), "max_") == LIMITS
    flags = parser.parse_args(["--max-image-bytes", "7", "--max-seconds", "1.5", "--max-waiting", "0"])
    assert from_flags(Limits, flags, "max_") == Limits(image_bytes=7, seconds=1.5, waiting=0)


@pytest.mark.parametrize(("field", "value"), [("images", 0), ("seconds", float("nan")), ("waiting", -1)])
def test_a_limit_that_allows_nothing_is_refused(field: str, value: float) -> None:
    with pytest.raises(UserError, match=f"--max-{field}"):
        Limits(**{field: value})


def test_a_picture_above_the_limits_is_refused() -> None:
    """`BAD` of tests/tiny_serve.py has the data that are no picture."""
    with pytest.raises(UserError, match="limit is 20"):
        read_image(png(), Limits(image_bytes=20))
    with pytest.raises(UserError, match="40 × 28 pixels are above the limit of 1119"):
        read_image(png(), Limits(image_pixels=1119))


# ------------------------------------------------------------------------------------------------ from an address


def test_public_addresses() -> None:
    public = ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "2002:808:808::1"]
    private = [
        *("0.0.0.0", "127.0.0.1", "127.8.8.8", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "192.0.2.1", "224.0.0.1", "255.255.255.255"),
        *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "ff02::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::1", "2002:a00:1::1"),  # IPv4 in IPv6
        *("64:ff9b::7f00:1", "64:ff9b::a00:1", "2001:0:4136:e378:8000:63bf:3fff:fdd2"),
    ]
    assert [address for address in (*public, *private) if is_public(address)] == public


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "localhost", "0.0.0.0"),
        *("169.254.169.254", "10.0.0.1", "[::1]", "[::ffff:127.0.0.1]"),
    ],
)
def test_private_addresses_are_not_fetched_from(host: str, server: Server) -> None:
    with pytest.raises(UserError, match=r"public addresses only|cannot be read"):
        fetch_image(f"http://{host}:{server.port}/picture", LIMITS)
    assert server.seen == []


def test_other_schemes_and_broken_addresses_are_refused() -> None:
    for url in ("file:///etc/hostname", "ftp://8.8.8.8/x", "gopher://x", "/etc/hostname", "http://"):
        with pytest.raises(UserError, match="http:// and https:// addresses only"):
            fetch_image(url, LIMITS)
    for url in ("http://[::1", "http://a b/", "http://" + "a" * 300 + ".example/"):
        with pytest.raises(UserError, match="cannot be read"):
            fetch_image(url, LIMITS)


class Server(ThreadingHTTPServer):
    """Answers on every loopback address; `seen` are the (address, path, Host header) that were asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("0.0.0.0", 0), Handler)
        self.port = self.server_address[1]
        self.seen: list[tuple[str, str, str]] = []
        self.release = threading.Event()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        server: Server = self.server  # type: ignore[assignment]
        server.seen.append((self.connection.getsockname()[0], self.path, self.headers["Host"]))
        to = {"/inside": f"http://127.0.0.2:{server.port}/picture", "/near": "picture", "/round": "/round"}
        if self.path in to:
            self.send_response(302)
            self.send_header("Location", to[self.path])
            self.end_headers()
        elif self.path == "/missing":
            self.send_error(404)
        elif self.path == "/slow":
            server.release.wait(20)
        else:
            self.send_response(200)
            self.end_headers()  # without a length: the limit must hold while reading
            self.wfile.write(png() + b"\0" * 100_000 * (self.path == "/large"))


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def open_server(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The same, with 127.0.0.1 standing for a public address; 127.0.0.2 stays private."""
    monkeypatch.setattr(module, "is_public", lambda address: address == "127.0.0.1")
    return server


def test_a_public_picture_is_fetched_also_by_a_redirect_and_never_by_a_proxy(
    open_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.2:9")
    assert fetch_image(f"http://127.0.0.1:{open_server.port}/near", LIMITS) == png()
    assert [path for _, path, _ in open_server.seen] == ["/near", "/picture"]


def test_a_redirect_to_a_private_address_is_not_followed(open_server: Server) -> None:
    with pytest.raises(UserError, match="public addresses only"):
        fetch_image(f"http://127.0.0.1:{open_server.port}/inside", LIMITS)
    assert [path for _, path, _ in open_server.seen] == ["/inside"]


def test_a_name_is_resolved_once_and_all_its_addresses_are_checked(
    open_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name server may give a private address beside a public one, or at the second time (rebinding)."""
    answers = [["127.0.0.1"], ["127.0.0.1", "10.0.0.1"]]

    async def getaddrinfo(self: object, host: str, port: int, **_: object) -> list:
        return [(None, None, None, "", (address, port)) for address in answers.pop(0)]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    url = f"http://pictures.example:{open_server.port}/picture"
    assert fetch_image(url, LIMITS) == png()
    assert open_server.seen == [("127.0.0.1", "/picture", f"pictures.example:{open_server.port}")]
    with pytest.raises(UserError, match="public addresses only"):
        fetch_image(url, LIMITS)
    assert len(open_server.seen) == 1


def test_a_fetch_that_fails_says_why(open_server: Server) -> None:
    limits = Limits(image_bytes=50_000, fetch_seconds=1)
    reasons = {
        "missing": "status 404",
        "round": "redirects more than 3",
        "large": "50,000 bytes",
        "slow": "within 1 s",
    }
    for path, message in reasons.items():
        with pytest.raises(UserError, match=message):
            fetch_image(f"http://127.0.0.1:{open_server.port}/{path}", limits)


# ---------------------------------------------------------------------------------------------- names and uploads


async def upload(request: Request) -> PlainTextResponse:
    await asyncio.sleep(0.05)  # as a file that is written
    return PlainTextResponse(str(len(await request.body())))


PLACES = ("/gradio_api/upload", "/gradio_api/queue/join")
ROUTES = [Route(place, upload, methods=["POST", "GET"]) for place in PLACES]
APP = Starlette(routes=ROUTES)


def bounded(folder: Path, **limits: float) -> Starlette:
    """With BodyLimit where gradio has it, behind the middleware that answers 500."""
    middleware = [Middleware(BodyLimit, folder=folder, limits=Limits(**limits))]
    return Starlette(routes=ROUTES, middleware=middleware)


def answers(app: object, *requests: dict) -> list[int]:
    """The status of each of `requests`, sent at once."""

    async def main() -> list[int]:
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", trust_env=False) as client:
            sent = (client.request(**{"method": "POST", "url": "/gradio_api/upload"} | one) for one in requests)
            return [response.status_code for response in await asyncio.gather(*sent)]

    return asyncio.run(main())


def test_names_of_this_machine_alone_are_answered() -> None:
    """DNS rebinding: the browser sends the name that it was given."""
    app = HostMiddleware(APP, allowed=["Page.example."])

    def statuses(header: str, values: list[str], to: object = app) -> set[int]:
        return set(answers(to, *({"headers": {header: value}} for value in values)))

    own = ["localhost:7860", "localhost.", "127.0.0.1", "[::1]:7860", "192.0.2.7", "page.example", "PAGE.example:8"]
    assert statuses("Host", own) == {200}
    others = [
        "evil.example",
        "evil.example:7860",
        "127.0.0.1.evil.example",
        "page.example.evil",
        "localhost.evil",
        "[::1",
    ]
    assert statuses("Host", others) == {403}
    assert statuses("Origin", ["http://localhost", "https://page.example"]) == {200}
    assert statuses("Origin", ["http://localhost:9", "null", "http://evil.example"]) == {403}
    everybody = HostMiddleware(APP, allowed=["*"])
    assert statuses("Host", others, everybody) == statuses("Origin", ["app://desktop"], everybody) == {200}


def test_uploads_have_a_total(tmp_path: Path) -> None:
    (tmp_path / "of_a_visitor").mkdir()
    (tmp_path / "of_a_visitor" / "a.png").write_bytes(b"x" * 600)
    app = bounded(tmp_path, upload_bytes=1000, body_bytes=900)
    assert answers(app, {"content": b"y" * 400}, {"method": "GET"}) == [200, 200]
    assert answers(app, {"content": b"y" * 401}) == [413]

    async def slow() -> AsyncIterator[bytes]:
        yield b"y" * 300
        await asyncio.sleep(0.1)

    both = [{"content": slow(), "headers": {"Content-Length": "300"}} for _ in range(2)]
    assert sorted(answers(app, *both)) == [200, 413]
    assert answers(app, {"content": b"y" * 400}) == [200]  # what was refused takes no room

    async def endless() -> None:
        yield b"y"

    assert answers(app, {"content": endless()}) == [411]
    question = {"url": "/gradio_api/queue/join"}
    assert answers(app, question | {"content": b"y" * QUESTION_BYTES}) == [200]
    assert answers(app, question | {"content": b"y" * (QUESTION_BYTES + 1)}) == [413]


def test_an_upload_that_drips_locks_nobody_out(tmp_path: Path) -> None:
    """It claims the whole allowance. Only what came counts, and its time ends."""
    app = bounded(tmp_path, upload_bytes=1000, body_bytes=1000, body_seconds=1)

    async def drip() -> AsyncIterator[bytes]:
        while True:
            yield b"y"
            await asyncio.sleep(0.2)

    dripping = {"content": drip(), "headers": {"Content-Length": "1000"}}
    assert answers(app, dripping, {"content": b"y" * 900}) == [408, 200]
