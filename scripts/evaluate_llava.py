#!/usr/bin/env python
"""Evaluate a LLaVA-style model on the demo's held-out questions, or on your own (LLaVA's question.jsonl)."""

from clips.common.errors import start
from clips.common.flags import Parser, at_least


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--model", help="model directory or hub id (default: the newest runs/*/model)")
    p.add_argument("--questions", help="your own questions: question.jsonl (default: the demo's held-out ones)")
    p.add_argument("--image-folder", help="folder or uncompressed tar with your images")
    p.add_argument("--output", help="folder, or a .jsonl file for the answers (default: evaluation/ beside the model)")
    p.add_argument("--batch-size", type=at_least(1), default=32, help="questions per batch")
    p.add_argument("--max-new-tokens", type=at_least(1), default=64, help="longest answer in tokens")
    p.add_argument("--conv-mode", default="auto", help="auto (as trained), v1, chatml, llama_3 or plain")
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, above it answers are sampled")
    p.add_argument("--seed", type=int, default=0, help="seed of sampled answers")
    p.add_argument("--limit", type=at_least(1), help="questions of each file, drawn evenly over kinds (default: all)")
    p.add_argument("--likelihood", action="store_true", help="also measure how likely the right answers are")
    dtypes = ("auto", "float32", "bfloat16")
    p.add_argument("--dtype", choices=dtypes, default="auto", help="auto is bfloat16 if the device supports it")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return p


if __name__ == "__main__":
    start(parser, "mllm.evaluation.evaluate:evaluate_from_flags")
