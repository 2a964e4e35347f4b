#!/usr/bin/env python
"""Take a picture of the web page with an answered example, as the README shows it (needs Chromium and playwright)."""

from __future__ import annotations

import argparse
import io
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from clips.common.errors import UserError, run_command
from clips.common.flags import Parser
from clips.common.runtime import unused_port

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TABS = {"chat": "Chat", "side-by-side": "Side by side", "encoder": "Encoder", "search": "Search"}
PATIENCE_MS = 120_000
COLOURS = 128
"""Of the stored picture: the docs' pictures are small."""


def find_browser() -> str | None:
    """The path of an installed Chromium."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextmanager
def browser(*options: str) -> Iterator[Browser]:
    """A headless Chromium; UserError if Chromium or the package that drives it is missing."""
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        raise UserError("a picture of the page needs the package playwright: pip install playwright") from None
    if (path := find_browser()) is None:
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


def take_screenshot(flags: argparse.Namespace) -> None:
    """Serve the page, ask an example in a tab, and write what is then seen. UserError without examples."""
    out, tab = flags.output, flags.tab
    from PIL import Image

    from mllm.chat.web import launch

    port = unused_port()
    served = launch(flags.model, port=port, device=flags.device, block=False)
    try:
        with browser() as opened:
            page = opened.new_page(
                viewport={"width": flags.width, "height": flags.height},
                color_scheme="dark" if flags.dark else "light",
                device_scale_factor=2,
            )
            page.set_default_timeout(PATIENCE_MS)
            open_tab(page, f"http://127.0.0.1:{port}", tab)
            panel = page.get_by_role("tabpanel").filter(visible=True)
            examples = panel.locator(".gallery-item" if tab == "encoder" else ".example")
            if not 0 <= flags.example < examples.count():
                raise UserError(f"--example {flags.example}: the page has {examples.count()} (of the demo questions)")
            examples.nth(flags.example).click()
            for remark in panel.locator(".block.remark").all():
                remark.get_by_text("similarity" if tab == "encoder" else "tokens").wait_for()
            page.wait_for_timeout(1000)  # for animations, and pictures to be drawn
            out.parent.mkdir(parents=True, exist_ok=True)
            page.evaluate("scrollTo(0, 0)")
            picture = Image.open(io.BytesIO(page.screenshot(animations="disabled"))).convert("RGB")
            picture.quantize(COLOURS).save(out, optimize=True)
    finally:
        served.close(verbose=False)
    print(f"{out}: the tab “{TABS[tab]}”")


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--output", type=Path, default=Path("runs/web.png"), help="the PNG to write")
    p.add_argument("--model", action="append", default=[], help="as in chat.py; repeatable")
    p.add_argument("--tab", choices=tuple(TABS), default="chat", help="which tab")
    p.add_argument("--example", type=int, default=0, help="which of the page's examples is asked, from 0")
    p.add_argument("--width", type=int, default=1280, help="of the window, CSS pixels; 390 is a phone")
    p.add_argument("--height", type=int, default=860, help="of the window, CSS pixels")
    p.add_argument("--dark", action="store_true", help="in dark mode")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return p


if __name__ == "__main__":
    sys.exit(run_command(lambda: take_screenshot(parser().parse_args())))
