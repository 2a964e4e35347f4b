"""What a process runs on: its device and precision, memory, DeepSpeed's import, packages."""

import contextlib
import ctypes
import logging
import os
import platform
import resource
import socket
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from clips.common.errors import UserError

PACKAGES = (
    "torch", "deepspeed", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers", "open_clip_torch", "numpy"
)  # fmt: skip
"""Packages whose versions may explain a difference between two runs."""

KEEP_FREED = ((-1, 2**31 - 1), (-3, 2**30))
"""Options of glibc's mallopt and their values in bytes: M_TRIM_THRESHOLD, how much free memory at the heap's top stays;
M_MMAP_THRESHOLD, from which size on a block is a mapping of its own, which ends when it is freed."""


def choose_device(name: str = "auto") -> torch.device:
    """Return this process's device for `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises UserError for any other name, for a GPU that torch does not see, and for `cuda:N` if there are several ranks.
    """
    kind, _, index = name.partition(":")
    if name not in ("auto", "cpu", "cuda") and not (kind == "cuda" and index.isdecimal()):
        raise UserError(f"--device {name!r} is not known; choose one of: auto, cpu, cuda, cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch sees no GPU here; use --device cpu, or a CUDA build of torch")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if index and rank:
        raise UserError(f"--device {name} is one GPU, and there are several ranks: use --device cuda")
    number, count = int(index or rank), torch.cuda.device_count()
    if number >= count:
        mend = f"name one below cuda:{count}" if index else f"start at most {count} ranks on this machine"
        raise UserError(f"--device {name}: there is no GPU {number}, torch sees {count} here: {mend}")
    return torch.device("cuda", number)


BF16: dict[str, bool] = {}
"""Whether each device type computes in bfloat16: tried here, or agreed on by all ranks."""


def claims_bf16(device: torch.device) -> bool:
    """Return True if `device` says that it computes in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def has_bf16(device: torch.device) -> bool:
    """Return True if `device` computes in bfloat16; elsewhere it is emulated and slower than float32.

    A CPU is also tested with short products. Its id says what it could do, but oneDNN may be restricted to AVX2
    (ONEDNN_MAX_CPU_ISA): emulated products of 128 x 128 take 20 times as long as in fp32, others at most twice.
    """
    if device.type not in BF16:
        BF16[device.type] = claims_bf16(device) and (device.type == "cuda" or _product_ratio() < 8)
    return BF16[device.type]


def _product_ratio() -> float:
    """Return the time of a small product in bf16 divided by that in fp32, each the fastest of several."""
    bound_kernel_caches()
    fastest = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(128, 128, dtype=dtype)
        seconds = []
        for _ in range(8):
            begin = time.perf_counter()
            a @ a
            seconds.append(time.perf_counter() - begin)
        fastest[dtype] = min(seconds)
    return fastest[torch.bfloat16] / fastest[torch.float32]


def autocast_type(device: torch.device) -> str:
    """Return the device type whose autocast applies to tensors on `device`.

    Autocast knows no "meta", the device of a rehearsal (clips/common/rehearsal.py). There the CPU's state stands for a
    GPU's.
    """
    return "cpu" if device.type == "meta" else device.type


def autocast(device: torch.device, *, enabled: bool = True) -> torch.autocast:
    """Return autocast to bf16 for tensors on `device`; the only place that opens autocast for training."""
    return torch.autocast(autocast_type(device), torch.bfloat16, enabled=enabled)


TOWER_KEYS, LANGUAGE_MODEL_KEYS = 384, 512
"""Longest sequences for which plain matrix products beat torch's fused attention on a CPU in bf16. The fused kernel
took 1.2 to 6.5 times as long for the towers of CLIPS. A step of SmolLM2-135M on 32 samples of 40 tokens
took 3.1 s of one core with it and 2.1 s without. In fp32 the fused kernel is faster."""


def attends_plainly(device: torch.device, dtype: torch.dtype, keys: int, most: int) -> bool:
    """Return True if attention to `keys` keys is computed with plain products; `most` is one of the constants above."""
    return device.type == "cpu" and dtype == torch.bfloat16 and keys <= most


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory in GB so far: of the GPU, or of this process if there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def unused_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for later allocations unless the user set the allocator. Return True if it does.

    By default glibc gives freed tensors back to the kernel, and each step faults their pages in again.
    """
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(option, value) == 1 for option, value in KEEP_FREED)


def bound_kernel_caches() -> None:
    """Let oneDNN keep fewer compiled kernels; call it before the process's first matrix product.

    Each length of a text compiles new kernels. By default oneDNN and torch's layer on it keep 1,024 each, which takes
    hundreds of MB. Sets an environment variable for each of the two, unless it is set already.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "128")  # of torch's layer on oneDNN


def import_deepspeed() -> Any:
    """Import deepspeed quietly, without the shared-memory op that it would compile (and leave in /dev/shm) on CPUs."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed
        import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = deepspeed.accelerator.get_accelerator()
    if accelerator.device_name() == "cpu" and not has_bf16(torch.device("cpu")):
        # DeepSpeed claims bf16 for every CPU, so Muon's products would be emulated.
        accelerator.is_bf16_supported = lambda: False
    return deepspeed


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """Return the content of env.json: what may explain a difference between two runs of one configuration."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu × {torch.get_num_threads()}",
        "world_size": world_size,
        "packages": package_versions(),
    }


def package_versions() -> dict[str, str]:
    """Return the version of each of PACKAGES that is installed."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
