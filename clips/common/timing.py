"""Time for comparisons."""

from __future__ import annotations

import time

import torch


def busy_seconds(device: torch.device) -> float:
    """A clock of what was computed: wall time of a GPU once it is done, on a CPU what each thread computed so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()
