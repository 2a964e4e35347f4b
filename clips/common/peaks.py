"""How fast a device can compute at most: what MFU is a share of."""

from __future__ import annotations

import math
import time
from functools import lru_cache

import torch

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
    "A6000": 154.8,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 6000 Ada": 364.2,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "MI325X": 1307.4,
    "MI300X": 1307.4,
    "MI250X": 191.5,
}
"""Part of a GPU's name → its dense bf16 peak in TFLOP/s with fp32 sums, as its maker states it; the longest part that
fits counts. MI250X: of one of its two dies, which is what torch sees."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """(FLOP/s that `device` reaches at most, where that is known from).

    Of a known GPU the bf16 figure whatever `dtype` is, as is the custom; of a CPU or an unknown GPU the speed of a
    large matrix product in `dtype`, measured now and once.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if known := stated_peak(name):
            return known, f"{name}, dense bf16"
    measured = _measured(device.type, dtype, torch.get_num_threads())
    return measured, f"a matrix product in {str(dtype).removeprefix('torch.')}, measured"


def stated_peak(name: str) -> float | None:
    """Of a GPU by its name, in FLOP/s; None for one that is not in the table."""
    found = [part for part in PEAK_TFLOPS if part in name]
    return PEAK_TFLOPS[max(found, key=len)] * 1e12 if found else None


@lru_cache
def _measured(kind: str, dtype: torch.dtype, threads: int) -> float:
    """The fastest of several; `threads` is here because another number of them measures anew."""
    size = 4096 if kind == "cuda" else 1024
    a = torch.randn(size, size, device=kind, dtype=dtype)
    elapsed = math.inf
    for _ in range(10):
        begin = time.perf_counter()
        (a @ a).sum().item()
        elapsed = min(elapsed, time.perf_counter() - begin)
    return 2 * size**3 / elapsed
