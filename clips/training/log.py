"""What a run writes while it trains: metrics.jsonl, skipped.jsonl, spikes.jsonl, TensorBoard, W&B if asked, the
progress line."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median_low
from typing import Any, TextIO

import torch
import torch.distributed as dist
from tqdm import tqdm

from clips.common.errors import BrokenDataError, CommandError, UserError
from clips.common.rundir import METRICS, is_at_most, keep_lines
from clips.common.signals import outlive_readers
from clips.config import RunConfig
from clips.training.watchdog import OwnTime, slow_ranks
from clips.weights.checkpoint import TrainState

MACHINE = (
    *("time", "samples_per_s", "step_seconds", "rank_seconds", "data_wait_share", "peak_memory_gb"),
    *("memory_gb", "gpu_utilisation"),
)
"""What metrics.jsonl holds that tells of the machine, not of the training: two equal runs differ in it."""


class RunLog:
    """Rank 0's log; on other ranks every method does nothing."""

    def __init__(self, run: RunConfig, run_dir: Path, *, start_step: int, wandb: bool, active: bool) -> None:
        self.active = active
        if not active:
            return
        self.run_dir = run_dir
        self._open(start_step)
        self.spikes = self._reopen(run_dir / "spikes.jsonl", start_step)
        self.wandb = _start_wandb(run, run_dir) if wandb else None
        self.latest: dict[str, Any] = {}
        self.started = time.monotonic()
        interactive = sys.stderr.isatty()
        self.bar = tqdm(total=run.samples, unit="sample", unit_scale=True, disable=not interactive, smoothing=0.05)
        self.total = run.samples
        self.first: tuple[int, float] | None = None
        """(samples, time) of the first line, from which the time left is told."""

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.metrics, self.skips = (self._reopen(self.run_dir / name, step) for name in (METRICS, "skipped.jsonl"))
        self.board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=step)

    def rewind(self, step: int) -> None:
        """Forget what came after `step`, but for the spikes: they are why."""
        if self.active:
            for file in (self.metrics, self.skips, self.board):
                file.close()
            self._open(step)

    @staticmethod
    def _reopen(path: Path, step: int) -> TextIO:
        """Open for appending, without lines written after the checkpoint that is resumed: no step stands twice."""
        keep_lines(path, lambda line: is_at_most(line, step))
        return path.open("a", buffering=1)

    def record(self, kind: str, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, the same scalars to TensorBoard and W&B, and the progress line.

        CommandError where they cannot be written: a run whose record has holes does not go on in silence.
        """
        if not self.active:
            return
        with self._writing(values["step"]):
            self._record(kind, values)
        self.latest.update(values)
        self._show(values["samples"])

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CommandError(
                f"the record of step {step} cannot be written to {self.run_dir}: {error}. Make room, then "
                "the same command goes on from the last checkpoint"
            ) from None

    def _record(self, kind: str, values: dict[str, Any]) -> None:
        self.metrics.write(json.dumps({"kind": kind, "time": round(time.time(), 3), **values}) + "\n")
        scalars = {
            key: v for key, v in values.items() if isinstance(v, (int, float)) and key not in ("step", "samples")
        }
        for key, value in scalars.items():
            self.board.add_scalar(f"{values.get('split', kind)}/{key}", value, values["step"])
        if self.wandb is not None:
            self.wandb.log({f"{values.get('split', kind)}/{key}": v for key, v in scalars.items()}, step=values["step"])

    def skipped(self, samples: list[tuple[str, str]], step: int) -> None:
        for key, reason in samples if self.active else []:
            self.skips.write(json.dumps({"step": step, "key": key, "reason": reason}) + "\n")

    def spike(self, figures: dict[str, Any], keys: list[list[str]]) -> None:
        """A line of spikes.jsonl, `keys` being each rank's samples of the step, and one for a person."""
        if self.active:
            with self._writing(figures["step"]):
                self.spikes.write(json.dumps(figures | {"keys": keys}) + "\n")
            norm = ""
            if figures["grad_norm"] is not None:
                norm = f", gradient norm {figures['grad_norm']:.4g} (usually {figures['usual_grad_norm']:.4g})"
            self.say(
                f"warning: spike at step {figures['step']}: loss {figures['loss']:.4g} (usually "
                f"{figures['usual_loss']:.4g}){norm}; {figures['action']}. Its samples stand in spikes.jsonl"
            )

    def _show(self, samples: int) -> None:
        if self.first is None:
            self.first = (samples, time.monotonic())
            self.bar.initial = samples
        wanted = {"samples_per_s": "/s", "loss": "loss", "contrastive_loss": "con", "caption_loss": "cap"}
        wanted |= {"data_wait_share": "wait", "peak_memory_gb": "GB"}
        parts = {short: f"{self.latest[key]:.4g}" for key, short in wanted.items() if key in self.latest}
        score = self.latest.get("sentence_t2i_r1", self.latest.get("part_t2i_r1"))
        if score is not None:
            parts["R@1"] = f"{score:.1f} %"
        if not self.bar.disable:
            self.bar.n = samples
            self.bar.set_postfix(parts)
            return
        done = samples - self.first[0]
        left = (time.monotonic() - self.first[1]) / done * (self.total - samples) if done > 0 else None
        text = "  ".join(f"{key} {value}" for key, value in parts.items())
        eta = "" if left is None else f"  left {left / 60:.1f} min"
        outlive_readers()
        print(f"[{samples:>9,}/{self.total:,}]  {text}{eta}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line for a person, beside the progress line."""
        if self.active:
            self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        if self.active:
            self.bar.close()
            for file in (self.metrics, self.skips, self.spikes, self.board):
                with contextlib.suppress(OSError):  # of a full disk, which `record` has told of
                    file.close()
            if self.wandb is not None:
                self.wandb.finish()


def _start_wandb(run: RunConfig, run_dir: Path) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError(
            "--wandb: the package wandb is not installed; pip install wandb, or leave the flag out"
        ) from None
    return wandb.init(project="clips-mllm", name=run_dir.name, dir=str(run_dir), config=run.to_dict())


def peak_resident_bytes() -> int:
    """Of this process, since it began."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def utilisation(device: torch.device) -> float:
    """Of a GPU, in percent; NaN where NVML, its Python package or the right to ask is missing."""
    try:
        return float(torch.cuda.utilization(device))
    except Exception:  # NVML's own errors are of no narrower kind, and nothing is worth less than a run
        return math.nan


class Meter:
    """Losses, speed, memory and each rank's own time since the last log line."""

    def __init__(self, device: torch.device, state: TrainState, own_time: OwnTime | None = None) -> None:
        self.device, self.own_time = device, own_time
        self.started, self.first, self.waiting_total = time.perf_counter(), state.samples, 0.0
        self.has_nvml = True
        self.named: set[int] = set()
        """Ranks that were slow in the last line, and have been named."""
        self.reset(state)

    def reset(self, state: TrainState) -> None:
        """Begin anew with what comes after `state`."""
        self.since, self.waiting = time.perf_counter(), 0.0
        self.samples, self.step = state.samples, state.step
        self.sums: dict[str, torch.Tensor] = {}
        self.count = 0
        self.skipped: list[tuple[str, str]] = []
        if self.own_time is not None:
            self.own_time.seconds()

    def timed(self, loader: Any) -> Any:
        """Iterate `loader`, measuring the time in which the loop waits for it."""
        iterator = iter(loader)
        while True:
            begin = time.perf_counter()
            batch = next(iterator, None)
            waited = time.perf_counter() - begin
            self.waiting, self.waiting_total = self.waiting + waited, self.waiting_total + waited
            if batch is None:
                return
            yield batch

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Leave what happens inside (evaluation, checkpoints) out of the speed of training."""
        begin = time.perf_counter()
        yield
        spent = time.perf_counter() - begin
        self.since, self.started = self.since + spent, self.started + spent

    def add(self, parts: dict[str, torch.Tensor], skipped: list[tuple[str, str]]) -> None:
        for key, value in parts.items():
            self.sums[key] = self.sums.get(key, 0) + value.reshape(())
        self.count += 1
        self.skipped += skipped

    def log(self, log: RunLog, state: TrainState, lr: float, grad_norm: float | None, max_broken_share: float) -> None:
        """Write one line of means over ranks and steps; raises BrokenDataError above the limit. Collective."""
        names, steps = sorted(self.sums), state.step - self.step
        own = (self.waiting + (self.own_time.seconds() if self.own_time is not None else 0.0)) / steps
        memory = self._memory()
        losses = torch.stack([self.sums[name].double() / self.count for name in names])
        elapsed = time.perf_counter() - self.since
        rest = torch.tensor([elapsed, self.waiting, own, *memory.values()], dtype=torch.float64, device=self.device)
        mine = torch.cat([losses, rest])
        ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(ranks, mine)
        columns = torch.stack(ranks, dim=1).tolist()
        found = dict(zip([*names, "elapsed", "waiting", "own", *memory], columns, strict=True))
        elapsed = max(found["elapsed"])  # the same on every rank, as all that they decide by must be
        means = {name: sum(found[name]) / len(ranks) for name in names}
        state.logit_scale.append((state.samples, means["logit_scale"]))
        skipped = self._gather_skipped()
        state.skipped += len(skipped)
        log.skipped(skipped, state.step)
        log.record("train", {
            "step": state.step, "samples": state.samples, **means, "lr": lr, "grad_norm": grad_norm,
            "samples_per_s": (state.samples - self.samples) / elapsed, "step_seconds": elapsed / steps,
            "rank_seconds": [round(seconds, 6) for seconds in found["own"]],
            "data_wait_share": max(found["waiting"]) / elapsed,
            **{name: max(found[name]) for name in memory if not math.isnan(sum(found[name]))},
            "skipped": state.skipped,
        })  # fmt: skip
        self._name_slow_ranks(log, found["own"], elapsed / steps, state.step)
        if state.skipped > max(10, max_broken_share * state.samples):
            reasons = "\n  ".join(f"{key}: {reason}" for key, reason in skipped[:5])
            raise BrokenDataError(
                f"{state.skipped} of {state.samples} samples are broken, above data.max_broken_share = "
                f"{max_broken_share:.1%}; all are listed in skipped.jsonl, the last ones are\n  {reasons}"
            )
        self.reset(state)

    def _memory(self) -> dict[str, float]:
        """This rank's memory in GB, and the GPU's utilisation in percent: NaN where NVML cannot be asked."""
        if self.device.type != "cuda":
            return {"peak_memory_gb": peak_resident_bytes() / 1e9}
        found = {  # the same keys on every rank
            "peak_memory_gb": torch.cuda.max_memory_allocated(self.device) / 1e9,
            "memory_gb": torch.cuda.memory_allocated(self.device) / 1e9,
            "gpu_utilisation": utilisation(self.device) if self.has_nvml else math.nan,
        }
        self.has_nvml = not math.isnan(found["gpu_utilisation"])
        return found

    def _name_slow_ranks(self, log: RunLog, own_seconds: Sequence[float], step_seconds: float, step: int) -> None:
        """Warn of a rank when it becomes slow. Collective where one does, which all ranks know."""
        slow = set(slow_ranks(own_seconds, step_seconds))
        if slow - self.named:
            hosts = [""] * len(own_seconds)
            dist.all_gather_object(hosts, socket.gethostname())
            usual = median_low(own_seconds)
            for rank in sorted(slow - self.named):
                log.say(
                    f"warning: rank {rank} ({hosts[rank]}) is slow at step {step}, and all wait for it: "
                    f"{own_seconds[rank]:.3g} s a step for its data and forward pass, where the median is {usual:.3g} s"
                )
        self.named = slow

    def summary(self, state: TrainState) -> str:
        """What the training took, in one line."""
        elapsed = time.perf_counter() - self.started
        done = state.samples - self.first
        return (
            f"trained on {done:,} samples in {elapsed / 60:.1f} min: {done / elapsed:,.0f} samples/s, "
            f"{self.waiting_total / elapsed:.1%} of the time spent waiting for data"
        )

    def _gather_skipped(self) -> list[tuple[str, str]]:
        if dist.get_world_size() == 1:
            return self.skipped
        count = torch.tensor(float(len(self.skipped)), device=self.device)
        dist.all_reduce(count)
        if count.item() == 0:
            return []
        parts: list[list[tuple[str, str]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, self.skipped)
        return [entry for part in parts for entry in part]
