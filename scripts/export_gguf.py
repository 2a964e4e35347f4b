#!/usr/bin/env python
"""Write a trained LLaVA-style model for llama.cpp: the language model and its multimodal projector (mmproj) as GGUF."""

from clips.common.errors import start
from clips.common.flags import Parser


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--model", required=True, help="model directory (runs/NAME/model) or hub id")
    p.add_argument("--output", help="where to write (default: gguf/ beside the model directory)")
    p.add_argument("--dtype", default="f16", choices=("f32", "f16", "bf16"), help="dtype of the weights")
    return p


if __name__ == "__main__":
    start(parser, "mllm.gguf.export:export_from_flags")
