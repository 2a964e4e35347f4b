"""Where the time of a training step goes, part by part, and how much of the machine's peak each part reaches.

One clock runs through whole steps as the loop takes them, loader included; every moment belongs to exactly one part.
Hooks on modules and on the engine mark where a part begins. Hooks on tensors mark the backward pass, which goes through
the parts in the opposite order. Communication is torch.distributed's collectives, whatever part asks for them, and the
waiting for other ranks in them. A GPU is waited for at each mark, which costs the overlap of its queue with the host:
there the shares count, not the sum.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from clips.data.loader import Batch
from clips.model.flops import forward_flops, training_flops
from clips.studies.measuring import Row
from clips.training.engine import Engine
from clips.training.step import optimizer_step

WARM = 3
"""Steps that are not counted."""
LOSS = "head and losses"
FLOPS = {
    "image tower": ("vision",),
    "text tower": ("text",),
    "captioner": ("captioner",),
    LOSS: ("head", "contrastive"),
}
"""Part → its names in clips/model/flops.py."""
WAIT, COPY, COMMUNICATION = "data wait", "copy to the device", "communication"
METHODS = {"backward": f"{LOSS}, backward", "agree": "finite check", "step": "optimiser"}
"""Method of the engine → the part that begins with it."""
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")
"""The functions of torch.distributed that a step can call."""


class Clock:
    """Gives the time that passes to the part that runs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.part: str | None = None
        self.since = 0.0
        self.seconds: dict[str, float] = defaultdict(float)

    def begin(self, part: str | None) -> None:
        """From now on `part` runs; None: the time does not count."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self.part is not None:
            self.seconds[self.part] += now - self.since
        self.part, self.since = part, now

    def read(self) -> dict[str, float]:
        """The seconds of each part since the last call."""
        found, self.seconds = dict(self.seconds), defaultdict(float)
        return found

    def arriving(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """`batches`, with the time until each is there, and the start of its way to the device."""
        self.begin(WAIT)
        for batch in batches:
            self.begin(COPY)
            yield batch
            self.begin(WAIT)


def _watch(engine: Engine, clock: Clock) -> None:
    """Let the engine and the forward and backward passes of its model report to `clock` where they are."""

    def ends(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda grad: clock.begin(f"{name}, backward"))
        clock.begin(f"{LOSS}, forward")

    def begins(method: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            clock.begin(part)
            return method(*arguments, **options)

        return timed

    engine.task.register_forward_pre_hook(lambda *_: clock.begin(f"{LOSS}, forward"))
    model = engine.model
    for name, module in (("image tower", model.visual), ("text tower", model.text), ("captioner", model.captioner)):
        if module is not None:
            module.register_forward_pre_hook(lambda *_, name=name: clock.begin(f"{name}, forward"))
            module.register_forward_hook(partial(ends, name))
    for name, part in METHODS.items():
        setattr(engine, name, begins(getattr(engine, name), part))


@contextmanager
def _listen(clock: Clock) -> Iterator[None]:
    """Inside, collectives report to `clock` when they begin and end."""
    before = {name: getattr(dist, name) for name in COLLECTIVES}

    def timed(collective: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        part = clock.part
        clock.begin(COMMUNICATION)
        result = collective(*arguments, **options)
        clock.begin(part)
        return result

    for name, collective in before.items():
        setattr(dist, name, partial(timed, collective))
    try:
        yield
    finally:
        for name, collective in before.items():
            setattr(dist, name, collective)


def part_rows(engine: Engine, batches: Iterable[Batch], peak: float) -> list[Row]:
    """Median milliseconds of each part over the steps, its share, its TFLOP/s and their share of `peak` in FLOP/s.

    `engine` trains on, and with accumulation 1. FLOPs are the model's: what is computed a second time to save memory
    takes time and counts nothing. With several ranks the rows are those of this rank.
    """
    clock = Clock(engine.device)
    _watch(engine, clock)
    with _listen(clock):
        steps, flops = _timed_steps(engine, batches, clock)
    order = [f"{part}, {way}" for way in ("forward", "backward") for part in FLOPS]
    parts = [WAIT, COPY, *order, COMMUNICATION, METHODS["agree"], METHODS["step"]]
    median = {part: statistics.median(step.get(part, 0.0) for step in steps) for part in parts}
    whole = sum(median.values())

    def row(part: str, seconds: float, count: float | None) -> Row:
        found: Row = {"part": part, "ms": 1e3 * seconds, "share_%": 100 * seconds / whole}
        if count is not None:
            found |= {"tflops": count / seconds / 1e12, "of_peak_%": 100 * count / seconds / peak}
        return found

    counts = {part: statistics.median(found) for part, found in flops.items()}
    rows = [row(part, median[part], counts.get(part)) for part in parts if median[part] > 0]
    return [*rows, row("whole step", whole, sum(counts.values()))]


def _timed_steps(
    engine: Engine, batches: Iterable[Batch], clock: Clock
) -> tuple[list[dict[str, float]], dict[str, list[int]]]:
    """The seconds of each part of each step after the first WARM steps, and the FLOPs of each part."""
    steps: list[dict[str, float]] = []
    flops: dict[str, list[int]] = defaultdict(list)
    for index, batch in enumerate(clock.arriving(batches)):
        optimizer_step(engine, [batch])
        clock.begin(None)
        seconds = clock.read()
        if index >= WARM:
            steps.append(seconds)
            shape, model = engine.task.shape(batch), engine.model.config
            forward, both = forward_flops(model, shape), training_flops(model, shape, engine.task.freeze)
            for part, names in FLOPS.items():
                flops[f"{part}, forward"].append(sum(forward[name] for name in names))
                flops[f"{part}, backward"].append(sum(both[name] - forward[name] for name in names))
    return steps, flops
