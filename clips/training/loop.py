"""Pretraining: prepare a run, the loop, and what happens at its end."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import profile

from clips.common.errors import BrokenDataError, CommandError, NotFiniteError, UserError
from clips.common.escape import printable
from clips.common.files import write_json
from clips.common.peaks import peak_flops
from clips.common.profile import profiled
from clips.common.ranks import naming_lost_ranks
from clips.common.rundir import has_report, is_finished, read_metrics
from clips.common.runtime import environment, init_distributed, meet_on, shutdown
from clips.common.signals import StopSignal, stopped_by
from clips.common.start import Start
from clips.common.tensors import assign_weights
from clips.config import PhaseConfig, RunConfig
from clips.data.loader import make_loader, micro_batch_size
from clips.data.sample import mend_broken
from clips.data.sources import Source
from clips.data.splits import split_spec
from clips.data.tokenizer import CaptionTokenizer
from clips.evaluation.evaluate import evaluate
from clips.evaluation.metrics import choosing_figure
from clips.model.clips import CLIPSModel
from clips.training import watchdog
from clips.training.engine import Agreed, Engine, read_ds_config
from clips.training.finish import finish_run, print_next
from clips.training.grad_cache import forward_passes
from clips.training.log import RunLog
from clips.training.meter import Meter
from clips.training.plan import print_memory
from clips.training.prepare import (
    Options,
    facts_of_data,
    facts_of_run,
    open_run_dir,
    prepare_data,
    print_plan,
    read_given_weights,
    with_precision,
)
from clips.training.task import Task
from clips.weights import checkpoint
from clips.weights.checkpoint import TrainState, Writer
from clips.weights.initial import Beginning, initialise


def lr_factor(phase: PhaseConfig, step: int) -> float:
    """Share of the peak learning rate at optimizer step `step` of the phase (0-based)."""
    warmup = phase.warmup_samples / phase.batch_size
    if step + 1 <= warmup:
        return (step + 1) / warmup
    if phase.schedule == "cosine":
        progress = (step - warmup) / max(1.0, phase.steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * progress))
    if phase.schedule == "constant":
        return 1.0
    falling = phase.steps - warmup if phase.schedule == "linear" else phase.steps / 3
    return min(1.0, (phase.steps - step) / falling)


def optimizer_steps(run: RunConfig, state: TrainState) -> int:
    """Steps taken since the optimizer began: with the run, or anew with the last phase that asks for it."""
    since = state.step
    for index in range(state.phase, 0, -1):
        if run.phases[index].fresh_optimizer:
            since = state.phase_step + sum(phase.steps for phase in run.phases[index : state.phase])
            break
    return since - sum(state.step - since <= step < state.step for step in state.left_out)


def pretrain(run: RunConfig, options: Options, start: Start) -> None:
    """Train `run` in `options.run_dir`, from its newest checkpoint if there is one, through evaluation and export.

    The ranks have met in `start`, which ends with the first step.
    """
    device = meet_on(start, options.device)
    start.at("the process group")
    init_distributed(device, options.timeout_minutes)
    for phase in run.phases:
        micro_batch_size(phase, run.train.accumulation, dist.get_world_size())  # indivisible: say so now

    start.at("the run directory")
    previous = open_run_dir(run, options)
    has_begun = start.of_rank_0((options.run_dir / "config.json").exists())
    run = with_precision(run, options.run_dir, device)
    run = replace(run, train=replace(run.train, precision=start.of_rank_0(run.train.precision)))
    ds_config = read_ds_config(options.ds_config)
    start.agree(facts_of_run(run, options, previous, ds_config))
    is_trained = previous is not None and previous.state.samples == run.samples
    if start.of_rank_0(is_trained and is_finished(options.run_dir) and has_report(options.run_dir)):
        if start.rank == 0:
            print_next(run, options.run_dir)
        start.close()
        shutdown()
        return

    start.at("the data and the tokenizer")
    initial = read_given_weights(run, options) if previous is None else None
    source, tokenizer = prepare_data(run, options, initial, start, has_begun=has_begun)
    start.agree(facts_of_data(source, tokenizer, initial))

    start.at("the model")
    torch.manual_seed(run.train.seed)
    model = CLIPSModel(run.model, tokenizer.pad_id)
    model.freeze(run.train.freeze)
    beginning = initialise(model, initial) if initial is not None else None
    if start.rank == 0:
        print_plan(run, model, len(source), options.run_dir, device, start.ranks, previous, beginning)
    if options.dry_run:
        start.close()
        shutdown()
        if start.rank == 0:
            print_memory(run, start.ranks, ds_config.get("zero_optimization", {}))
        return
    if previous is not None:
        assign_weights(model, previous.weights(), previous.path)
    state = previous.state if previous is not None else TrainState(seed=run.train.seed)
    if beginning is not None:
        state.began_with = beginning.sha256

    start.at("the engine")
    engine = Engine(Task(model, run), run, device, ds_config)
    if previous is not None:
        try:
            engine.state.restore_optimizer(previous.optimizer(), optimizer_steps(run, state))
        except KeyError as error:
            raise UserError(
                f"{previous.path} holds no {error}: optim.kind cannot change within a run, nor can a tower thaw"
            ) from None
    if start.rank == 0:
        _record(run, options, previous, beginning, engine)
    start.finish()
    log = RunLog(run, options.run_dir, start_step=state.step, active=start.rank == 0, report_to=options.report_to)
    with (
        profiled(options.run_dir / "profile", options.profile_steps, device) as profiler,
        contextlib.closing(log),
        Writer(options.run_dir, run.train.keep_checkpoints) as writer,
        naming_lost_ranks(lambda: state.step + 1),
    ):
        _train(run, engine, source, tokenizer, state, log, profiler, writer)
        trained = engine.plain_model()
    shutdown()  # the end is rank 0's alone: nobody waits for it in a collective, however long it takes
    if trained is not None:
        # The cores of this machine's other ranks are free now.
        torch.set_num_threads(min(os.cpu_count() or 1, torch.get_num_threads() * int(os.environ["LOCAL_SIZE"])))
        finish_run(run, trained, tokenizer, options.run_dir)


def _record(
    run: RunConfig,
    options: Options,
    previous: checkpoint.Checkpoint | None,
    beginning: Beginning | None,
    engine: Engine,
) -> None:
    """Write what tells of the run before its first step."""
    if previous is not None and (aside := checkpoint.rewind(options.run_dir, previous)) is not None:
        print(printable(f"newer checkpoints than {previous.path.name} are put aside: {aside}"), file=sys.stderr)
    if beginning is not None:
        beginning.save(options.run_dir)
    run.save(options.run_dir / "config.json")
    write_json(options.run_dir / "env.json", environment(engine.device, engine.world_size) | engine.facts)


def _train(
    run: RunConfig,
    engine: Engine,
    source: Source,
    tokenizer: CaptionTokenizer,
    state: TrainState,
    log: RunLog,
    profiler: profile | None,
    writer: Writer,
) -> None:
    """The loop: every optimizer step from `state` on, with its log lines, checkpoints and validations."""
    stop = StopSignal()
    # In ZeRO-3 ranks wait for each other's weights inside the model.
    own_time = watchdog.OwnTime(engine.model, engine.device) if engine.stage < 3 else None
    meter = Meter(engine.device, state, own_time, peak_flops(engine.device))
    if _owes_validation(run, state, writer.run_dir):
        with meter.aside():
            _validate(run, engine, tokenizer, state, log)
    batches = meter.timed(make_loader(
        source, tokenizer, run, rank=dist.get_rank(), world_size=engine.world_size,
        phase=state.phase, step=state.phase_step,
    ))  # fmt: skip

    while (phase := _phase_of_next_step(run, engine, state)) is not None:
        factor = lr_factor(phase, state.phase_step)
        engine.set_lr(phase.lr * factor, phase.muon_lr * factor)

        losses: list[Tensor] = []
        keys: list[list[str]] = []
        for batch, loss, parts in forward_passes(engine, islice(batches, run.train.accumulation)):
            engine.backward(loss)
            losses.append(parts["loss"])
            keys.append(batch["keys"])
            meter.add(parts, batch["skipped"], engine.task.flops(batch))
            if len(losses) < engine.accumulation:
                engine.step()

        agreed = engine.agree(torch.stack(losses).mean(), stop.requested, writer.has_failed())
        if agreed.unsaved:
            await_checkpoint(writer)  # raises
        if not agreed.finite:
            _end_not_finite(run, state, losses, keys)
        engine.step(leave_out=_is_left_out(run, state, agreed, keys, log))
        engine.limit_logit_scale()
        if profiler is not None:
            profiler.step()
        state.step += 1
        state.samples += phase.batch_size
        state.phase_step += 1

        saving = due(run.train.checkpoint_every, state, phase) or _is_last(run, state) or agreed.stopping > 0
        # A checkpoint needs a line too: the means begin anew after it.
        if state.step % run.train.log_every == 0 or saving:
            skipped = meter.log(log, state, phase.lr * factor, agreed.grad_norm)
            if state.skipped > max(10, run.data.max_broken_share * state.samples):
                raise _too_many_broken(run, state, skipped)
        with meter.aside():
            if saving:
                save(engine, state, writer)
            if agreed.stopping:  # a validation that is due follows when the run goes on
                await_checkpoint(writer)
                raise stopped_by(agreed.stopping)
            if _validates(run, state):
                _validate(run, engine, tokenizer, state, log)
    batches.close()
    await_checkpoint(writer)
    if state.samples > meter.first:
        log.say(meter.summary(state))
    stop.restore()


def _is_left_out(run: RunConfig, state: TrainState, agreed: Agreed, keys: list[list[str]], log: RunLog) -> bool:
    """Say whether the update of the step is left out; record it where it is a spike. Collective at a spike.

    Raises DivergedError if leaving steps out does not help.
    """
    figures = watchdog.find_spike(state, agreed)
    if figures is not None:
        action = run.train.on_spike
        log.spike({"step": state.step + 1, "action": action, **figures}, _keys_of_all_ranks(keys))
        if action == "skip":
            watchdog.leave_out(state, since=state.step + 1 - 2 * watchdog.PATIENCE)
            return True
    watchdog.remember(state, agreed)
    return False


def _end_not_finite(run: RunConfig, state: TrainState, losses: list[Tensor], keys: list[list[str]]) -> NoReturn:
    """End the run on every rank, weights untouched, with the samples of the micro-batches that are not finite.

    The contrastive loss runs over all ranks: the samples of one rank break the losses of all.
    """
    own = [names for loss, names in zip(losses, keys, strict=True) if not torch.isfinite(loss).all()]
    broken = _keys_of_all_ranks(own)
    where = "\n".join(f"  rank {rank}: {', '.join(names)}" for rank, names in enumerate(broken) if names)
    named = "Every loss was finite."
    if where:
        named = f"Samples of the micro-batches whose loss is not finite:\n{where}"
    raise NotFiniteError(
        f"the loss or a gradient is not finite at step {state.step + 1} (phase {run.phases[state.phase].name}); no "
        f"weight was changed.\n{named}"
    )


def _keys_of_all_ranks(keys: list[list[str]]) -> list[list[str]]:
    """The keys of each rank's samples, from those of this rank's micro-batches."""
    of_ranks: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, [key for names in keys for key in names])
    return of_ranks


def _too_many_broken(run: RunConfig, state: TrainState, skipped: list[tuple[str, str]]) -> BrokenDataError:
    """The error for more broken samples than data.max_broken_share; `skipped` are those since the last line."""
    reasons = "\n  ".join(f"{key}: {reason}" for key, reason in list(dict.fromkeys(skipped))[-5:])
    return BrokenDataError(
        f"{state.skipped} broken samples were met for {state.samples} that were trained on, above "
        f"data.max_broken_share = {run.data.max_broken_share:.1%}; all are listed in skipped.jsonl, the last ones are\n"
        f"  {reasons}\n{mend_broken(state.skipped / state.samples)} --allow-config-change. "
        "A run on data without them needs another --name"
    )


def save(engine: Engine, state: TrainState, writer: Writer) -> None:
    """Copy the content of a checkpoint to rank 0's memory, and begin to write it. Collective."""
    await_checkpoint(writer)  # one at a time: in memory, too
    weights = engine.state.gather_weights()
    optimizer = engine.state.gather_optimizer()
    if dist.get_rank() == 0:
        writer.begin(weights, optimizer, state)


