"""What is measured while a run trains: losses, speed, memory, each rank's own time, and the share of the GPU's peak.

The table of GPUs also serves the plans of scripts/plan_run.py.
"""

import contextlib
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from clips.common.errors import UserError
from clips.common.live import in_words
from clips.common.runtime import peak_memory_gb
from clips.engine.checkpoint import TrainState
from clips.engine.engine import Batch
from clips.engine.log import RunLog

PEAK_TFLOPS = {
    "B300": 2250.0,
    "B200": 2250.0,
    "GB200": 2500.0,
    "H200": 989.0,
    "GH200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX A6000": 154.8,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 6000 Ada": 364.2,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "MI325X": 1307.4,
    "MI300X": 1307.4,
    "MI250X": 191.5,
}
"""Dense bf16 peak in TFLOP/s with fp32 sums, as the GPU's maker states it. The MI250X's is that of one of its two dies,
because torch sees each die as a GPU."""
_MODEL = "|".join(sorted(map(re.escape, PEAK_TFLOPS), key=len, reverse=True))
NAME = re.compile(
    rf"(?:NVIDIA |AMD )?(?:GeForce |Instinct )?({_MODEL})(?i:[ -](?:SXM\d?|PCIe|\d+GB?|HBM\w+|Generation|AC))*"
)
"""torch's name of a GPU in the table. Only its socket and its memory may follow the model, because an RTX 3090 Ti, a
laptop's RTX 4090 and a MIG slice of an A100 have other peaks."""
CARDS = {
    "b200": ("B200", 180),
    "h200": ("H200", 141),
    "h100": ("H100", 80),
    "a100": ("A100", 80),
    "a100-40": ("A100", 40),
    "l40s": ("L40S", 48),
    "rtx4090": ("RTX 4090", 24),
}
"""Name above and memory in GB of each `--kind` of a plan."""
USABLE = 0.9
"""Share of a GPU's memory that a plan fills; CUDA's context, NCCL's buffers and the allocator's gaps take the rest."""


def stated_peak(name: str) -> float | None:
    """Return the peak FLOP/s in bf16 of the GPU that torch calls `name`, or None if it is not in the table."""
    match = NAME.fullmatch(name)
    return PEAK_TFLOPS[match[1]] * 1e12 if match else None


@dataclass(frozen=True)
class Machine:
    """The GPUs that a run is planned for. Raises UserError for an unknown kind, and for numbers out of range."""

    kind: str
    gpus: int
    mfu: float
    """Share of the peak that is reached."""

    def __post_init__(self) -> None:
        if self.kind not in CARDS:
            raise UserError(f"--kind {self.kind!r} is not known; choose one of: {', '.join(CARDS)}")
        if self.gpus < 1 or not 0 < self.mfu <= 1:
            raise UserError("--gpus must be at least 1, and --mfu above 0 and at most 1")

    def __str__(self) -> str:
        name, memory_gb = CARDS[self.kind]
        return f"{self.gpus} × {name} of {memory_gb} GB"

    def fits(self, memory: float) -> bool:
        """Return True if `memory` bytes of one rank fit a GPU."""
        return memory <= USABLE * 1e9 * CARDS[self.kind][1]

    def days(self, flops: float) -> float:
        """Return the days that all GPUs together take for `flops`."""
        return flops / (self.gpus * self.mfu * PEAK_TFLOPS[CARDS[self.kind][0]] * 1e12) / 86_400


def peak_flops(device: torch.device, say: Callable[[str], None]) -> float | None:
    """Return the stated peak of a GPU in FLOP/s, or None for a CPU or an unknown GPU; `say` reports the latter."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = stated_peak(name)
    if peak is None:
        say(f"the peak of this GPU, {name}, is not in clips/engine/metrics.py: the run records no MFU")
    return peak


class OwnTime:
    """Seconds that this rank's device spends in the model's forward pass, where it waits for no other rank.

    The rest of a step is full of collectives, in which fast ranks wait for slow ones, so that all look alike. On a GPU
    it is the device's time. Only `seconds` reads it, because reading waits for the device.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []
        """Begin and end of each forward pass in turn, as seconds or CUDA events."""
        model.register_forward_pre_hook(lambda *_: self._mark())
        model.register_forward_hook(lambda *_: self._mark())

    def _mark(self) -> None:
        if self.device.type != "cuda":
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def seconds(self) -> float:
        """Return the seconds since the last call."""
        pairs = list(zip(self.marks[::2], self.marks[1::2], strict=True))
        self.marks = []
        if self.device.type != "cuda":
            return sum(end - begin for begin, end in pairs)
        torch.cuda.synchronize(self.device)
        return sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3


