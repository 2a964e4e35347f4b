"""What a run writes while it trains: metrics.jsonl, skipped.jsonl, TensorBoard, W&B if asked, the progress line."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from tqdm import tqdm

from clips.common.errors import BrokenDataError, CommandError, UserError
from clips.common.rundir import METRICS, is_at_most, keep_lines
from clips.config import RunConfig
from clips.weights.checkpoint import TrainState

MACHINE = ("time", "samples_per_s", "data_wait_share")
"""What metrics.jsonl holds that tells of the machine, not of the training: two equal runs differ in it."""


class RunLog:
    """Rank 0's log; on other ranks every method does nothing."""

    def __init__(self, run: RunConfig, run_dir: Path, *, start_step: int, wandb: bool, active: bool) -> None:
        self.active = active
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.run_dir = run_dir
        self.metrics, self.skips = (self._reopen(run_dir / name, start_step) for name in (METRICS, "skipped.jsonl"))
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step)
        self.wandb = _start_wandb(run, run_dir) if wandb else None
        self.latest: dict[str, Any] = {}
        self.started = time.monotonic()
        interactive = sys.stderr.isatty()
        self.bar = tqdm(total=run.samples, unit="sample", unit_scale=True, disable=not interactive, smoothing=0.05)
        self.total = run.samples
        self.first: tuple[int, float] | None = None
        """(samples, time) of the first line, from which the time left is told."""

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
        try:
            self._record(kind, values)
        except OSError as error:
            raise CommandError(
                f"the record of step {values['step']} cannot be written to {self.run_dir}: {error}. Make room, then "
                "the same command goes on from the last checkpoint"
            ) from None
        self.latest.update(values)
        self._show(values["samples"])

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

    def _show(self, samples: int) -> None:
        if self.first is None:
            self.first = (samples, time.monotonic())
            self.bar.initial = samples
        wanted = {"samples_per_s": "/s", "loss": "loss", "contrastive_loss": "con", "caption_loss": "cap"}
        parts = {short: f"{self.latest[key]:.4g}" for key, short in wanted.items() if key in self.latest}
        score = self.latest.get("sentence_t2i_r1", self.latest.get("part_t2i_r1"))
        if score is not None:
            parts["R@1"] = f"{score:.1f} %"
        if not self.bar.disable:
            self.bar.n = samples
            self.bar.set_postfix(parts)
            return
        done = samples - self.first[0]
        left = (time.monotonic() - self.first[1]) / done * (self.total - samples) if done else None
        text = "  ".join(f"{key} {value}" for key, value in parts.items())
        eta = "" if left is None else f"  left {left / 60:.1f} min"
        print(f"[{samples:>9,}/{self.total:,}]  {text}{eta}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line for a person, beside the progress line."""
        if self.active:
            self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        if self.active:
            self.bar.close()
            for file in (self.metrics, self.skips, self.board):
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


class Meter:
    """Losses, speed and the time spent waiting for data since the last log line."""

    def __init__(self, device: torch.device, state: TrainState) -> None:
        self.device = device
        self.started, self.first, self.waiting_total = time.perf_counter(), state.samples, 0.0
        self._reset(state.samples)

    def _reset(self, samples: int) -> None:
        self.since, self.waiting, self.samples = time.perf_counter(), 0.0, samples
        self.sums: dict[str, torch.Tensor] = {}
        self.count = 0
        self.skipped: list[tuple[str, str]] = []

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
        names = sorted(self.sums)
        values = torch.stack([self.sums[name] for name in names]) / self.count
        dist.all_reduce(values)
        means = dict(zip(names, (values / dist.get_world_size()).tolist(), strict=True))
        elapsed = time.perf_counter() - self.since
        state.logit_scale.append((state.samples, means["logit_scale"]))
        skipped = self._gather_skipped()
        state.skipped += len(skipped)
        log.skipped(skipped, state.step)
        log.record("train", {
            "step": state.step, "samples": state.samples, **means, "lr": lr, "grad_norm": grad_norm,
            "samples_per_s": (state.samples - self.samples) / elapsed, "data_wait_share": self.waiting / elapsed,
            "skipped": state.skipped,
        })  # fmt: skip
        if state.skipped > max(10, max_broken_share * state.samples):
            reasons = "\n  ".join(f"{key}: {reason}" for key, reason in skipped[:5])
            raise BrokenDataError(
                f"{state.skipped} of {state.samples} samples are broken, above data.max_broken_share = "
                f"{max_broken_share:.1%}; all are listed in skipped.jsonl, the last ones are\n  {reasons}"
            )
        self._reset(state.samples)

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
