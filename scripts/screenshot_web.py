#!/usr/bin/env python
"""Take a picture of the web page with an answered example, as the README shows it (needs Chromium and playwright)."""

import argparse
import sys
from pathlib import Path

from clips.common.errors import run_command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("runs/web.png"), help="the PNG to write")
    p.add_argument("--model-path", action="append", default=[], metavar="MODEL", help="as in chat.py; repeatable")
    p.add_argument("--tab", choices=["chat", "side-by-side", "encoder"], default="chat", help="which tab")
    p.add_argument("--example", type=int, default=0, help="which of the page's examples is asked, from 0")
    p.add_argument("--width", type=int, default=1280, help="of the window, CSS pixels; 390 is a phone")
    p.add_argument("--height", type=int, default=860, help="of the window, CSS pixels")
    p.add_argument("--dark", action="store_true", help="in dark mode")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return p


def main() -> None:
    flags = parser().parse_args()
    from mllm.chat.screenshot import take_screenshot

    look = {"width": flags.width, "height": flags.height, "dark": flags.dark, "device": flags.device}
    take_screenshot(flags.out, flags.model_path, tab=flags.tab, example=flags.example, **look)


if __name__ == "__main__":
    sys.exit(run_command(main))