def await_checkpoint(writer: Writer) -> None:
    """Wait until the checkpoint in progress is written. Raises CommandError on every rank if it failed. Collective."""
    failure = [writer.wait()]
    dist.broadcast_object_list(failure)
    if failure[0] is not None:
        raise CommandError(
            f"{failure[0]}. The older ones are intact: make room, then the same command goes on from the last one"
        )


def _phase_of_next_step(run: RunConfig, engine: Engine, state: TrainState) -> PhaseConfig | None:
    """The phase of the next step, None after the last step. The engine is prepared for this step."""
    if state.phase < len(run.phases) and state.phase_step >= run.phases[state.phase].steps:
        state.phase, state.phase_step = state.phase + 1, 0
    if state.phase >= len(run.phases):
        return None
    phase = run.phases[state.phase]
    if engine.model.visual.image_size != phase.image_size:
        engine.model.visual.set_image_size(phase.image_size)
    if state.phase_step == 0:
        state.recent_losses, state.recent_norms = [], []
        if phase.fresh_optimizer:
            engine.state.reset_optimizer()
    return phase


def due(every: int, state: TrainState, phase: PhaseConfig) -> bool:
    """Whether the step that just ended crossed a multiple of `every` samples (0 = never)."""
    return every > 0 and state.samples // every > (state.samples - phase.batch_size) // every


