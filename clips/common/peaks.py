"""GPUs by name: their peak throughput for MFU, and the memory of those that a run can be planned for."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from clips.common.errors import UserError

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
        say(f"the peak of this GPU, {name}, is not in clips/common/peaks.py: the run records no MFU")
    return peak
