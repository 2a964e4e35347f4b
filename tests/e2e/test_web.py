"""The page of `scripts/chat.py --web` in a real headless Chromium, on tiny untrained models."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
import pytest
from conftest import ROOT
from PIL import Image
from tiny_web import picture, write_export, write_llava

from clips.common.runtime import unused_port

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.slow

PATIENCE_S = 240
TABS = {"chat": "Chat", "side-by-side": "Side by side", "encoder": "Encoder", "search": "Search"}
CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
SLOW = {"num_hidden_layers": 12, "max_position_embeddings": 2048}  # an answer that one can stop
COUNT_LENGTHS = """() => {
    window.lengths = new Set();
    const count = () => document.querySelectorAll(".bot.message").forEach(said => lengths.add(said.textContent.length));
    new MutationObserver(count).observe(document, {subtree: true, childList: true, characterData: true});
}"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("web")
    write_export(root / "runs" / "demo")
    write_export(root / "runs" / "baseline", "clip", seed=3)
    write_llava(root / "runs" / "llava-clips", root / "runs" / "demo", **SLOW)
    write_llava(root / "runs" / "llava-clip", root / "runs" / "baseline", **SLOW)
    (root / "disk" / "llava_demo" / "images").mkdir(parents=True)
    (root / "data").symlink_to(root / "disk")  # no example could be asked
    questions = []
    for number, kind in enumerate(("what", "where", "what")):
        picture(60, 60, seed=number).save(root / "data" / "llava_demo" / "images" / f"{number}.png")
        question = {"question_id": number, "image": f"{number}.png", "text": f"Question {number}?", "kind": kind}
        question |= {"kind": "identity", "answer": "A dog"} if number == 0 else {}
        questions.append(json.dumps(question))
    (root / "data" / "llava_demo" / "question.jsonl").write_text("\n".join(questions))
    for number in range(3):
        picture(60, 60, seed=9 + number).save(root / "data" / "llava_demo" / "images" / f"unseen-{number}.png")
    picture().save(root / "scene.png")
    return root


@pytest.fixture(scope="module")
def address(place: Path, chromium: Browser) -> Iterator[str]:
    port = unused_port()
    models = ["--model", "runs/llava-clips/model", "--compare-with", "runs/llava-clip/model", "--device", "cpu"]
    uploads = place / "uploads"
    uploads.mkdir()
    with (place / "log").open("w+") as log:
        server = subprocess.Popen(
            [sys.executable, ROOT / "scripts" / "chat.py", "--web", "--port", str(port), *models],
            cwd=place, env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(uploads)}, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            wait_until(lambda: "The page is at" in (place / "log").read_text() or server.poll() is not None)
            assert server.poll() is None, (place / "log").read_text()
            yield f"http://127.0.0.1:{port}"
            server.send_signal(signal.SIGINT)
            assert server.wait(PATIENCE_S) == 0, (place / "log").read_text()
            assert "Traceback" not in (place / "log").read_text()
            assert not list(uploads.glob("clips-mllm-web-*")), "uploads are left behind"
        finally:
            server.kill()
            server.wait()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def test_it_answers_its_own_pages_alone(address: str) -> None:
    """The browser tests show that it answers those."""
    for headers in ({"Host": "rebound.example"}, {"Origin": "http://evil.example"}):
        files = {"files": ("a.png", b"x")}
        response = httpx2.post(f"{address}/gradio_api/upload", files=files, headers=headers, trust_env=False)
        assert response.status_code == 403, headers
    assert httpx2.get(address, headers={"Host": "rebound.example"}, trust_env=False).status_code == 403


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None or importlib.util.find_spec("playwright") is None:
        pytest.skip("NO PAGE WAS TESTED: it needs Chromium (apt-get install chromium) and pip install playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:  # no sandbox of its own: containers forbid it
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", *CAMERA])
        yield opened
        opened.close()


class Visit:
    """One visitor's tab of the page, and every request and error its browser saw."""

    def __init__(self, chromium: Browser, address: str, tab: str, **look: object) -> None:
        self.context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}} | look)
        self.page = self.context.new_page()
        self.page.set_default_timeout(1000 * PATIENCE_S)
        self.address, self.requests, self.errors = address, [], []
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        self.page.get_by_role("tab", name=TABS[tab]).click()
        self.page.locator(".box textarea:visible, .encoder:visible").first.wait_for()
        self.panel = self.page.get_by_role("tabpanel").filter(visible=True)
        self.box = self.panel.locator(".box textarea")
        self.stop = self.panel.locator(".box .stop-button")
        self.said = self.panel.locator(".chat .bot.message")
        self.thumbnails = self.panel.locator(".box .thumbnail-item")
        self.remark = self.panel.locator(".block.remark")
        self.toast = self.page.locator(".toast-body")

    def attach(self, *paths: Path) -> None:
        before = self.thumbnails.count()
        self.panel.locator(".box input[type=file]").set_input_files(paths)
        wait_until(lambda: self.thumbnails.count() == before + len(paths))

    def ask(self, text: str, *pictures: Path) -> None:
        if pictures:
            self.attach(*pictures)
        self.box.fill(text)
        self.box.press("Enter")

    def answered(self, times: int = 1) -> list[str]:
        """Wait for the end of every column's answer number `times`; returns the remarks under them."""
        wait_until(lambda: self.said.count() == times * self.remark.count())
        for remark in self.remark.all():
            remark.get_by_text(re.compile(r"\d+ tokens")).wait_for()
        self.stop.wait_for(state="hidden")
        return self.remark.all_inner_texts()

    def set_longest(self, tokens: int) -> None:
        self.panel.get_by_text("Settings").click()
        self.panel.get_by_label(re.compile("number input for Longest")).fill(str(tokens))
        self.panel.get_by_label(re.compile("number input for Longest")).press("Tab")

    def overflow(self) -> int:
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def close(self) -> None:
        outside = [url for url in self.requests if not url.startswith((self.address, "data:", f"blob:{self.address}"))]
        assert not outside
        assert not self.errors
        self.context.close()


