"""Pretraining: prepare a run, train it in the loop of both packages, and finish it."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from clips.common.distributed import Start, init_distributed, meet_on, naming_lost_ranks, shutdown
from clips.common.errors import UserError
from clips.common.files import write_json
from clips.common.live import remember_speed, say
from clips.common.profile import profiled
from clips.common.rundir import has_report, is_finished
from clips.common.runtime import environment
from clips.common.tensors import assign_weights
from clips.config import PhaseConfig, RunConfig
from clips.data.loader import micro_batch_size
from clips.data.splits import split_spec
from clips.engine import checkpoint
from clips.engine.checkpoint import TrainState, Writer
from clips.engine.engine import Engine, read_ds_config
from clips.engine.log import RunLog
from clips.engine.loop import train
from clips.model.clips import CLIPSModel
from clips.training.finish import finish_run, print_next
from clips.training.optim import make_engine
from clips.training.prepare import (
    facts_of_data,
    open_run,
    prepare_data,
    print_plan,
    read_given_weights,
    speed_name,
)
from clips.training.trainer import CLIPSTrainer, Task, plain_model
from clips.weights.initial import Beginning, initialise


def optimizer_steps(phases: Sequence[PhaseConfig], state: TrainState) -> int:
    """Return the steps taken since the optimizer began: with the run, or with the last phase that has a fresh one."""
    since = state.step
    for index in range(state.phase, 0, -1):
        if phases[index].fresh_optimizer:
            since = state.phase_step + sum(phase.steps for phase in phases[index : state.phase])
            break
    return since - sum(state.step - since <= step < state.step for step in state.left_out)


def pretrain(
    run: RunConfig, run_dir: Path, start: Start, *, device: str = "auto", ds_config: str | None = None,
    resume: str = "auto", allow_config_change: bool = False, dry_run: bool = False, report_to: Sequence[str] = (),
    profile_steps: int = 0, verify_data: bool = False,
) -> None:  # fmt: skip
    """Train `run` in `run_dir`, from its newest checkpoint if there is one, through evaluation and export.

    The ranks have met in `start`; watching by `start` ends before the first step. The process group is made here, and
    shut down before evaluation. `resume` is the --resume of the command. With `dry_run` only the plan is printed. A run
    that is complete is left as it is. The other arguments are flags of the command and do not change what is trained.
    """
    place = meet_on(start, device)
    start.at("the process group")
    init_distributed(place, start.patience / 60)
    for phase in run.phases:
        micro_batch_size(phase, run.train.accumulation, dist.get_world_size())  # indivisible: say so now

    start.at("the run directory")
    run, previous, has_begun = open_run(
        run, run_dir, resume, start, place, allow_config_change=allow_config_change, dry_run=dry_run
    )
    settings = read_ds_config(ds_config, "--ds-config")
    start.agree({
        "--name": str(run_dir), "--ds-config": settings, "--resume": resume, "--dry-run": dry_run,
        "the configuration": run.to_dict(),
        "the checkpoint to go on from": previous.path.name if previous else "none",
    })  # fmt: skip
    if start.of_rank_0(_is_complete(run, run_dir, previous)):
        if start.rank == 0:
            print_next(run.data, run_dir)
        _leave(start)
        return

    start.at("the data and the tokenizer")
    initial = read_given_weights(run, run_dir) if previous is None else None
    dataset, tokenizer, val = prepare_data(
        run, run_dir, initial, start, has_begun=has_begun, dry_run=dry_run, verify=verify_data
    )
    start.agree(facts_of_data(dataset, val, tokenizer, initial))

    start.at("the model")
    torch.manual_seed(run.train.seed)
    model = CLIPSModel(run.model, tokenizer.pad_id)
    model.freeze(run.train.freeze)
    beginning = initialise(model, initial) if initial is not None else None
    if start.rank == 0:
        print_plan(run, model, len(dataset), run_dir, place, start.ranks, previous, beginning)
    if dry_run:
        _leave(start)
        return
    if previous is not None:
        assign_weights(model, previous.weights(), previous.path)
    state = previous.state if previous is not None else TrainState(seed=run.train.seed)
    if beginning is not None:
        state.began_with = beginning.sha256

    start.at("the engine")
    engine = make_engine(Task(model, run.task, run.train), run, place, settings)
    if previous is not None:
        _restore_optimizer(engine, previous, optimizer_steps(run.phases, state))
    if start.rank == 0:
        _record(run, run_dir, previous, beginning, engine)
    start.finish()
    log = RunLog(
        run_dir, run.samples, run.to_dict(), start_step=state.step, active=start.rank == 0, report_to=report_to
    )
    trainer = CLIPSTrainer(run, engine, dataset, tokenizer, state, run_dir)
    with (
        profiled(run_dir / "profile", profile_steps, place) as profiler,
        contextlib.closing(log),
        Writer(run_dir, run.train.keep_checkpoints) as writer,
        naming_lost_ranks(lambda: state.step + 1),
    ):
        if trainer.owes_validation():
            trainer.validate(log)
        speed = train(trainer, log, writer, profiler)["samples_per_s"]
        if start.rank == 0 and speed:
            remember_speed(speed_name(run, model, start.ranks, place), speed)
        trained = plain_model(engine, run.model)
    shutdown()  # the end is rank 0's alone: nobody waits for it in a collective, however long it takes
    if trained is not None:
        # The cores of this machine's other ranks are free now.
        torch.set_num_threads(min(os.cpu_count() or 1, torch.get_num_threads() * int(os.environ["LOCAL_SIZE"])))
        finish_run(run, trained, tokenizer, run_dir)


def _is_complete(run: RunConfig, run_dir: Path, previous: checkpoint.Checkpoint | None) -> bool:
    """Return True if the run has ended, and its export, its report and, if it holds any data out, its metrics exist."""
    is_trained = previous is not None and previous.state.samples == run.samples
    if not (is_trained and is_finished(run_dir) and has_report(run_dir)):
        return False
    # `is_finished` does not look at the data: to it an evaluation that was removed is one that is not due.
    is_measured = (run_dir / "evaluation.json").is_file()
    return is_measured or not any(split_spec(run.data, split) for split in ("test", "val"))


def _leave(start: Start) -> None:
    start.close()
    shutdown()


def _restore_optimizer(engine: Engine, previous: checkpoint.Checkpoint, steps: int) -> None:
    try:
        engine.zero_state.restore_optimizer(previous.optimizer(), steps)
    except KeyError as error:
        raise UserError(
            f"{previous.path} holds no {error}: optim.kind cannot change in a run, and a frozen tower stays frozen"
        ) from None


def _record(
    run: RunConfig,
    run_dir: Path,
    previous: checkpoint.Checkpoint | None,
    beginning: Beginning | None,
    engine: Engine,
) -> None:
    """Write the records of a run before its first step."""
    if previous is not None and (aside := checkpoint.rewind(run_dir, previous)) is not None:
        say(f"newer checkpoints than {previous.path.name} are put aside: {aside}")
    if beginning is not None:
        beginning.save(run_dir)
    run.save(run_dir / "config.json")
    write_json(run_dir / "env.json", environment(engine.device, engine.world_size) | engine.facts)
