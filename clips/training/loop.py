"""Pretraining: prepare a run, the loop, and what happens at its end."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import torch
import torch.distributed as dist

from clips.common.errors import CommandError, NotFiniteError, UserError
from clips.common.files import write_json
from clips.common.profile import Profiler, profiled
from clips.common.ranks import naming_lost_ranks
from clips.common.rundir import has_report, is_finished
from clips.common.runtime import choose_device, environment, init_distributed, shutdown
from clips.common.signals import StopSignal
from clips.common.tensors import assign_weights
from clips.config import PhaseConfig, RunConfig
from clips.data.loader import make_loader, micro_batch_size
from clips.data.sources import Source
from clips.data.splits import split_spec
from clips.data.tokenizer import CaptionTokenizer
from clips.evaluation.evaluate import evaluate
from clips.model.clips import CLIPSModel
from clips.training.engine import Engine, read_ds_config
from clips.training.finish import finish_run, print_next
from clips.training.log import Meter, RunLog
from clips.training.prepare import (
    Options,
    check_ranks_agree,
    open_run_dir,
    prepare_data,
    print_plan,
    read_given_weights,
    with_precision,
)
from clips.training.task import Task
from clips.weights import checkpoint
from clips.weights.checkpoint import TrainState
from clips.weights.initial import initialise


def lr_factor(phase: PhaseConfig, step: int) -> float:
    """Share of the peak learning rate at optimizer step `step` of the phase (0-based)."""
    warmup = phase.warmup_samples / phase.batch_size
    if step + 1 <= warmup:
        return (step + 1) / warmup
    if phase.schedule == "cosine":
        progress = (step - warmup) / max(1.0, phase.steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * progress))
    return min(1.0, (phase.steps - step) / (phase.steps / 3))  # constant, then linear over the last third


def optimizer_steps(run: RunConfig, state: TrainState) -> int:
    """Steps since the optimizer began: with the run, or anew with the last phase that asks for it."""
    for index in range(state.phase, 0, -1):
        if run.phases[index].fresh_optimizer:
            return state.phase_step + sum(phase.steps for phase in run.phases[index : state.phase])
    return state.step


def pretrain(run: RunConfig, options: Options) -> None:
    """Train `run` in `options.run_dir`, from its newest checkpoint if there is one, through evaluation and export."""
    device = choose_device(options.device)
    init_distributed(device, options.timeout_minutes)
    is_main = dist.get_rank() == 0
    for phase in run.phases:
        micro_batch_size(phase, run.train.accumulation, dist.get_world_size())  # indivisible: say so before phase 1
    previous = open_run_dir(run, options)
    run = with_precision(run, options.run_dir, device)
    is_trained = previous is not None and previous.state.samples == run.samples
    if is_trained and is_finished(options.run_dir) and has_report(options.run_dir):
        if is_main:
            print_next(options.run_dir)
        shutdown()
        return
    initial = read_given_weights(run, options) if previous is None else None
    source, tokenizer = prepare_data(run, options, initial)
    check_ranks_agree(previous, source, initial)
    torch.manual_seed(run.train.seed)
    model = CLIPSModel(run.model, tokenizer.pad_id)
    model.freeze(run.train.freeze)
    beginning = initialise(model, initial) if initial is not None else None
    ds_config = read_ds_config(options.ds_config)
    if is_main:
        zero, ranks = ds_config.get("zero_optimization", {}), dist.get_world_size()
        print_plan(run, model, len(source), options.run_dir, device, ranks, previous, zero, beginning)
    if options.dry_run:
        shutdown()
        return
    if previous is not None:
        assign_weights(model, previous.weights(), previous.path)
    state = previous.state if previous is not None else TrainState(seed=run.train.seed)
    if beginning is not None:
        state.began_with = beginning.sha256
    engine = Engine(Task(model, run), run, device, ds_config)
    if previous is not None:
        try:
            engine.state.restore_optimizer(previous.optimizer(), optimizer_steps(run, state))
        except KeyError as error:
            raise UserError(
                f"{previous.path} holds no {error}: optim.kind cannot change within a run, nor can a tower thaw"
            ) from None
    if is_main:
        if beginning is not None:
            beginning.save(options.run_dir)
        run.save(options.run_dir / "config.json")
        write_json(options.run_dir / "env.json", environment(device, engine.world_size) | engine.facts)
    log = RunLog(run, options.run_dir, start_step=state.step, wandb=options.wandb, active=is_main)
    with (
        profiled(options.run_dir / "profile", options.profile_steps, device) as profiler,
        contextlib.closing(log),
        naming_lost_ranks(lambda: state.step + 1),
    ):
        _train(run, engine, source, tokenizer, state, log, profiler, options.run_dir)
    _finish(run, engine, tokenizer, options.run_dir)
    shutdown()


def _train(
    run: RunConfig,
    engine: Engine,
    source: Source,
    tokenizer: CaptionTokenizer,
    state: TrainState,
    log: RunLog,
    profiler: Profiler,
    run_dir: Path,
) -> None:
    """The loop: every phase, every optimizer step, every micro-batch."""
    stop = StopSignal()
    meter = Meter(engine.device, state)
    for index, phase in list(enumerate(run.phases))[state.phase :]:
        engine.model.visual.set_image_size(phase.image_size)
        if phase.fresh_optimizer and state.phase_step == 0:
            engine.state.reset_optimizer()
        first = sum(p.steps * p.batch_size for p in run.phases[:index])
        loader = make_loader(
            source, tokenizer, run, phase, start=state.phase_step, stop=phase.steps, first_position=first,
            rank=dist.get_rank(), world_size=engine.world_size,
        )  # fmt: skip
        batches = meter.timed(loader)
        for step in range(state.phase_step, phase.steps):
            factor = lr_factor(phase, step)
            engine.set_lr(phase.lr * factor, phase.muon_lr * factor)
            seen = []
            for micro in range(run.train.accumulation):
                batch = next(batches)
                loss, parts = engine(engine.to_device(batch))
                seen.append((loss.detach(), batch["keys"]))
                engine.backward(loss)
                if micro == run.train.accumulation - 1:
                    finite, stopping = engine.agree(loss, bool(stop.requested))
                    if not finite:
                        _not_finite(seen, state, phase)
                engine.step()
                meter.add(parts, batch["skipped"])
            engine.limit_logit_scale()
            profiler.step()
            state.step, state.samples, state.phase_step = state.step + 1, state.samples + phase.batch_size, step + 1
            last = index == len(run.phases) - 1 and state.phase_step == phase.steps
            saving = due(run.train.checkpoint_every, state, phase) or last or stopping
            if state.step % run.train.log_every == 0 or saving:  # with a checkpoint too: its means begin anew after it
                meter.log(log, state, phase.lr * factor, engine.grad_norm(), run.data.max_broken_share)
            with meter.aside():
                if (due(run.train.eval_every, state, phase) or last) and split_spec(run.data, "val"):
                    _validate(run, engine, tokenizer, state, log)
                if saving:
                    _save(run, engine, state, run_dir)
            if stopping:
                raise stop.error()
        state.phase, state.phase_step = index + 1, 0
    if state.samples > meter.first:
        log.say(meter.summary(state))
    stop.restore()


def due(every: int, state: TrainState, phase: PhaseConfig) -> bool:
    """Whether the step that just ended crossed a multiple of `every` samples (0 = never)."""
    return every > 0 and state.samples // every > (state.samples - phase.batch_size) // every


def _not_finite(seen: list[tuple[torch.Tensor, list[str]]], state: TrainState, phase: PhaseConfig) -> None:
    """End the run on every rank, weights untouched, naming the samples of the micro-batches that are not finite.

    `seen`: this rank's loss and sample keys of each micro-batch of the step. The contrastive loss runs over all
    ranks, so what one rank's samples break is not finite on the others either.
    """
    mine = [key for loss, keys in seen if not torch.isfinite(loss).all() for key in keys]
    parts: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, mine)
    culprits = {rank: keys for rank, keys in enumerate(parts) if keys}
    where = "\n".join(f"  rank {rank}: {', '.join(keys)}" for rank, keys in culprits.items())
    raise NotFiniteError(
        f"the loss or a gradient is not finite at step {state.step + 1} (phase {phase.name}); no weight was changed.\n"
        + (f"Samples of the micro-batches whose loss is not finite:\n{where}" if where else "Every loss was finite.")
    )


def _validate(run: RunConfig, engine: Engine, tokenizer: CaptionTokenizer, state: TrainState, log: RunLog) -> None:
    """Retrieval and zero-shot classification on (a part of) the validation split, on rank 0."""
    model = engine.plain_model()
    if model is not None:
        size = run.phases[state.phase].image_size
        measured = evaluate(model, tokenizer, run, split="val", full=False, image_size=size)
        figures = {name: figure.value for name, figure in measured.items()}
        log.record("eval", {"step": state.step, "samples": state.samples, "split": "val", **figures})
        score = figures.get("sentence_t2i_r1", figures.get("part_t2i_r1"))
        state.best = max(filter(None, (state.best, score)), default=None)
    dist.barrier()


def _save(run: RunConfig, engine: Engine, state: TrainState, run_dir: Path) -> None:
    """Write a checkpoint from rank 0; when that fails every rank ends, and the older checkpoints are intact."""
    weights, optimizer = engine.state.gather_weights(), engine.state.gather_optimizer()
    failure: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            checkpoint.save(run_dir, weights, optimizer, state, run.train.keep_checkpoints)
        except OSError as error:
            failure = [str(error)]
    dist.broadcast_object_list(failure)
    if failure[0] is not None:
        raise CommandError(
            f"the checkpoint of step {state.step} cannot be written to {run_dir}: {failure[0]}. The older ones are "
            "intact: make room, then the same command goes on from the last one"
        )


def _finish(run: RunConfig, engine: Engine, tokenizer: CaptionTokenizer, run_dir: Path) -> None:
    """Evaluate on the test split, export, write the report; rank 0."""
    model = engine.plain_model()
    if model is not None:
        finish_run(run, model, tokenizer, run_dir)
    dist.barrier()
