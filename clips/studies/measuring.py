"""How the benchmarks measure.

Compared parts take turns within one run and the fastest turn of each counts, since whatever else the machine does
only ever adds time. Where peak memory is reported, each part runs in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def fastest(parts: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Seconds of each part: all once to warm up, then `repeats` turns, the minimum of each."""
    times = {name: float("inf") for name in parts}
    for turn in range(repeats + 1):
        for name, part in parts.items():
            begin = time.perf_counter()
            part()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                times[name] = min(times[name], time.perf_counter() - begin)
    return times


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `function` in a fresh process, whose peak memory is then that of `function` alone."""
    with _fresh_processes(1) as pool:
        return pool.submit(function, *arguments).result()


def _fresh_processes(count: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clips.studies.benchmark"])  # the slow imports are paid once, and not counted
    return ProcessPoolExecutor(count, mp_context=context)


class PeakMemory:
    """Peak memory in MB since construction: CUDA's allocations, or this process's resident memory (Linux)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self.before = resident("VmRSS")

    def read(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        return resident("VmHWM") - self.before


def resident(field: str, process: int | None = None) -> float:
    """MB of a process (default: this one): VmRSS now, VmHWM at most so far; NaN where there is no /proc."""
    status = Path("/proc", "self" if process is None else str(process), "status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((float(line.split()[1]) * 1.024e-3 for line in lines if line.startswith(field)), float("nan"))
