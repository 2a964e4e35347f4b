"""The training loop of both packages: batches, passes, agreement, step, log, checkpoint."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import profile

from clips.common.errors import CommandError, NotFiniteError
from clips.common.signals import StopSignal, stopped_by
from clips.engine.checkpoint import TrainState, Writer
from clips.engine.engine import Batch, Engine, Reduced
from clips.engine.log import RunLog
from clips.engine.metrics import Meter, OwnTime, peak_flops, summary


class Trainer:
    """Interface between the training loop and a package: subclasses provide engine, data and the hooks below."""

    engine: Engine
    state: TrainState
    """The progress; the loop updates it."""
    samples: int
    """Samples of the full training."""
    log_every: int
    """Steps between two lines of the log."""
    logged_group: str
    """The parameter group whose learning rate the log shows."""
    local_module: nn.Module
    """Module in whose forward pass a rank waits for no other rank, below ZeRO-3; its time is the rank's own."""

    def batches(self) -> Iterator[Batch]:
        """Return this rank's micro-batches, with the "keys" of their samples, from the current state to the end."""
        raise NotImplementedError

    def begin_step(self) -> tuple[int, dict[str, float]]:
        """Prepare the engine for the next step. Collective.

        Return the number of samples of the step over all ranks, and the learning rate of each parameter group.
        """
        raise NotImplementedError

    def shared_inputs(self, batches: Sequence[Batch]) -> Sequence[Any]:
        """Return for each micro-batch of the step what its loss needs to know about all of them. Collective."""
        raise NotImplementedError

    def cost(self, batch: Batch) -> tuple[int, int]:
        """Return the FLOPs of the forward and backward pass over a micro-batch, and its number of tokens or 0."""
        raise NotImplementedError

    def check_spike(self, reduced: Reduced, keys: list[list[str]], log: RunLog) -> bool:
        """Return True if the step is a spike whose update is skipped, the same on every rank. Collective on a spike.

        Args:
            keys: Sample keys of this rank, one list per micro-batch.
        """
        return False

    def end_step(self) -> None:
        """Correct the weights after the update, and record what the trainer itself counts."""

    def saves(self) -> bool:
        """Return True if the step that just ended is followed by a checkpoint; the last step always is."""
        raise NotImplementedError

    def check_skipped(self, samples: Sequence[tuple[str, str]]) -> None:
        """Raise BrokenDataError if too many samples were replaced; `samples` are those since the last log line."""

    def validate_if_due(self, log: RunLog) -> None:
        """Measure on the validation data if that follows the step that just ended. Collective."""


def train(trainer: Trainer, log: RunLog, writer: Writer, profiler: profile | None = None) -> dict[str, float]:
    """Take every step from the current state to the end; return the mean speeds. Collective.

    Raises Stopped after a signal and a checkpoint, and NotFiniteError with the samples whose loss is not finite.
    """
    engine, state = trainer.engine, trainer.state
    stop = StopSignal()
    # In ZeRO-3 ranks wait for each other's weights inside the model.
    own_time = OwnTime(trainer.local_module, engine.device) if engine.zero_stage < 3 else None
    meter = Meter(engine.device, state, own_time, peak_flops(engine.device, log.say))
    batches = meter.timed(trainer.batches())

    while state.samples < trainer.samples:
        size, rates = trainer.begin_step()
        engine.set_rates(rates)
        step = list(islice(batches, engine.accumulation))
        terms = accumulate(engine, step, trainer.shared_inputs(step))
        losses = [micro["loss"] for micro in terms]
        keys = [batch["keys"] for batch in step]
        for batch, micro in zip(step, terms, strict=True):
            meter.add(micro, batch.get("skipped", []), *trainer.cost(batch))

        reduced = engine.agree(torch.stack(losses).mean(), stop.requested, writer.has_failed())
        if reduced.unsaved:
            await_checkpoint(writer)  # raises
        if not reduced.finite:
            _end_not_finite(state, losses, keys)
        engine.step(skip=trainer.check_spike(reduced, keys, log))
        trainer.end_step()
        if profiler is not None:
            profiler.step()
        state.samples += size
        state.step += 1

        is_last = state.samples >= trainer.samples
        saves = trainer.saves() or is_last or reduced.stopping > 0
        # A checkpoint needs a line too, because the means start again after it.
        if state.step % trainer.log_every == 0 or saves:
            trainer.check_skipped(meter.log(log, state, rates[trainer.logged_group], reduced.grad_norm))
        log.progress(state.samples)
        with meter.aside():
            if saves:
                save(engine, state, writer)
            if reduced.stopping:  # a validation that is due follows when the run goes on
                await_checkpoint(writer)
                raise stopped_by(reduced.stopping)
            trainer.validate_if_due(log)
    batches.close()
    await_checkpoint(writer)
    stop.restore()
    came = torch.tensor(int(stop.requested), device=engine.device)
    dist.all_reduce(came, dist.ReduceOp.MAX)
    if came:  # in the last validation or write, after which nobody would look for it
        raise stopped_by(int(came))
    speeds = meter.speeds(state)
    if state.samples > meter.first:
        log.say(summary(state.samples - meter.first, speeds))
    return speeds


def accumulate(engine: Engine, batches: Sequence[Batch], shared: Sequence[Any]) -> list[dict[str, Tensor]]:
    """Run the forward and backward passes of a step's micro-batches; return the detached loss terms of each one.

    `shared` is what `Trainer.shared_inputs` returns for these micro-batches.
    """
    terms = []
    for number, (batch, of_step) in enumerate(zip(batches, shared, strict=True), start=1):
        loss, micro = engine(batch, of_step)
        engine.backward(loss, last=number == len(batches))
        terms.append(micro)
    return terms


def _end_not_finite(state: TrainState, losses: list[Tensor], keys: list[list[str]]) -> NoReturn:
    """Raise NotFiniteError on every rank, weights untouched, with the samples of the micro-batches that are not finite.

    A contrastive loss runs over all ranks, so the samples of one rank break the losses of all.
    """
    local = [names for loss, names in zip(losses, keys, strict=True) if not torch.isfinite(loss).all()]
    broken = keys_of_all_ranks(local)
    where = "\n".join(f"  rank {rank}: {', '.join(names)}" for rank, names in enumerate(broken) if names)
    named = "Every loss was finite."
    if where:
        named = f"Samples of the micro-batches whose loss is not finite:\n{where}"
    raise NotFiniteError(
        f"the loss or a gradient is not finite at step {state.step + 1}; no weight was changed.\n{named}\n"
        "Look at them with scripts/check_data.py, or lower the learning rate"
    )


def keys_of_all_ranks(keys: list[list[str]]) -> list[list[str]]:
    """Return the keys of each rank's samples, from those of this rank's micro-batches. Collective."""
    by_rank: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(by_rank, [key for names in keys for key in names])
    return by_rank


def save(engine: Engine, state: TrainState, writer: Writer) -> None:
    """Copy the content of a checkpoint to rank 0's memory, and begin to write it. Collective."""
    await_checkpoint(writer)  # one at a time: in memory, too
    weights = engine.zero_state.gather_weights()
    optimizer = engine.zero_state.gather_optimizer()
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
