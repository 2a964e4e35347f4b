#!/usr/bin/env python
"""Write a trained LLaVA-style model for llama.cpp: the language model and its multimodal projector (mmproj) as GGUF."""

import sys

from clips.common.errors import run_command
from clips.common.flags import Parser


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--model", required=True, help="model directory (runs/NAME/model) or hub id")
    p.add_argument("--output", help="where to write (default: gguf/ beside the model directory)")
    p.add_argument("--dtype", default="f16", choices=("f32", "f16", "bf16"), help="dtype of the weights")
    return p


def main() -> None:
    flags = parser().parse_args()
    from mllm.gguf.export import export_from_flags

    export_from_flags(flags)


if __name__ == "__main__":
    sys.exit(run_command(main))
