#!/usr/bin/env python
"""Search among pictures by a text or by a picture: a folder is indexed once, then each search takes a moment."""

from clips.common.errors import start
from clips.common.flags import Parser, at_least


def parser() -> Parser:
    p = Parser(__doc__)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("text", nargs="?", help="what to look for, or the file of a picture (default: none, see --image)")
    what.add_argument("--image", metavar="PATH_OR_URL", help="picture whose like is looked for, instead of a text")
    p.add_argument("--pictures", default="data/llava_demo/images", help="folder of pictures, with the folders in it")
    p.add_argument("--index", metavar="FILE", help="the index, made if missing (default: one in the cache)")
    p.add_argument("--model", metavar="DIR_OR_HUB_ID", help="run or export (default: the newest run under runs/)")
    p.add_argument("--k", type=at_least(1), default=10, help="how many pictures to show")
    p.add_argument("--output", metavar="FILE", help="HTML page with the pictures (default: none, paths are printed)")
    p.add_argument("--jobs", type=at_least(0), default=0, help="processes that read pictures; 0 reads in this process")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return p


if __name__ == "__main__":
    start(parser, "clips.encoder:search_from_flags")
