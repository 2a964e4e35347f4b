"""What a process runs on: its device, its process group, DeepSpeed's import."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from clips.common.errors import UserError


def choose_device(name: str = "auto") -> torch.device:
    """`auto`, `cpu` or `cuda` → this process's device; UserError when a GPU is asked for and there is none."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name!r} is not known; choose one of: auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: torch sees no GPU here (torch.cuda.is_available() is False). "
            "Use --device cpu, or install a CUDA build of torch and check nvidia-smi"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def has_bf16(device: torch.device) -> bool:
    """Whether `device` computes in bfloat16; elsewhere it is emulated, slower than float32."""
    return torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()


def unused_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def init_distributed(device: torch.device, timeout_minutes: float = 30) -> None:
    """Join the process group of `deepspeed` or torchrun; a plain `python script.py` becomes a group of one."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read by deepspeed when it is imported
    if "RANK" not in os.environ:
        tasks = {name: os.environ.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")}
        if several := [f"{name}={count}" for name, count in tasks.items() if count != "1"]:
            raise UserError(
                f"{several[0]}, but no RANK: each of these processes would train the whole run by itself. Start them "
                "with torchrun or deepspeed (one per node), or set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR"
            )
        port = str(unused_port())
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    # The CPU accelerator reads LOCAL_SIZE; the deepspeed launcher sets it, torchrun calls it LOCAL_WORLD_SIZE.
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    deepspeed = import_deepspeed()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(backend, timeout=timedelta(minutes=timeout_minutes), verbose=False)


def import_deepspeed() -> Any:
    """Import deepspeed quietly, without the shared-memory op that it would compile (and leave in /dev/shm) on CPUs."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed
        import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.cuda.is_available() and not has_bf16(torch.device("cpu")):
        # Its CPU accelerator claims bf16 on every CPU, and Muon's products would then be emulated ones.
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_bf16_supported = lambda: False
    return deepspeed


def shutdown() -> None:
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