def _is_last(run: RunConfig, state: TrainState) -> bool:
    """Whether the step that just ended was the last one of the run."""
    return state.phase == len(run.phases) - 1 and state.phase_step == run.phases[-1].steps


def _validates(run: RunConfig, state: TrainState) -> bool:
    """Whether the step that just ended is followed by an evaluation."""
    is_due = due(run.train.eval_every, state, run.phases[state.phase]) or _is_last(run, state)
    return is_due and bool(split_spec(run.data, "val"))


def _owes_validation(run: RunConfig, state: TrainState, run_dir: Path) -> bool:
    """Whether a run that goes on was ended between its checkpoint and the evaluation of that step. Collective."""
    if state.step == 0 or not _validates(run, state):
        return False
    owes = [dist.get_rank() == 0 and all(line.get("step") != state.step for line in read_metrics(run_dir, "eval"))]
    dist.broadcast_object_list(owes)
    return owes[0]


def _validate(run: RunConfig, engine: Engine, tokenizer: CaptionTokenizer, state: TrainState, log: RunLog) -> None:
    """Retrieval and zero-shot classification on (a part of) the validation split. Collective.

    Every rank encodes its share of pictures and texts; rank 0 has the figures.
    """
    begin = time.perf_counter()
    model = engine.plain_model(everywhere=True)
    assert model is not None
    size = run.phases[state.phase].image_size
    measured = evaluate(model, tokenizer, run, split="val", full=False, image_size=size, sharded=True)
    figures = {name: figure.value for name, figure in measured.items()}
    choosing = choosing_figure(figures) if run.train.choose == "best" else None
    if choosing is not None:
        figures["choosing"] = round(choosing, 3)
    log.record("eval", {
        "step": state.step, "samples": state.samples, "split": "val",
        "validation_seconds": round(time.perf_counter() - begin, 3), **figures,
    })  # fmt: skip
