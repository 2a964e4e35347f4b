#!/usr/bin/env python
"""Serve a trained model and an encoder as OpenAI does: /v1/chat/completions, /v1/embeddings, /v1/models."""

import argparse
import sys

from clips.common.errors import run_command
from mllm.chat.limits import add_host_flag, add_limit_flags


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--model-path", help="model directory or hub id (default: the newest runs/*/model)")
    p.add_argument("--encoder", help="CLIPS run, export or hub id for /v1/embeddings (default: the newest under runs/)")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: reachable from outside")
    p.add_argument("--port", type=int, default=8000, help="port to listen on; 0: any that is free")
    add_host_flag(p)
    p.add_argument("--api-key", help="ask clients for this key (default: the environment's CLIPS_API_KEY, else none)")
    p.add_argument("--allow-image-urls", action="store_true", help="fetch pictures from public http(s) addresses too")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="arithmetic of the model")
    p.add_argument("--load-4bit", action="store_true", help="language model in 4 bits (bitsandbytes)")
    p.add_argument("--load-8bit", action="store_true", help="language model in 8 bits (bitsandbytes)")
    p.add_argument(
        "--conv-mode", default="auto", help="conversation format: auto (as trained), v1, llama_3, chatml, plain"
    )
    add_limit_flags(p)
    return p


def main() -> None:
    flags = parser().parse_args()
    from mllm.serve.app import serve_from_flags

    serve_from_flags(flags)


if __name__ == "__main__":
    sys.exit(run_command(main))
