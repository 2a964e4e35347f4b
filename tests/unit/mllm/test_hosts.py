"""The page answers names of this machine and its own pages, and bounds uploads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from mllm.chat.hosts import HostMiddleware
from mllm.chat.limits import Limits
from mllm.chat.web import QUESTION_BYTES, BodyLimit


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
