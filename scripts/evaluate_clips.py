#!/usr/bin/env python
"""Evaluate a trained CLIPS model: retrieval in both directions, zero-shot classification, linear probe."""

from clips.common.errors import start
from clips.common.flags import Parser, at_least


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--model", metavar="DIR_OR_HUB_ID", help="run or export (default: the newest run under runs/)")
    p.add_argument("--data", help="test data: shards, a table, or one image folder per class (default: the run's own)")
    p.add_argument("--fields", nargs="+", default=[], metavar="PART=FIELD", help="fields of --data")
    p.add_argument("--karpathy", help="Karpathy split JSON of COCO or Flickr30K, instead of --data")
    p.add_argument("--image-root", help="folder that image paths are relative to (default: that of the file)")
    p.add_argument("--split", help="split of the run's own data or of --karpathy (default: test, or val without it)")
    p.add_argument("--classes", help="imagenet, or a class list: one per line, or JSON with classes and templates")
    p.add_argument("--probe-train", help="labelled training images for a linear probe, in any format --data accepts")
    p.add_argument("--limit", type=at_least(1), help="use only this many images (default: all)")
    p.add_argument("--image-size", type=int, help="resolution in pixels (default: the model's own)")
    p.add_argument("--batch-size", type=at_least(1), help="images per batch (default: the run's eval.batch_size)")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument("--output", help="JSON file (default: evaluation-DATA.json in --model, or in runs/OWNER--NAME)")
    return p


if __name__ == "__main__":
    start(parser, "clips.evaluation.evaluate:evaluate_from_flags")
