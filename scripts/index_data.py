#!/usr/bin/env python
"""Index tar shards before a run, in parallel: opening the set is then one small file for every rank.

Training does it by itself, one shard after the other. A stopped command goes on where it was.
"""

import os
import sys

from clips.common.errors import UserError, run_command
from clips.common.flags import Parser


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("data", help="as for pretrain_clips.py: a folder, pattern or URL of tar shards")
    p.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that read shards")
    return p


def main() -> None:
    flags = parser().parse_args()
    if flags.jobs < 1:
        raise UserError(f"--jobs {flags.jobs} must be at least 1")
    from clips.data.sources import index_data

    index_data(flags.data, flags.jobs)


if __name__ == "__main__":
    sys.exit(run_command(main))
