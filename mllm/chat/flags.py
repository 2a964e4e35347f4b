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
