#!/usr/bin/env python
"""Write a long caption for each pair of image and web caption, as CLIPS needs. The same command resumes."""

import argparse
from pathlib import Path

from clips.common.errors import start
from clips.common.flags import Parser, at_least, share


def parser() -> argparse.ArgumentParser:
    p = Parser(__doc__)
    p.add_argument("--data", required=True, help="pairs: a folder, pattern or URL of tar shards, or tables")
    p.add_argument("--fields", nargs="+", action="extend", default=[], metavar="PART=FIELD", help="as in pretraining")
    p.add_argument("--image-root", help="tables: the folder that image paths are relative to")
    p.add_argument("--output", type=Path, required=True, help="folder for the parts")
    p.add_argument("--captioner", required=True, help="URL[,URL][#MODEL] of servers with the OpenAI API")
    p.add_argument("--key-for", metavar="URL", help="the one server that gets the key in CLIPS_API_KEY (default: none)")
    p.add_argument("--prompt", type=Path, help="file with the prompt; {web} marks the web caption (default: built in)")
    p.add_argument("--part-size", type=at_least(1), default=5000, help="pairs per part; a stop loses at most one part")
    p.add_argument("--max-new-tokens", type=at_least(1), default=256, help="longest caption, in tokens")
    p.add_argument("--batch-size", type=at_least(1), default=32, help="requests at once to each server")
    p.add_argument("--max-left-out-share", type=share, default=0.3, help="stop if more pairs than this are skipped")
    return p


if __name__ == "__main__":
    start(parser, "mllm.recaption:recaption_from_flags")
