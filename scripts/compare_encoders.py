#!/usr/bin/env python
"""Compare encoders: train a LLaVA-style model per encoder and seed, ask all the same questions, report intervals."""

import sys

from clips.common.errors import run_command
from clips.common.flags import Parser


def parser() -> Parser:
    from mllm.compare.comparison import flags_of

    p = Parser(__doc__)
    flags_of(p)
    p.add_argument("--dry-run", action="store_true", help="print the plan and run nothing")
    alone = p.add_argument_group("finished comparisons (these run nothing)")
    alone.add_argument("--verify", metavar="DIR", help="recompute the report of a directory or archive")
    alone.add_argument("--pack", metavar="DIR", help="verify this output directory and pack it into DIR.tar.xz")
    return p


def main() -> None:
    flags = parser().parse_args()
    if flags.verify or flags.pack:
        from mllm.compare.verify import pack_from_flags, verify_from_flags

        if flags.verify:
            verify_from_flags(flags.verify)
        if flags.pack:
            pack_from_flags(flags.pack)
        return
    from mllm.compare.run import compare_from_flags

    compare_from_flags(flags)


if __name__ == "__main__":
    sys.exit(run_command(main))
