#!/usr/bin/env python
"""Write a long caption for each pair of image and web caption: data for CLIPS, at any size.

The same command goes on after a stop. It may run several times at once, also on other machines with the same folder.
Without flags it captions a part of the demo with the newest models of runs/.
"""

import argparse
import sys

from clips.common.errors import run_command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", help="pairs: a folder, pattern or URL of tar shards, or tables (default: the demo's)")
    p.add_argument("--output", default="runs/recaption", help="folder for the shards with long captions")
    p.add_argument(
        "--captioner",
        metavar="KIND:NAME",
        help="llava:DIR, hf:ID_OR_DIR, endpoint:URL[,URL] or clips:RUN (default: the newest llava and clips of runs/, "
        "each into a folder below --output)",
    )
    p.add_argument("--prompt", metavar="FILE", help="what is asked, with {web} for the web caption (default: built in)")
    p.add_argument("--fields", nargs="+", action="extend", default=[], metavar="PART=FIELD", help="as in pretraining")
    p.add_argument("--image-root", help="tables: the folder that image paths are relative to")
    p.add_argument("--shards", type=int, help="only the first so many (default: all, one of the demo)")
    p.add_argument("--dry-run", action="store_true", help="print the plan, caption nothing")
    writing = p.add_argument_group("writing captions")
    writing.add_argument("--batch-size", type=int, default=32, help="pairs that a model reads at once")
    writing.add_argument("--max-new-tokens", type=int, default=256, help="longest caption, in tokens")
    writing.add_argument("--in-flight", type=int, default=32, help="endpoint: requests that a server gets at once")
    writing.add_argument("--device", default="auto", help="auto, cpu or cuda")
    good = p.add_argument_group("what a good caption is")
    good.add_argument(
        "--words", type=int, nargs=2, default=(5, 400), metavar=("LEAST", "MOST"), help="its length in words"
    )
    good.add_argument("--script", default="Latin", help="of most letters, by Unicode's name; any: no check")
    good.add_argument(
        "--on-bad", choices=("drop", "keep"), default="drop", help="drop or keep a pair whose second caption is bad too"
    )
    good.add_argument("--min-similarity-quantile", type=float, metavar="Q", help="leave out this share, the worst fits")
    good.add_argument(
        "--similarity-encoder", metavar="DIR_OR_ID", help="the encoder that scores how well a caption fits"
    )
    good.add_argument(
        "--max-broken-share", type=float, default=0.05, help="largest share of broken pairs; more end the command"
    )
    where = p.add_argument_group("processes and remote data")
    where.add_argument("--processes", type=int, help="processes of this command (default: one a GPU)")
    where.add_argument("--cache-gb", type=float, default=50, help="disk space for copies of remote data; 0: no copies")
    return p


def main() -> None:
    flags = parser().parse_args()
    from mllm.recaption.run import recaption_from_flags

    recaption_from_flags(flags)


if __name__ == "__main__":
    sys.exit(run_command(main))
