#!/usr/bin/env python
"""Write the figures of README.md and docs/*.md from the files in docs/results/, or take such a file from an archive."""

import argparse
import sys

from clips.common.errors import run_command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument(
        "--take",
        metavar="FILE",
        help="first write docs/results/NAME.json from this archive of compare_encoders.py --pack, which is verified, "
        "from the comparison.json of compare_pretraining.py or the claims.json of reproduce_claims.py",
    )
    p.add_argument("--name", default="compare", help="which file of docs/results to write")
    p.add_argument("--check", action="store_true", help="write no page; end with 1 where its figures are others")
    return p


def main() -> None:
    flags = parser().parse_args()
    from mllm.compare.pages import update_from_flags

    update_from_flags(flags.take, flags.name, check=flags.check)


if __name__ == "__main__":
    sys.exit(run_command(main))
