"""A picture of the web page, made by a real browser: what the README shows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from clips.common.errors import UserError
from clips.common.runtime import unused_port

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TABS = {"chat": "Chat", "side-by-side": "Side by side", "encoder": "Encoder"}
PATIENCE_MS = 120_000


def find_browser() -> str | None:
    """The path of an installed Chromium."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextmanager
def browser(*options: str) -> Iterator[Browser]:
    """A headless Chromium; UserError where it or the package that drives it is missing."""
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        raise UserError("a picture of the page needs the package playwright: pip install playwright") from None
    path = find_browser()
    if path is None:
        raise UserError(f"a picture of the page needs one of {', '.join(BROWSERS)}: install the package chromium")
    with sync_playwright() as playwright:
        # No sandbox of its own: containers forbid it, and it opens nothing but this page.
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", *options])
        try:
            yield opened
        finally:
            opened.close()


def open_tab(page: Page, url: str, tab: str) -> None:
    """Open the page and one of its TABS, and wait until it can be used."""
    page.goto(url, timeout=PATIENCE_MS)
    page.get_by_role("tab", name=TABS[tab]).click()
    page.locator(".box textarea:visible, .encoder:visible").first.wait_for()


def take_screenshot(
    out: Path, model_names: Sequence[str], *, tab: str, example: int, width: int, height: int, dark: bool, device: str
) -> None:
    """Serve the page, ask the demo's example number `example` (from 0) in `tab` of TABS, write what is then seen.

    UserError for a tab that is not there and without examples (no demo questions).
    """
    if out.suffix != ".png":
        raise UserError(f"--out {out}: name it .png")
    from mllm.chat.web import launch

    port = unused_port()
    served = launch(model_names, port=port, device=device, block=False)
    try:
        with browser() as opened:
            page = opened.new_page(
                viewport={"width": width, "height": height},
                color_scheme="dark" if dark else "light",
                device_scale_factor=2,
            )
            page.set_default_timeout(PATIENCE_MS)
            open_tab(page, f"http://127.0.0.1:{port}", tab)
            panel = page.get_by_role("tabpanel").filter(visible=True)
            examples = panel.locator(".gallery-item" if tab == "encoder" else ".example")
            if not 0 <= example < examples.count():
                raise UserError(f"--example {example}: the page has {examples.count()} (the demo questions make them)")
            examples.nth(example).click()
            for remark in panel.locator(".block.remark").all():
                remark.get_by_text("similarity" if tab == "encoder" else "tokens").wait_for()
            page.wait_for_timeout(1000)  # for animations, and pictures to be drawn
            out.parent.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=out, animations="disabled")
    finally:
        served.close(verbose=False)
    print(f"{out}: the tab “{TABS[tab]}” at {width} × {height}, {'dark' if dark else 'light'}")