class Meter:
    """Losses, speed, memory and each rank's own time since the last log line."""

    def __init__(
        self, device: torch.device, state: TrainState, own_time: OwnTime | None = None, peak: float | None = None
    ) -> None:
        """Start measuring. `peak` is the device's peak FLOP/s for the MFU, or None if it is unknown, as for a CPU."""
        self.device = device
        self.own_time = own_time
        self.peak = peak
        self.started = time.perf_counter()
        self.first = state.samples
        self.waiting_total = 0.0
        self.flops_total = self.tokens_total = 0
        """Totals of this rank since the meter began."""
        self.reset(state)

    def reset(self, state: TrainState) -> None:
        """Start a new interval after `state`."""
        self.since = time.perf_counter()
        self.waiting = 0.0
        self.samples = state.samples
        self.step = state.step
        self.sums: dict[str, torch.Tensor] = {}
        self.count = 0
        self.flops = 0
        self.skipped: list[tuple[str, str]] = []
        if self.own_time is not None:
            self.own_time.seconds()

    def timed(self, loader: Iterable[Batch]) -> Generator[Batch, None, None]:
        """Iterate over `loader`, measuring the time that the loop waits for it."""
        iterator = iter(loader)
        while True:
            begin = time.perf_counter()
            batch = next(iterator, None)
            waited = time.perf_counter() - begin
            self.waiting += waited
            self.waiting_total += waited
            if batch is None:
                return
            yield batch

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Exclude the time inside the context (evaluation, checkpoints) from the speed of training."""
        begin = time.perf_counter()
        yield
        spent = time.perf_counter() - begin
        self.since += spent
        self.started += spent

    def add(
        self, terms: dict[str, torch.Tensor], skipped: list[tuple[str, str]], flops: int = 0, tokens: int = 0
    ) -> None:
        """Add a micro-batch: its loss terms, the broken samples that were replaced, and its `Trainer.cost`."""
        self.flops_total += flops
        self.tokens_total += tokens
        for key, value in terms.items():
            self.sums[key] = self.sums.get(key, 0) + value.reshape(())
        self.count += 1
        self.flops += flops
        self.skipped += [(key, reason) for key, reason in skipped]  # an older torch pins a tuple as a list

    def log(self, log: RunLog, state: TrainState, lr: float, grad_norm: float | None) -> list[tuple[str, str]]:
        """Write one line of means over ranks and steps. Collective.

        Return the broken samples of all ranks since the last line, as (key, reason).
        """
        steps = state.step - self.step
        losses = {name: total.double() / self.count for name, total in sorted(self.sums.items())}
        own_seconds = self.own_time.seconds() if self.own_time is not None else 0.0
        local = {
            "elapsed": time.perf_counter() - self.since,
            "waiting": self.waiting,
            "own": (self.waiting + own_seconds) / steps,
            "flops": self.flops,
            "skipped": len(self.skipped),
        }
        memory = {"peak_memory_gb": peak_memory_gb(self.device)}
        if self.device.type == "cuda":
            memory["memory_gb"] = torch.cuda.memory_allocated(self.device) / 1e9
        ranks = self._of_all_ranks(losses, local | memory)

        elapsed = max(ranks["elapsed"])  # the same on every rank, as all that they decide by must be
        speed = (state.samples - self.samples) / elapsed
        flops = sum(ranks["flops"]) / len(ranks["flops"]) / elapsed
        means = {name: sum(ranks[name]) / len(ranks[name]) for name in losses}
        skipped = self.skipped
        if any(ranks["skipped"]):
            parts: list[list[tuple[str, str]]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(parts, self.skipped)
            skipped = [entry for part in parts for entry in part]
        state.skipped += len(skipped)

        log.skipped(skipped, state.step)
        log.record("train", {
            "step": state.step,
            "samples": state.samples,
            "steps": steps,  # fewer after a resume than train.log_every
            **means,
            "lr": lr,
            "grad_norm": grad_norm,
            "samples_per_s": speed,
            "samples_per_s_per_gpu": speed / dist.get_world_size(),
            "tflops": flops / 1e12,
            **({"mfu": flops / self.peak} if self.peak else {}),
            "step_seconds": elapsed / steps,
            "rank_seconds": [round(seconds, 6) for seconds in ranks["own"]],
            "data_wait_share": max(ranks["waiting"]) / elapsed,
            **{name: max(ranks[name]) for name in memory},
            "skipped": state.skipped,
        })  # fmt: skip
        self.reset(state)
        return skipped

    def _of_all_ranks(self, losses: dict[str, torch.Tensor], local: dict[str, float]) -> dict[str, list[float]]:
        """Return each metric's values on all ranks. Collective; `losses` are on the device, the others are not."""
        metrics = torch.tensor(list(local.values()), dtype=torch.float64, device=self.device)
        metrics = torch.cat([torch.stack(list(losses.values())), metrics])
        by_rank = [torch.empty_like(metrics) for _ in range(dist.get_world_size())]
        dist.all_gather(by_rank, metrics)
        columns = torch.stack(by_rank, dim=1).tolist()
        return dict(zip([*losses, *local], columns, strict=True))

    def speeds(self, state: TrainState) -> dict[str, float]:
        """Return the mean speeds of training since the meter began. Collective."""
        seconds = time.perf_counter() - self.started
        totals = torch.tensor([self.flops_total, self.tokens_total], dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        tflops, tokens = totals[0].item() / dist.get_world_size() / seconds / 1e12, totals[1].item()
        speed = (state.samples - self.first) / seconds
        speeds = {
            "train_seconds": seconds,
            "samples_per_s": speed,
            "samples_per_s_per_gpu": speed / dist.get_world_size(),
            "tokens_per_s": tokens / seconds,
            "tflops": tflops,
            "peak_memory_gb": peak_memory_gb(self.device),
            "data_wait_share": self.waiting_total / seconds,
            **({"mfu": tflops * 1e12 / self.peak} if self.peak else {}),
        }
        return {name: float(f"{value:.4g}") for name, value in speeds.items()}


def summary(samples: int, speeds: dict[str, float]) -> str:
    """Return a line that says what a training on `samples` samples took, from its `Meter.speeds`."""
    words = [f"{speeds['samples_per_s']:,.1f} samples/s"]
    if speeds["tokens_per_s"]:
        words.append(f"{speeds['tokens_per_s']:,.0f} tokens/s")
    if "mfu" in speeds:
        words.append(f"{speeds['mfu']:.0%} of the GPU's peak")
    words.append(f"{speeds['peak_memory_gb']:.1f} GB")
    words.append(f"{speeds['data_wait_share']:.1%} of the time spent waiting for data")
    return f"trained on {samples:,} samples in {in_words(speeds['train_seconds'])}: {', '.join(words)}"