@pytest.fixture
def visit(chromium: Browser, address: str) -> Iterator[Callable[..., Visit]]:
    with contextlib.ExitStack() as stack:

        def start(tab: str, **look: object) -> Visit:
            return stack.enter_context(contextlib.closing(Visit(chromium, address, tab, **look)))

        yield start


def test_an_uploaded_picture_is_asked_about_and_the_answer_streams(visit: Callable[..., Visit], place: Path) -> None:
    chat = visit("chat")
    about = chat.panel.locator(".block.about").inner_text()
    assert "llava-clips" in about
    assert "encoder clips demo, 32 px, 16 tokens × 32" in about
    chat.page.evaluate(COUNT_LENGTHS)
    chat.ask("What is <image> in *it*?", place / "scene.png")
    chat.answered()
    assert chat.page.evaluate("lengths.size") > 3, "the answer came in one piece"
    user = chat.panel.locator(".chat .user.message")
    assert "What is <image> in *it*?" in user.inner_text()
    assert user.locator("img").evaluate("image => image.naturalWidth") == 60
    other = visit("chat")  # visitors share nothing
    assert other.said.count() == 0
    other.ask("Yours?")
    other.answered()
    assert other.panel.locator(".chat .user.message").all_inner_texts() == ["Yours?"]
    chat.ask("And now?")
    chat.answered(2)


def test_a_browser_fetches_nothing_from_elsewhere(visit: Callable[..., Visit], address: str) -> None:
    chat = visit("chat")
    policy = chat.page.request.get(address).headers["content-security-policy"]
    assert policy.startswith("default-src 'self'")
    failed = chat.page.evaluate("fetch('http://example.org/').then(() => '', error => String(error))")
    assert "Failed" in failed or "TypeError" in failed
    assert not [url for url in chat.requests if "example.org" in url]


def test_stop_retry_undo_and_new_conversation(visit: Callable[..., Visit], place: Path) -> None:
    chat = visit("chat")
    chat.set_longest(1024)
    chat.ask("What?", place / "scene.png")
    wait_until(lambda: len("".join(chat.said.all_inner_texts())) > 5)
    chat.stop.dispatch_event("click")  # click() waits until a busy page is drawn: the answer may end before
    assert "stopped" in chat.answered()[0]
    assert int(chat.remark.inner_text().split()[0]) < 1024
    assert chat.said.inner_text()

    chat.panel.get_by_label("number input for Longest").fill("20")
    chat.panel.get_by_label("number input for Temperature").fill("1.5")
    chat.panel.get_by_label("number input for Temperature").press("Tab")
    chat.panel.locator(".chat").get_by_role("button", name="Retry").click()
    # One reading decides: between two, the remark of the stopped answer gives way to the "…" of the new one.
    wait_until(lambda: re.match(r"\d+ tokens(?!.*stopped)", chat.remark.inner_text()) is not None)
    assert int(chat.remark.inner_text().split()[0]) <= 20
    assert chat.panel.locator(".chat .user.message").count() == 1

    chat.panel.locator(".chat").get_by_role("button", name="Undo").click()
    chat.said.wait_for(state="detached")
    wait_until(lambda: chat.box.input_value() == "What?" and chat.thumbnails.count() == 1)
    wait_until(lambda: not chat.remark.inner_text())
    chat.ask("Again?")
    chat.answered()
    chat.panel.get_by_text("New conversation").click()
    chat.panel.locator(".chat .user.message").wait_for(state="detached")
    assert chat.said.count() == 0


