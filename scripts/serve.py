#!/usr/bin/env python
"""Serve a trained model with OpenAI's API: /v1/chat/completions and /v1/models. CLIPS_API_KEY may set a key."""

import argparse

from clips.common.errors import start
from clips.common.flags import Parser, add_options
from mllm.chat.limits import Limits, add_model_flags


def parser() -> argparse.ArgumentParser:
    p = Parser(__doc__)
    add_model_flags(p)
    p.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is reachable from outside")
    p.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes any free port")
    p.add_argument(
        "--allowed-hosts", nargs="+", default=[], metavar="NAME",
        help="more host names that clients may use, beside localhost and --host; * allows any",
    )  # fmt: skip
    add_options(p.add_argument_group("limits"), Limits, "max_")
    return p


if __name__ == "__main__":
    start(parser, "mllm.serve.app:serve_from_flags")
