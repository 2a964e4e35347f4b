#!/usr/bin/env python
"""Chat with a LLaVA-style model about images: in the terminal, on a page (--web), or once for a script (--prompt)."""

import argparse

from clips.common.errors import start
from clips.common.flags import Parser
from mllm.chat.limits import add_model_flags


def parser() -> argparse.ArgumentParser:
    p = Parser(__doc__)
    add_model_flags(p)
    p.add_argument("--image", action="append", metavar="PATH", help="image or video for the question; repeatable")
    p.add_argument("--prompt", help="print the answer to this question and exit")
    p.add_argument("--system", help="system text (default: the conversation format's own)")
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, above it answers are sampled")
    p.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens with this total share")
    p.add_argument("--max-new-tokens", type=int, default=256, help="longest answer, in tokens")
    p.add_argument("--stop", action="append", metavar="TEXT", help="text that ends an answer; repeatable")
    p.add_argument("--seed", type=int, help="makes sampled answers repeatable")
    web = p.add_argument_group("web page")
    web.add_argument("--web", action="store_true", help="serve a page for the browser instead")
    web.add_argument("--port", type=int, default=7860, help="port on 127.0.0.1 to listen on")
    return p


if __name__ == "__main__":
    start(parser, "mllm.chat.terminal:chat_from_flags")
