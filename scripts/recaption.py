#!/usr/bin/env python
"""Write a long caption for each pair of image and web caption: data for CLIPS, at any size.

The same command goes on after a stop. It may run several times at once, also on other machines with the same folder:
torchrun and srun start one for each GPU.
Without flags it captions a part of the demo with the newest models of runs/.
"""

import argparse

from clips.common.errors import start
from clips.common.flags import Parser, add_options
from mllm.recaption.options import Options


def parser() -> argparse.ArgumentParser:
    p = Parser(__doc__)
    add_options(p, Options)
    p.add_argument(
        "--prompt", metavar="FILE", help="prompt; {web} marks the web caption (default: the built-in prompt)"
    )
    p.add_argument(
        "--fields", nargs="+", action="extend", default=[], metavar="PART=FIELD",
        help="fields of the data, as in pretraining (default: recognised by their names)",
    )  # fmt: skip
    p.add_argument("--force", action="store_true", help="take a captioner that was trained on the demo for other data")
    p.add_argument("--dry-run", action="store_true", help="print the plan, caption nothing")
    return p


if __name__ == "__main__":
    start(parser, "mllm.recaption.run:recaption_from_flags")
