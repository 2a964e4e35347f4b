"""Pretraining: prepare a run, train it in the loop of both packages, and finish it."""

import contextlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from clips.common.errors import BrokenDataError, UserError
from clips.common.files import write_json
from clips.common.live import remember_speed, say
from clips.common.profile import profiled
from clips.common.ranks import naming_lost_ranks
from clips.common.rundir import has_report, is_finished, read_metrics
from clips.common.runtime import environment, init_distributed, meet_on, shutdown
from clips.common.start import Start
from clips.common.tensors import assign_weights
from clips.config import ModelConfig, PhaseConfig, RunConfig
from clips.data.dataset import Dataset
from clips.data.loader import make_loader, micro_batch_size
from clips.data.sample import mend_broken
from clips.data.splits import split_spec
from clips.data.tokenizer import CaptionTokenizer
from clips.engine import checkpoint, watchdog
from clips.engine.checkpoint import TrainState, Writer
from clips.engine.engine import Batch, Engine, Reduced, read_ds_config
from clips.engine.log import RunLog
from clips.engine.loop import Trainer, keys_of_all_ranks, train
from clips.evaluation.evaluate import evaluate
from clips.evaluation.metrics import choosing_metric
from clips.model.clips import CLIPSModel
from clips.training.finish import finish_run, print_next
from clips.training.flops import flops_of
from clips.training.grad_cache import CachedGradients, cache_gradients
from clips.training.optim import limit_logit_scale, make_engine, rates_of
from clips.training.prepare import (
    facts_of_data,
    facts_of_run,
    open_run_dir,
    prepare_data,
    print_plan,
    read_given_weights,
    speed_name,
    with_precision,
)
from clips.training.task import Task
from clips.weights.initial import Beginning, initialise


def lr_factor(phase: PhaseConfig, step: int) -> float:
    """Return the share of the peak learning rate at optimizer step `step` of the phase (0-based)."""
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


def crosses(every: int, before: int, now: int) -> bool:
    """Return True if a multiple of `every` samples is above `before` and not above `now`; False if `every` is 0."""
    return every > 0 and now // every > before // every


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
    profile_steps: int = 0,
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
    previous = open_run_dir(run, run_dir, resume, allow_config_change=allow_config_change, dry_run=dry_run)
    has_begun = start.of_rank_0((run_dir / "config.json").exists())
    run = with_precision(run, run_dir, place)
    run = replace(run, train=replace(run.train, precision=start.of_rank_0(run.train.precision)))
    settings = read_ds_config(ds_config, "--ds-config")
    flags = {"--name": str(run_dir), "--ds-config": settings, "--resume": resume, "--dry-run": dry_run}
    start.agree(flags | facts_of_run(run, previous))
    if start.of_rank_0(_is_complete(run, run_dir, previous)):
        if start.rank == 0:
            print_next(run.data, run_dir)
        _leave(start)
        return

    start.at("the data and the tokenizer")
    initial = read_given_weights(run, run_dir) if previous is None else None
    dataset, tokenizer, val = prepare_data(run, run_dir, initial, start, has_begun=has_begun, dry_run=dry_run)
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


def plain_model(engine: Engine, config: ModelConfig, *, everywhere: bool = False) -> CLIPSModel | None:
    """Return a copy of the model outside DeepSpeed, on rank 0 or `everywhere`, for evaluation and export; else None.

    Collective.
    """
    weights = engine.zero_state.gather_weights(everywhere=everywhere)
    if not weights:
        return None
    model = CLIPSModel(config, engine.module.model.pad_id)
    model.load_state_dict(weights)
    return model.to(engine.device).eval()


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


