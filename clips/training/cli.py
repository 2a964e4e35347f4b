"""From the flags of scripts/pretrain_clips.py to a RunConfig."""

from __future__ import annotations

import argparse
import signal
from dataclasses import replace
from pathlib import Path

from clips.common.errors import Stopped, UserError
from clips.config import PhaseConfig, RunConfig, parse_fields
from clips.recipes import debug_twin, recipe


def pretrain_from_flags(flags: argparse.Namespace) -> None:
    """Build the configuration that `flags` describe and train it."""
    run = config_from_flags(flags)
    if flags.profile < 0:
        raise UserError(f"--profile {flags.profile}: give the number of steps to record, or 0")
    from clips.training.loop import pretrain  # to be right
    from clips.training.prepare import (
        Options,  # these import all of torch and deepspeed: not before the flags are known
    )

    options = Options(
        run_dir=Path(flags.output_dir) / (flags.name or (f"{run.recipe}-debug" if flags.debug else run.recipe)),
        device=flags.device,
        ds_config=flags.ds_config,
        resume=flags.resume,
        allow_config_change=flags.allow_config_change,
        dry_run=flags.dry_run,
        wandb=flags.wandb,
        profile_steps=flags.profile,
        timeout_minutes=flags.timeout_minutes,
    )
    try:
        pretrain(run, options)
    except KeyboardInterrupt:  # before or after the loop, or for the second time in it
        message = "stopped by Ctrl-C; the same command goes on from the last checkpoint"
        raise Stopped(message, exit_code=128 + signal.SIGINT) from None


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
    assignments = []
    if flags.samples is not None:
        assignments = [f"phases.*.samples={flags.samples}"]
        # The warm-up keeps its share of the phase: a recipe's own could be longer than the whole of a short run.
        assignments += [f"phases.{i}.warmup_samples={_scaled(p, flags.samples)}" for i, p in enumerate(run.phases)]
    if flags.batch_size is not None:
        assignments.append(f"phases.*.batch_size={flags.batch_size}")
    run = run.override(assignments + flags.set)  # all at once: one alone may not fit the recipe
    if not run.data.train:
        raise UserError(
            f"recipe {run.recipe} needs training data: --data 'shards/*.tar', or a table (README, “Your own data”)"
        )
    return run


def _scaled(phase: PhaseConfig, samples: int) -> int:
    return phase.warmup_samples * samples // phase.samples
