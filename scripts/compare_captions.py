#!/usr/bin/env python
"""Which long captions teach an encoder best: the same small encoder on the same pictures with each set of captions."""

import sys
from pathlib import Path
from typing import Any

from clips.common.errors import UserError, run_command
from clips.common.flags import Parser, given

SET: dict[str, Any] = {"nargs": "+", "action": "extend", "default": [], "metavar": "FIELD=VALUE"}


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument(
        "--sets",
        metavar="NAME=DATA,…",
        help="sets of the same pairs with different long captions, as recaption.py writes them (default: the demo "
        "study, with captions of the newest model trained here, of a CLIPS captioner, and the demo's exact ones)",
    )
    p.add_argument("--fields", nargs="+", default=[], metavar="PART=FIELD", help="parts of the sets and the test data")
    p.add_argument(
        "--test-data",
        nargs="+",
        metavar="DATA",
        help="test data; unseen=DATA behind the first decides (default: the demo's test pictures, and the same drawn "
        "by an artist that no training shows)",
    )
    p.add_argument("--model", help="for the demo study: the captioning model (default: the newest one)")
    p.add_argument("--shards", type=int, default=3, help="for the demo study: shards that are captioned")
    p.add_argument("--seeds", type=int, default=3, help="runs of each set")
    p.add_argument("--samples", type=int, default=32_000, help="samples that each run sees")
    p.add_argument("--jobs", type=int, default=2, help="runs beside each other, which share the cores")
    p.add_argument("--output", default="runs/compare_captions", help="folder of the runs and of the result")
    p.add_argument("--set", help="fields of clips/config.py for every run", **SET)
    p.add_argument("--dry-run", action="store_true", help="print the plan with the estimated time, and stop")
    return p


def main() -> None:
    flags = parser().parse_args()
    output, notes = Path(flags.output), []
    if flags.sets and given(parser(), sys.argv[1:]) & {"model", "shards"}:
        raise UserError("--shards and --model are of the demo study: leave them out beside --sets")
    from clips.studies.captions import compare_sets, parse_sets, print_encoders

    if flags.sets:
        sets = parse_sets(flags.sets)
    else:
        from mllm.recaption.study import plan_study

        chosen = {key: getattr(flags, key) for key in ("samples", "shards", "model")}
        study = plan_study(output, settings=flags.set, **chosen)
        sets, notes = study.sets, study.notes
        study.make(dry_run=flags.dry_run)
        if flags.dry_run:
            print_encoders(sets, flags.seeds, flags.samples, flags.jobs)
            return
    options = {key: getattr(flags, key) for key in ("fields", "test_data", "seeds", "samples", "jobs", "dry_run")}
    compare_sets(sets, output, settings=flags.set, notes=notes, **options)


if __name__ == "__main__":
    sys.exit(run_command(main))
