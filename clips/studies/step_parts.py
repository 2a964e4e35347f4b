"""Where the time of a training step goes, part by part, and how much of the machine's peak each part reaches.

One clock runs through whole steps as the loop takes them, loader included; every moment belongs to exactly one part.
Marks stand where a tower begins and ends (hooks on modules) and where the backward pass comes to its output (hooks on
tensors: autograd goes through the parts in the opposite order). Communication is torch.distributed's collectives,
whatever part asks for them, and the waiting for other ranks in them. A GPU is waited for at each mark, which costs the
overlap of its queue with the host: there the shares count, not the sum.
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

from clips.data.loader import Batch, to_device
from clips.model.clips import CLIPSModel
from clips.model.flops import forward_flops, training_flops
from clips.studies.measuring import Row
from clips.training.engine import Engine

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
COMMUNICATION = "communication"
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")
"""Those of torch.distributed that a step can ask for."""
OTHERS = ("data wait", "copy to the device", COMMUNICATION, "finite check", "optimiser")


class Clock:
    """Gives the time that passes to the part that runs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.part: str | None = None
        self.since = 0.0
        self.seconds: dict[str, float] = defaultdict(float)

    def begin(self, part: str | None) -> None:
        """From now on it is `part`; None: nothing that counts."""
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


def _watch(model: CLIPSModel, clock: Clock) -> None:
    """Let the model's forward and backward passes tell `clock` where they are."""

    def ends(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda grad: clock.begin(f"{name}, backward"))
        clock.begin(f"{LOSS}, forward")

    for name, module in (("image tower", model.visual), ("text tower", model.text), ("captioner", model.captioner)):
        if module is not None:
            module.register_forward_pre_hook(lambda *_, name=name: clock.begin(f"{name}, forward"))
            module.register_forward_hook(partial(ends, name))


@contextmanager
def _listen(clock: Clock) -> Iterator[None]:
    """Inside, collectives tell `clock` when they begin and end."""
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
    takes time and counts nothing. With several ranks the rows are this one's.
    """
    clock = Clock(engine.device)
    _watch(engine.model, clock)
    with _listen(clock):
        steps, flops = _timed_steps(engine, batches, clock)
    order = [f"{part}, {way}" for way in ("forward", "backward") for part in FLOPS]
    parts = [*OTHERS[:2], *order, *OTHERS[2:]]
    median = {part: statistics.median(step.get(part, 0.0) for step in steps) for part in parts}
    whole = sum(median.values())
    rows = []
    for part in [part for part in parts if median[part] > 0]:
        row: Row = {"part": part, "ms": 1e3 * median[part], "share_%": 100 * median[part] / whole}
        if part in flops:
            speed = statistics.median(flops[part]) / median[part]
            row |= {"tflops": speed / 1e12, "of_peak_%": 100 * speed / peak}
        rows.append(row)
    speed = sum(statistics.median(counts) for counts in flops.values()) / whole
    return [*rows, {
        "part": "whole step", "ms": 1e3 * whole, "share_%": 100.0, "tflops": speed / 1e12,
        "of_peak_%": 100 * speed / peak,
    }]  # fmt: skip


def _timed_steps(
    engine: Engine, batches: Iterable[Batch], clock: Clock
) -> tuple[list[dict[str, float]], dict[str, list[int]]]:
    """Of each step after the first: the seconds of each part, and its FLOPs by part."""
    steps: list[dict[str, float]] = []
    flops: dict[str, list[int]] = defaultdict(list)
    clock.begin("data wait")
    for index, batch in enumerate(batches):
        clock.begin("copy to the device")
        on_device = to_device(engine.task.counted(batch), engine.device)
        clock.begin(f"{LOSS}, forward")
        loss, _ = engine(on_device)
        clock.begin(f"{LOSS}, backward")
        engine.backward(loss)
        clock.begin("finite check")
        engine.agree(loss, 0)
        clock.begin("optimiser")
        engine.step()
        engine.limit_logit_scale()
        clock.begin(None)
        seconds = clock.read()
        if index >= WARM:
            steps.append(seconds)
            shape, model = engine.task.shape(batch), engine.model.config
            forward, both = forward_flops(model, shape), training_flops(model, shape, engine.task.freeze)
            for part, names in FLOPS.items():
                flops[f"{part}, forward"].append(sum(forward[name] for name in names))
                flops[f"{part}, backward"].append(sum(both[name] - forward[name] for name in names))
        clock.begin("data wait")
    return steps, flops
