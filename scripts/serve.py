#!/usr/bin/env python
"""Serve a trained model and an encoder as OpenAI does: /v1/chat/completions, /v1/embeddings, /v1/models."""

import argparse

from clips.common.errors import start
from clips.common.flags import Parser, add_options
from mllm.chat.flags import add_address_flags, add_model_flags
from mllm.chat.limits import Limits


def parser() -> argparse.ArgumentParser:
    p = Parser(__doc__)
    add_model_flags(p)
    p.add_argument("--encoder", help="CLIPS run, export or hub id for /v1/embeddings (default: the newest under runs/)")
    add_address_flags(p, 8000)
    p.add_argument(
        "--api-key", help="key that clients must send (default: CLIPS_API_KEY of the environment, else none)"
    )
    p.add_argument("--allow-image-urls", action="store_true", help="fetch pictures from public http(s) addresses too")
    add_options(p.add_argument_group("limits"), Limits, "max_")
    return p


if __name__ == "__main__":
    start(parser, "mllm.serve.app:serve_from_flags")
