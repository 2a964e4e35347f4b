#!/usr/bin/env python
"""Export a trained CLIPS model to native, open_clip and transformers, each checked against the trained weights."""

from clips.common.errors import start
from clips.common.flags import Parser


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--model", metavar="DIR_OR_HUB_ID", help="run or export (default: the newest run under runs/)")
    p.add_argument("--output", help="where to write (default: export/ in --model, of a hub id in runs/OWNER--NAME)")
    p.add_argument("--image-size", type=int, help="resolution in pixels, positions recomputed (default: as trained)")
    p.add_argument("--data", help="images and captions to check on: shards or a table (default: the run's own)")
    return p


if __name__ == "__main__":
    start(parser, "clips.weights.export:export_from_flags")
