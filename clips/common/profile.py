"""A look into a few training steps: torch's profiler as a trace, the busiest operators, and a GPU's memory.

    with profiled(run_dir / "profile", steps, device) as profiler:
        for batch in batches:
            ...                # one optimizer step
            profiler.step()

writes for each rank `trace-rankN.json` (for https://ui.perfetto.dev or chrome://tracing), `operators-rankN.txt` and, on
a GPU, `memory-rankN.pickle` (for https://docs.pytorch.org/memory_viz), and prints the operators of rank 0 at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED, WARM = 1, 1
"""Steps before those that count: the first allocates and compiles, in the next the profiler itself warms up."""
SHOWN = 20
"""Operators in the table."""
MEMORY_EVENTS = 100_000
"""Allocations and frees that are remembered, the newest ones."""


class Profiler:
    """Told of the end of each optimizer step; without `torch_profile` it does nothing."""

    def __init__(self, torch_profile: profile | None = None) -> None:
        self.torch_profile = torch_profile
        self.seen = 0

    def step(self) -> None:
        self.seen += 1
        if self.torch_profile is not None:
            self.torch_profile.step()


@contextmanager
def profiled(directory: Path, steps: int, device: torch.device) -> Iterator[Profiler]:
    """Inside, `steps` steps are recorded after the first `SKIPPED + WARM`; none with `steps` 0, at no cost.

    What was recorded is written when these steps have ended, or when the block does.
    """
    if steps == 0:
        yield Profiler()
        return
    rank = dist.get_rank() if dist.is_initialized() else 0
    on_gpu = device.type == "cuda"
    tables: list[str] = []

    def write(found: profile) -> None:
        if profiler.seen <= SKIPPED + WARM:  # at the end of a block that was too short
            return
        directory.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(directory / f"trace-rank{rank}.json"))
        # By the time in an operator itself, not in others that it calls.
        key = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        tables.append(found.key_averages().table(sort_by=key, row_limit=SHOWN, max_name_column_width=45).strip())
        (directory / f"operators-rank{rank}.txt").write_text(tables[-1] + "\n", encoding="utf-8")
        if on_gpu:
            torch.cuda.memory._dump_snapshot(str(directory / f"memory-rank{rank}.pickle"))

    if on_gpu:  # from the first step on: what stays in memory is allocated there
        torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    plan = schedule(skip_first=SKIPPED, wait=0, warmup=WARM, active=steps, repeat=1)
    try:
        with profile(
            activities=activities, schedule=plan, on_trace_ready=write, record_shapes=True, profile_memory=True
        ) as running:
            profiler = Profiler(running)
            yield profiler
    finally:
        if on_gpu:
            torch.cuda.memory._record_memory_history(enabled=None)
    if rank == 0 and tables:
        recorded = min(steps, profiler.seen - SKIPPED - WARM)
        print(f"\n{tables[-1]}\nprofile of {recorded} steps: {directory}", file=sys.stderr)
    elif rank == 0:
        print(f"no profile: it begins after {SKIPPED + WARM} steps, there were {profiler.seen}", file=sys.stderr)