def test_two_models_answer_side_by_side(visit: Callable[..., Visit]) -> None:
    both = visit("side-by-side")
    assert ["clips demo" in text for text in both.panel.locator(".block.about").all_inner_texts()] == [True, False]
    both.panel.locator(".example").first.click()
    both.answered()
    left, right = both.said.all_inner_texts()
    assert left != right
    assert both.panel.locator(".chat .user.message").count() == 2


def test_what_the_encoder_sees(visit: Callable[..., Visit], place: Path) -> None:
    view = visit("encoder")  # it opens with an example
    view.remark.get_by_text("“dog”: similarity").wait_for()
    view.panel.get_by_label("Look for").fill("cat")
    view.panel.get_by_label("remove image", exact=False).or_(view.panel.get_by_label("Clear")).first.click()
    view.panel.locator("input[type=file]").first.set_input_files(place / "scene.png")
    view.remark.get_by_text("“cat”: similarity").wait_for()
    heat = view.panel.locator(".image-frame img, .image-container img").last
    wait_until(lambda: heat.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [512, 341])
    view.panel.get_by_text("Labels to choose from").click()
    view.panel.get_by_label("Labels", exact=True).fill("cat, dog, god")
    view.panel.get_by_label("Labels", exact=True).blur()
    wait_until(lambda: view.panel.locator(".confidence-set").count() == 3)
    view.panel.locator("tbody tr").last.click()
    wait_until(lambda: heat.evaluate("image => image.naturalHeight") != 341)


def test_pictures_are_searched_by_text_and_by_picture(visit: Callable[..., Visit], place: Path) -> None:
    view = visit("search")
    view.panel.get_by_label("Look for").fill("a dog")
    view.panel.get_by_label("Look for").press("Enter")
    view.remark.get_by_text("The nearest of 3 pictures to “a dog”").wait_for()
    wait_until(lambda: view.panel.locator(".found .grid-container img").count() == 3)
    view.panel.locator("input[type=file]").first.set_input_files(place / "data/llava_demo/images/unseen-1.png")
    view.remark.get_by_text("to the picture").wait_for()
    wait_until(lambda: "1.00" in view.panel.locator(".found .grid-container").inner_text())


def test_bad_pictures_are_explained_and_the_page_lives(visit: Callable[..., Visit], place: Path) -> None:
    (place / "text.png").write_bytes(b"not a picture")
    chat = visit("chat")
    chat.ask("What is it?", place / "text.png")
    toast = chat.toast.last.inner_text()
    assert "cannot be read" in toast, toast
    assert "Traceback" not in toast
    assert chat.box.input_value() == "What is it?"
    chat.panel.get_by_text("New conversation").click()
    chat.thumbnails.wait_for(state="detached")
    assert chat.said.count() == 0
    chat.ask("And without one?")
    assert "tokens" in chat.answered()[0]

    view = visit("search")
    view.panel.locator("input[type=file]").first.set_input_files(place / "text.png")
    assert "cannot be read" in view.toast.inner_text()


def test_pictures_come_from_clipboard_and_camera_too(visit: Callable[..., Visit], place: Path) -> None:
    chat = visit("chat", permissions=["camera"])
    data = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(data, "PNG")
    chat.box.evaluate(
        """(box, bytes) => {
            const pasted = new DataTransfer();
            pasted.items.add(new File([new Uint8Array(bytes)], "pasted.png", {type: "image/png"}));
            box.dispatchEvent(new ClipboardEvent("paste", {clipboardData: pasted, bubbles: true, cancelable: true}));
        }""",
        list(data.getvalue()),
    )
    wait_until(lambda: chat.thumbnails.count() == 1)
    chat.panel.get_by_text("Camera").click()
    chat.panel.get_by_title("grant webcam access").click()
    wait_until(lambda: chat.panel.locator("video").evaluate("video => video.videoWidth") > 0)
    chat.panel.get_by_label("capture photo").click()
    wait_until(lambda: chat.thumbnails.count() == 2)
    chat.ask("Both?")
    chat.answered()
    assert chat.panel.locator(".chat .user.message img").count() == 2


def test_nothing_is_wider_than_the_window_of_a_telephone_in_the_dark(visit: Callable[..., Visit]) -> None:
    chat = visit("chat", viewport={"width": 390, "height": 844}, color_scheme="dark")
    ink = chat.page.evaluate("getComputedStyle(document.querySelector('.gradio-container')).color")
    assert sum(map(int, re.findall(r"\d+", ink)[:3])) > 500
    chat.panel.locator(".example").first.click()
    chat.answered()
    assert chat.overflow() == 0
    assert chat.page.locator("footer").filter(visible=True).count() == 0
    for tab in ("Side by side", "Encoder", "Search"):
        chat.page.get_by_role("tab", name=tab).click()
        assert chat.overflow() == 0, tab
