#!/usr/bin/env python
"""Train under random SIGKILLs to the end, and compare with the same training in peace, bit for bit.

python scripts/kill_test.py --kills 20                                # the demo
python scripts/kill_test.py --kills 5 -- --recipe s16 --debug --samples 960 --set train.checkpoint_every=80
"""

import argparse
import sys
from pathlib import Path

from clips.common.errors import run_command


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    p.add_argument("--kills", type=int, default=20, help="how many: of ranks, launchers, data workers and all at once")
    p.add_argument("--ranks", type=int, default=2, help="processes that train together")
    p.add_argument("--seed", type=int, default=0, help="of the kills' places and moments")
    p.add_argument("--output", default="runs/kill-test", help="where both runs, their logs and the result are written")
    p.add_argument("training", nargs="*", help="flags of scripts/pretrain_clips.py, after --")
    return p


def main() -> None:
    flags = parser().parse_args()
    from clips.studies.kill_test import kill_test

    kill_test(flags.kills, flags.ranks, flags.seed, Path(flags.output), flags.training)


if __name__ == "__main__":
    sys.exit(run_command(main))
