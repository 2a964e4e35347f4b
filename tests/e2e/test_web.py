"""The page of `scripts/chat.py --web` in a real headless Chromium, on tiny untrained models."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
import pytest
import serve_process
from conftest import ROOT
from tiny_mllm import make_image, write_export, write_llava_on

from clips.common.runtime import unused_port
from tools.make_images import find_chromium

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.slow

PATIENCE_S = 240
wait_until = partial(serve_process.wait_until, seconds=PATIENCE_S)
BROWSER = find_chromium()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("web")
    write_export(root / "runs" / "demo")
    write_llava_on(root / "runs" / "llava-clips", root / "runs" / "demo", max_position_embeddings=2048)
    images = root / "data" / "llava_demo" / "images"
    images.mkdir(parents=True)
    make_image(60, 60).save(images / "unseen-0.png")
    question = {"question_id": 0, "image": "unseen-0.png", "text": "What?", "kind": "identity", "answer": "A dog."}
    (images.parent / "question.jsonl").write_text(json.dumps(question))
    make_image().save(root / "scene.png")
    (root / "text.png").write_bytes(b"not an image")
    (root / "uploads").mkdir()
    return root


@pytest.fixture(scope="module")
def address(place: Path) -> Iterator[str]:
    port, log = unused_port(), place / "log"
    with log.open("w+") as file:
        server = subprocess.Popen(
            [sys.executable, ROOT / "scripts" / "chat.py", "--web", "--port", str(port), "--device", "cpu"],
            cwd=place, env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(place / "uploads")}, stdout=file,
            stderr=file,
        )  # fmt: skip
        try:
            wait_until(lambda: "The page is at" in log.read_text() or server.poll() is not None)
            assert server.poll() is None, log.read_text()
            yield f"http://127.0.0.1:{port}"
            server.send_signal(signal.SIGINT)
            assert server.wait(PATIENCE_S) == 0, log.read_text()
            assert "Traceback" not in log.read_text()
            assert not list((place / "uploads").glob("clips-mllm-web-*")), "uploads are left behind"
        finally:
            server.kill()
            server.wait()


@pytest.fixture
def page(address: str) -> Iterator[Page]:
    """A tab of the page; its browser asked no other site, and met no error."""
    if BROWSER is None or importlib.util.find_spec("playwright") is None:
        pytest.skip("NO PAGE WAS TESTED: it needs Chromium (apt-get install chromium) and pip install playwright")
    from playwright.sync_api import sync_playwright

    requests: list[str] = []
    errors: list[str] = []
    with sync_playwright() as playwright:  # no sandbox of its own: containers forbid it
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(1000 * PATIENCE_S)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        yield page
        browser.close()
    assert all(url.startswith((address, "data:", "blob:")) for url in requests), requests
    assert errors == []


def test_a_question_with_an_image_is_answered(page: Page, place: Path) -> None:
    box = page.get_by_placeholder("Ask about an image")
    for name in ("text.png", "scene.png"):
        page.locator("input[type=file]").first.set_input_files(place / name)
        page.locator(".thumbnail-item").wait_for()
        box.fill("What is in it?")
        box.press("Enter")
        if name == "text.png":
            page.get_by_text("the image cannot be read").wait_for()
            page.reload()
    page.get_by_text("Settings").wait_for()
    answer = page.locator(".bot.message")
    wait_until(lambda: bool(answer.inner_text()) and page.get_by_label("Retry").count() == 1)
    assert page.locator(".user.message img").count() == 1


def test_malformed_events_cost_little_and_leave_no_traceback(address: str, place: Path) -> None:
    """The fixture looks for tracebacks in the log, which has a line for each."""
    client = httpx2.Client(base_url=f"{address}/gradio_api", trust_env=False, timeout=60)
    events = [event for event in client.get(f"{address}/config").json()["dependencies"] if event["backend_fn"]]
    value = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    for event in events:
        body = {"fn_index": event["id"], "data": [value] * len(event["inputs"]), "session_hash": "a"}
        wait_until(lambda body=body: client.post("/queue/join", json=body).status_code == 200)  # 503: it is full
    assert client.post("/queue/join", json={"fn_index": 999, "data": [], "session_hash": "a"}).status_code == 400
    many = b'{"fn_index": 1, "session_hash": "a", "data": [' + b"[]," * 60_000 + b"[]]}"
    refused = [client.post("/queue/join", content=body) for body in (many, iter([b"{}"]))]  # the other has no length
    assert [response.status_code for response in refused] == [400, 400]
    assert "too many JSON values" in refused[0].text
    log = place / "log"
    wait_until(lambda: "an event of the page failed" in log.read_text() and "KeyError: 999" in log.read_text())


def test_another_name_of_this_machine_is_not_answered(address: str) -> None:
    """A browser may be led here by a name of another site's (DNS rebinding)."""
    assert httpx2.get(address, headers={"Host": "rebound.example"}, trust_env=False).status_code == 400


def test_another_site_cannot_make_a_browser_upload_here(address: str, place: Path) -> None:
    """A page of any site may post a form with files without asking first."""
    uploads = place / "uploads"
    before = {*uploads.rglob("*")}
    sent = {"files": {"files": ("a.png", (place / "scene.png").read_bytes())}, "trust_env": False}
    for origin in ("https://evil.example", "http://localhost.evil.example", "null", address.replace("http://", "")):
        response = httpx2.post(f"{address}/gradio_api/upload", headers={"Origin": origin}, **sent)
        assert (response.status_code, "no other site" in response.text) == (400, True), origin
    assert {*uploads.rglob("*")} == before
    assert httpx2.post(f"{address}/gradio_api/upload", headers={"Origin": address}, **sent).status_code == 200
