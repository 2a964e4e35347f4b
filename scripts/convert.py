#!/usr/bin/env python
"""Convert a model into another format: read FROM, show that its features stay the same, then write TO."""

import argparse
import sys

from clips.common.errors import run_command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument(
        "source",
        metavar="FROM",
        help="a run, an export, an official CLIPS or open_clip checkpoint, a transformers CLIP, each a directory or a "
        "hub id; for --to transformers also an image tower of transformers or timm:NAME_OR_DIR",
    )
    p.add_argument("target", metavar="TO", help="the directory to write, which must not exist")
    p.add_argument(
        "--to",
        choices=("native", "open_clip", "official", "transformers"),
        default="native",
        help="format: this project's, open_clip's, that of the official CLIPS checkpoints, or the image tower as "
        "ViTModel, CLIPVisionModel or SiglipVisionModel (default: native)",
    )
    p.add_argument("--check", action="store_true", help="show that it can be done and write nothing (default: no)")
    return p


def main() -> None:
    flags = parser().parse_args()
    from clips.weights.convert import convert_from_flags

    convert_from_flags(flags)


if __name__ == "__main__":
    sys.exit(run_command(main))
