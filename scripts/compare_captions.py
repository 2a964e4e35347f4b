#!/usr/bin/env python
"""Which long captions teach an encoder best: the same small encoder on the same pictures with each set of captions."""

import sys
from pathlib import Path

from clips.common.errors import run_command
from clips.common.flags import SET, Parser


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument(
        "--sets",
        required=True,
        metavar="NAME=DATA,…",
        help="sets of the same pairs with different long captions, as recaption.py writes them",
    )
    p.add_argument("--fields", nargs="+", default=[], metavar="PART=FIELD", help="parts of the sets and the test data")
    p.add_argument(
        "--test-data",
        nargs="+",
        metavar="DATA",
        help="test data; unseen=DATA behind the first decides (default: the demo's test pictures, and the same drawn "
        "by an artist that no training shows)",
    )
    p.add_argument("--seeds", type=int, default=3, help="runs of each set")
    p.add_argument("--samples", type=int, default=32_000, help="samples that each run sees")
    p.add_argument("--jobs", type=int, default=2, help="runs beside each other, which share the cores")
    p.add_argument("--output", default="runs/compare_captions", help="folder of the runs and of the result")
    p.add_argument("--set", help="fields of clips/config.py for every run", **SET)
    p.add_argument("--dry-run", action="store_true", help="print the plan with the estimated time, and stop")
    return p


def main() -> None:
    flags = parser().parse_args()
    from clips.studies.captions import compare_sets, parse_sets

    options = {key: getattr(flags, key) for key in ("fields", "test_data", "seeds", "samples", "jobs", "dry_run")}
    compare_sets(parse_sets(flags.sets), Path(flags.output), settings=flags.set, **options)


if __name__ == "__main__":
    sys.exit(run_command(main))