class CLIPSTrainer(Trainer):
    """The trainer of a pretraining run: its phases, what happens on a spike, and its validations."""

    def __init__(
        self, run: RunConfig, engine: Engine, dataset: Dataset, tokenizer: CaptionTokenizer, state: TrainState,
        run_dir: Path,
    ) -> None:  # fmt: skip
        self.run, self.engine, self.dataset, self.tokenizer, self.state = run, engine, dataset, tokenizer, state
        self.run_dir = run_dir
        self.samples, self.log_every, self.logged_group = run.samples, run.train.log_every, "decay"
        self.objective: Task = engine.module
        self.local_module = self.objective.model

    @property
    def phase(self) -> PhaseConfig:
        """The phase of the last step, or of the next one once that has started."""
        return self.run.phases[self.state.phase]

    def batches(self) -> Iterator[Batch]:
        """Return the loader of this rank's micro-batches, from the current phase and step on."""
        return make_loader(
            self.dataset, self.tokenizer, self.run, rank=dist.get_rank(), world_size=self.engine.world_size,
            phase=self.state.phase, step=self.state.phase_step,
        )  # fmt: skip

    def begin_step(self) -> tuple[int, dict[str, float]]:
        """Move on to the next phase after the last step of one, and set the tower's image size."""
        state = self.state
        if state.phase_step >= self.phase.steps:
            state.phase += 1
            state.phase_step = 0
        visual = self.objective.model.visual
        if visual.image_size != self.phase.image_size:
            visual.set_image_size(self.phase.image_size)
        if state.phase_step == 0:
            state.recent_losses = []
            state.recent_norms = []
            if self.phase.fresh_optimizer:
                self.engine.zero_state.reset_optimizer()
        factor = lr_factor(self.phase, state.phase_step)
        return self.phase.batch_size, rates_of(self.phase.lr * factor, self.phase.muon_lr * factor)

    def shared_inputs(self, batches: Sequence[Batch]) -> Sequence[CachedGradients | None]:
        """Return the gradients of the contrastive loss, if that runs over the whole batch."""
        return cache_gradients(self.engine, batches)

    def cost(self, batch: Batch) -> tuple[int, int]:
        """Return the FLOPs of a micro-batch; its tokens are not counted."""
        return flops_of(self.objective, batch), 0

    def check_spike(self, reduced: Reduced, keys: list[list[str]], log: RunLog) -> bool:
        """Record a spike, and skip its update if the run says so.

        Raises DivergedError if skipping steps does not help.
        """
        state = self.state
        spike = watchdog.find_spike(state, reduced)
        if spike is not None:
            action = self.run.train.on_spike
            log.spike({"step": state.step + 1, "action": action, **spike}, keys_of_all_ranks(keys))
            if action == "skip":
                watchdog.record_skip(state, since=state.step + 1 - 2 * watchdog.PATIENCE)
                return True
        watchdog.remember(state, reduced)
        return False

    def end_step(self) -> None:
        """Clamp the logit scale, and count the step of the phase."""
        limit_logit_scale(self.engine)
        self.state.phase_step += 1

    def check_skipped(self, samples: Sequence[tuple[str, str]]) -> None:
        """Raise BrokenDataError if more samples were broken than data.max_broken_share."""
        state, most = self.state, self.run.data.max_broken_share
        if state.skipped <= max(10, most * state.samples):
            return
        reasons = "\n  ".join(f"{key}: {reason}" for key, reason in list(dict.fromkeys(samples))[-5:])
        raise BrokenDataError(
            f"{state.skipped} broken samples were met for {state.samples} that were trained on, above "
            f"data.max_broken_share = {most:.1%}; all are listed in skipped.jsonl, the last ones are\n"
            f"  {reasons}\n{mend_broken(state.skipped / state.samples)} --allow-config-change. "
            "A run on data without them needs another --name"
        )

    def saves(self) -> bool:
        """Return True if the step crossed a multiple of train.checkpoint_every samples."""
        return self._crosses(self.run.train.checkpoint_every)

    def validates(self) -> bool:
        """Return True after train.eval_every samples and at the end, if there is validation data."""
        crossed = self._crosses(self.run.train.eval_every)
        return (crossed or self.state.samples >= self.samples) and bool(split_spec(self.run.data, "val"))

    def _crosses(self, every: int) -> bool:
        return crosses(every, self.state.samples - self.phase.batch_size, self.state.samples)

    def owes_validation(self) -> bool:
        """Return True if the run has ended between a checkpoint and the validation of that step. Collective."""
        step = self.state.step
        if step == 0 or not self.validates():
            return False
        owes = dist.get_rank() == 0 and all(line.get("step") != step for line in read_metrics(self.run_dir, "eval"))
        of_rank_0 = [owes]
        dist.broadcast_object_list(of_rank_0)
        return of_rank_0[0]

    def validate_if_due(self, log: RunLog) -> None:
        """Validate if `validates` says so."""
        if self.validates():
            self.validate(log)

    def validate(self, log: RunLog) -> None:
        """Measure retrieval and zero-shot classification on (a part of) the validation split. Collective.

        Every rank encodes its share of images and texts; rank 0 has the metrics.
        """
        begin = time.perf_counter()
        model = plain_model(self.engine, self.run.model, everywhere=True)
        assert model is not None
        measured = evaluate(
            model, self.tokenizer, self.run, split="val", full=False, image_size=self.phase.image_size, sharded=True
        )
        metrics = {name: metric.value for name, metric in measured.items()}
        choosing = choosing_metric(metrics) if self.run.train.choose == "best" else None
        if choosing is not None:
            metrics["choosing"] = round(choosing, 3)
        log.record("eval", {
            "step": self.state.step, "samples": self.state.samples, "split": "val",
            "validation_seconds": round(time.perf_counter() - begin, 3), **metrics,
        })  # fmt: skip
