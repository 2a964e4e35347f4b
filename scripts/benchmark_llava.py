#!/usr/bin/env python
"""The LLaVA half against itself or the bare model: packed rows, pictures read once, captions, a busy endpoint."""

import argparse
import sys
from pathlib import Path

from clips.common.errors import run_command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("what", choices=["train", "questions", "captions", "endpoint"], help="what to measure")
    p.add_argument("--stage", choices=["1", "2"], default="2", help="for train: on the demo's data")
    p.add_argument("--vision", default="clips", help="for train: the encoder, as in scripts/train_llava.sh")
    p.add_argument(
        "--repeats", type=int, default=10, help="pairs; the median of their ratios counts; of endpoint: calls"
    )
    p.add_argument("--model-path", metavar="DIR_OR_HUB_ID", help="without it the newest runs/*/model")
    p.add_argument("--endpoint", metavar="URL[,URL…]", default="http://127.0.0.1:8000/v1", help="for endpoint")
    p.add_argument("--in-flight", type=int, default=16, help="for endpoint: requests at a time, of each server")
    p.add_argument("--out", help="JSON file for the figures")
    return p


def main() -> None:
    flags = parser().parse_args()
    if flags.what == "questions":
        from mllm.evaluation.benchmark import benchmark_questions

        figures = benchmark_questions(flags.model_path, device="auto", repeats=flags.repeats)
    elif flags.what == "captions":
        from mllm.recaption.benchmark import benchmark_captions

        figures = benchmark_captions(flags.model_path, device="auto", repeats=flags.repeats)
    elif flags.what == "endpoint":
        from mllm.recaption.benchmark import benchmark_endpoint

        figures = benchmark_endpoint(flags.endpoint, in_flight=flags.in_flight, calls=flags.repeats)
        print("in flight, each second: " + " ".join(map(str, figures["in_flight"])))
    else:
        from mllm.training.benchmark import benchmark_training

        figures = benchmark_training(["--stage", flags.stage, "--vision", flags.vision], repeats=flags.repeats)
    print("{what}: {ours:,.1f} against {theirs:,.1f}, {ratio:.2f} times".format(**figures))
    if flags.out:
        from clips.common.files import write_json

        write_json(Path(flags.out), figures)


if __name__ == "__main__":
    sys.exit(run_command(main))
