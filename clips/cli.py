"""From the flags of scripts/pretrain_clips.py to a RunConfig."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import replace
from pathlib import Path

from clips.config import Fields, RunConfig
from clips.errors import UserError
from clips.prepare import Options
from clips.recipes import debug_twin, recipe


def pretrain_from_flags(flags: argparse.Namespace) -> None:
    """Build the configuration that `flags` describe and train it."""
    from clips.train import pretrain  # imports torch and deepspeed: not before the flags are known to be right

    run = config_from_flags(flags)
    name = flags.name or (f"{run.recipe}-debug" if flags.debug else run.recipe)
    pretrain(
        run,
        Options(
            run_dir=Path(flags.output_dir) / name,
            device=flags.device,
            ds_config=flags.ds_config,
            resume=flags.resume,
            allow_config_change=flags.allow_config_change,
            dry_run=flags.dry_run,
            wandb=flags.wandb,
        ),
    )


def config_from_flags(flags: argparse.Namespace) -> RunConfig:
    """The recipe, its debug twin if asked for, then the flags, then --set."""
    run = recipe(flags.recipe)
    if flags.debug:
        run = debug_twin(run)
    given = {"train": flags.data, "val": flags.val_data, "test": flags.test_data, "image_root": flags.image_root}
    data = replace(run.data, **{key: value for key, value in given.items() if value is not None})
    if flags.fields:
        data = replace(data, fields=parse_fields(flags.fields, data.fields))
    run = replace(run, data=data, train=replace(run.train, seed=flags.seed))
    per_phase = {"samples": flags.samples, "batch_size": flags.batch_size}
    for key, value in per_phase.items():
        if value is not None:
            run = run.override([f"phases.*.{key}={json.dumps(value)}"])
    run = run.override(flags.set)
    if not run.data.train:
        raise UserError(
            f"recipe {run.recipe} needs training data: --data 'shards/*.tar', or a table (README, “Your own data”)"
        )
    return run


def parse_fields(assignments: list[str], fields: Fields) -> Fields:
    """`image=jpg web=json:alt long=txt` → Fields."""
    known = [field.name for field in dataclasses.fields(Fields)]
    for assignment in assignments:
        part, separator, field = assignment.partition("=")
        if part not in known or not separator or not field:
            raise UserError(f"--fields {assignment!r} must look like PART=FIELD with PART one of: {', '.join(known)}")
        fields = replace(fields, **{part: field})
    return fields
