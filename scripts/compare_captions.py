#!/usr/bin/env python
"""Which long captions teach an encoder best: the same small encoder on the same pictures with each set of captions."""

import argparse
import sys
from pathlib import Path

from clips.common.errors import UserError, run_command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument(
        "--sets",
        metavar="NAME=DATA,…",
        help="sets of the same pairs with different long captions, as scripts/recaption.py writes them; without it the "
        "demo study: captions of the newest model trained here, of a CLIPS captioner, and the demo's exact ones",
    )
    p.add_argument(
        "--fields",
        nargs="+",
        default=[],
        metavar="PART=FIELD",
        help="of the sets and the test data, as in scripts/pretrain_clips.py",
    )
    p.add_argument(
        "--test-data", nargs="+", metavar="DATA",
        help="what the encoders are measured on, and as unseen=DATA behind it what decides; without it the demo's test "
        "pictures, and the same drawn by an artist that no training shows",
    )  # fmt: skip
    p.add_argument("--model-path", metavar="DIR_OR_ID", help="for the demo study: a model instead of the newest one")
    p.add_argument("--shards", type=int, default=3, help="for the demo study: shards that are captioned")
    p.add_argument("--seeds", type=int, default=3, help="runs of each set")
    p.add_argument("--samples", type=int, default=32_000, help="samples that each run sees")
    p.add_argument("--jobs", type=int, default=2, help="runs beside each other, which share the cores")
    p.add_argument("--output", default="runs/compare_captions", help="where runs and reports are written")
    p.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
        help="fields of clips/config.py for every run, as in scripts/pretrain_clips.py",
    )  # fmt: skip
    p.add_argument("--dry-run", action="store_true", help="print the plan with the estimated time, and stop")
    return p


def main() -> None:
    flags = parser().parse_args()
    if flags.sets and (flags.model_path or flags.shards != parser().get_default("shards")):
        raise UserError("--shards and --model-path are of the demo study: leave them out beside --sets")
    from clips.studies.caption_sets import compare_sets, encoders_seconds, parse_sets

    output, notes = Path(flags.output), []
    if flags.sets:
        sets = parse_sets(flags.sets)
    else:
        from mllm.recaption.study import plan_study

        chosen = {key: getattr(flags, key) for key in ("samples", "shards", "model_path")}
        study = plan_study(output, settings=flags.set, **chosen)
        sets, notes = study.sets, study.notes
        seconds = encoders_seconds(len(sets), flags.seeds, flags.samples, flags.jobs)
        study.show((len(sets) + 1) * flags.seeds, flags.samples, seconds)
        if flags.dry_run:
            return
        study.make()
    options = {key: getattr(flags, key) for key in ("fields", "test_data", "seeds", "samples", "jobs", "dry_run")}
    compare_sets(sets, output, settings=flags.set, notes=notes, **options)


if __name__ == "__main__":
    sys.exit(run_command(main))
