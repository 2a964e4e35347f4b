#!/usr/bin/env python
"""Export a trained CLIPS model to native, open_clip and transformers format, and check each against the model."""

from clips.common.errors import start
from clips.common.flags import Parser, at_least


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--model", metavar="DIR_OR_HUB_ID", help="run or export (default: the newest run under runs/)")
    p.add_argument("--output", help="directory to write (default: export/ in --model; of a hub id in runs/OWNER--NAME)")
    p.add_argument(
        "--image-size", type=at_least(1), help="resolution in pixels, positions recomputed (default: as trained)"
    )
    p.add_argument("--data", help="images and captions for the check: shards or a table (default: those of the run)")
    return p


if __name__ == "__main__":
    start(parser, "clips.weights.export:export_from_flags")
