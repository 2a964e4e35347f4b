#!/usr/bin/env python
"""Chat against bare model.generate: time to the first token, tokens/s, and what the kept cache saves."""

import argparse
import sys

from clips.common.errors import run_command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--model-path", metavar="DIR_OR_HUB_ID", help="the model; without it the newest runs/*/model")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of the weights")
    p.add_argument("--repeats", type=int, default=9, help="pairs of each comparison; the median of their ratios counts")
    p.add_argument("--new-tokens", type=int, default=64, help="tokens of each answer")
    p.add_argument("--out", default="runs/benchmark_chat.json", help="JSON file for the figures")
    return p


def main() -> None:
    flags = parser().parse_args()
    from mllm.chat.benchmark import benchmark_chat

    options = {key: getattr(flags, key) for key in ("device", "dtype", "repeats", "new_tokens", "out")}
    benchmark_chat(flags.model_path, **options)


if __name__ == "__main__":
    sys.exit(run_command(main))
