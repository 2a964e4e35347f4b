#!/usr/bin/env python
"""Search images by a text or by an image. The folder is indexed once, then each search takes a moment."""

from clips.common.errors import start
from clips.common.flags import Parser, at_least


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("query", help="what to look for: a text, or the path or URL of an image")
    p.add_argument(
        "--image-folder", default="data/llava_demo/images", help="folder of images, including its subfolders"
    )
    p.add_argument("--index", metavar="FILE", help="file of the index, made if missing (default: in the cache)")
    p.add_argument("--model", metavar="DIR_OR_HUB_ID", help="run or export (default: the newest run under runs/)")
    p.add_argument("--k", type=at_least(1), default=10, help="how many images to show")
    p.add_argument("--output", metavar="FILE", help="HTML page with the images (default: none, paths are printed)")
    p.add_argument("--jobs", type=at_least(0), default=0, help="processes that read images; 0 reads in this process")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return p


if __name__ == "__main__":
    start(parser, "clips.encoder:search_from_flags")
