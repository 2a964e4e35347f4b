"""A look into a few training steps by torch's profiler.

Each rank writes `trace-rankN.json` (for https://ui.perfetto.dev or chrome://tracing), and its busiest operators as
`operators-rankN.txt`. Rank 0 prints its own at the end.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED = 2
"""Steps before those that count: the first allocates and compiles, and in the next the profiler itself warms up."""
SHOWN = 20
"""Operators in the table."""


@contextmanager
def profiled(directory: Path, steps: int, device: torch.device) -> Iterator[profile | None]:
    """Record `steps` optimizer steps of the block, after its first SKIPPED ones, in `directory`.

    The block gets the profiler and calls `profiler.step()` after each optimizer step; with `steps` 0 it gets None. The
    record is written when these steps have ended, or when the block does.
    """
    if steps == 0:
        yield None
        return
    rank = dist.get_rank() if dist.is_initialized() else 0
    on_gpu = device.type == "cuda"
    operators = directory / f"operators-rank{rank}.txt"

    def write(profiler: profile) -> None:
        if profiler.step_num <= SKIPPED:  # at the end of a block that was too short
            return
        directory.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(directory / f"trace-rank{rank}.json"))
        # By the time in an operator itself, not in others that it calls.
        key = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=key, row_limit=SHOWN, max_name_column_width=45)
        operators.write_text(f"{table.strip()}\n", encoding="utf-8")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    plan = schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1)
    with profile(
        activities=activities, schedule=plan, on_trace_ready=write, record_shapes=True, profile_memory=True
    ) as profiler:
        yield profiler

    recorded = min(steps, profiler.step_num - SKIPPED)
    if rank == 0 and recorded > 0:
        print(f"\n{operators.read_text(encoding='utf-8')}profile of {recorded} steps: {directory}", file=sys.stderr)
