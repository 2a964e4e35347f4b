"""The flags that scripts/chat.py and scripts/serve.py share; nothing heavy is imported here."""

from __future__ import annotations

import argparse


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `mllm.chat.model.model_options`, and --model."""
    add = parser.add_argument
    add("--model", metavar="DIR_OR_HUB_ID", help="model to talk with (default: the newest runs/*/model)")
    add("--conv-mode", default="auto", help="conversation format: auto (as trained), v1, chatml, llama_3 or plain")
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument("--load-4bit", action="store_true", help="load the language model in 4 bits (bitsandbytes)")
    bits.add_argument("--load-8bit", action="store_true", help="load the language model in 8 bits (bitsandbytes)")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="arithmetic of the model")
    add("--device", default="auto", help="auto, cpu or cuda")


def add_address_flags(parser: argparse._ActionsContainer, port: int) -> None:
    """Add --host, --port and --allowed-hosts (mllm/chat/hosts.py)."""
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: reachable from outside")
    add("--port", type=int, default=port, help="port to listen on; 0: any free port")
    add(
        "--allowed-hosts",
        nargs="+",
        default=[],
        metavar="NAME",
        help="further host names of this machine for browsers, beside localhost, addresses and its own name; *: any",
    )
