#!/usr/bin/env python
"""Talk with a LLaVA-style model about pictures: in the terminal, for a script (--prompt, --input), or --web."""

import argparse
import sys

from clips.common.errors import run_command
from mllm.chat.limits import add_host_flag


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--model-path", metavar="DIR_OR_HUB_ID", help="the model; without it the newest runs/*/model")
    p.add_argument(
        "--model-base",
        metavar="DIR_OR_HUB_ID",
        help="LLaVA's flag for a model in parts; here that is put together first, by convert.py --base",
    )
    p.add_argument("--image-file", action="append", metavar="PATH_OR_URL", help="a picture; repeat for several")
    p.add_argument(
        "--conv-mode", default="auto", help="conversation format: auto (as trained), v1, chatml, llama_3 or plain"
    )
    p.add_argument("--system", help="system text in place of the format's own")
    p.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token, more draws")
    p.add_argument("--top_p", "--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this share")
    p.add_argument("--max-new-tokens", type=int, default=256, help="longest answer, in tokens")
    p.add_argument("--stop", action="append", metavar="TEXT", help="a text that ends an answer; repeat for several")
    p.add_argument("--seed", type=int, help="makes drawn answers repeatable")
    bits = p.add_mutually_exclusive_group()
    bits.add_argument("--load-4bit", action="store_true", help="the language model in 4 bits (bitsandbytes)")
    bits.add_argument("--load-8bit", action="store_true", help="the language model in 8 bits (bitsandbytes)")
    p.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of the weights")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument("--stats", action="store_true", help="show tokens/s, time to the first token, cached tokens")
    once = p.add_argument_group("without a talk")
    once.add_argument("--prompt", help="print the answer to this and end")
    once.add_argument("--input", metavar="questions.jsonl", help="answer LLaVA's question file; resumes")
    once.add_argument("--output", metavar="answers.jsonl", help="where those answers go")
    once.add_argument("--image-folder", help="their pictures, a folder or tar; without it the questions' own folder")
    web = p.add_argument_group("web page")
    web.add_argument("--web", action="store_true", help="open a page for the browser instead")
    web.add_argument("--host", default="127.0.0.1", help="address the page listens on")
    web.add_argument("--port", type=int, default=7860, help="its port")
    add_host_flag(web)
    web.add_argument("--compare-with", action="append", metavar="MODEL", help="another model for the page; repeatable")
    return p


def main() -> None:
    flags = parser().parse_args()
    from mllm.chat.terminal import chat_from_flags

    chat_from_flags(flags)


if __name__ == "__main__":
    sys.exit(run_command(main))
