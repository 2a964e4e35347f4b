"""Started as ranks or alone: scripts/train_llava.py, to which something happens at a step.

python llava_worker.py keep STEP [flags]: once the checkpoint of STEP is whole, the run is copied to OUTPUT_DIR-kept.
python llava_worker.py kill STEP [flags]: SIGKILL when the checkpoint of STEP is written and not sealed yet.
python llava_worker.py memory 0 [flags]: prints how much memory of its own the process takes at most, beyond its start.
python llava_worker.py each 0 [flags] + [flags] + …: several stages, one after the other, in the same processes.
"""

import atexit
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from clips.common.distributed import init_distributed, shutdown
from clips.common.errors import run_command
from clips.engine import checkpoint
from mllm.training import run as running
from mllm.training.config import parse_stage
from mllm.training.run import run_stage
from mllm.training.trainer import LlavaTrainer


def stop_in_step(step: int) -> None:
    """Send this process SIGTERM when a stage is in optimizer step `step` (1-based)."""
    original = LlavaTrainer.begin_step

    def begin_step(self: LlavaTrainer) -> tuple[int, dict[str, float]]:
        if self.state.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    LlavaTrainer.begin_step = begin_step


def keep_at(step: int) -> None:
    """Copy the run to a place of its own, as far as it is, once the checkpoint of `step` is whole."""
    original = checkpoint.save

    def save(run_dir: Path, *rest: Any) -> Path:
        saved = original(run_dir, *rest)
        if int(saved.name[5:]) == step:
            shutil.copytree(run_dir.parent, run_dir.parent.with_name(f"{run_dir.parent.name}-kept"))
        return saved

    checkpoint.save = save


def kill_at(step: int) -> None:
    """End this process by SIGKILL when the checkpoint of `step` is written and not sealed yet."""
    original = checkpoint.seal

    def seal(directory: Path) -> None:
        if directory.name.startswith(f"step-{step:08d}"):
            os.kill(os.getpid(), signal.SIGKILL)
        original(directory)

    checkpoint.seal = seal


def own_memory() -> float:
    """MB of memory that this process cannot share or write back to a file."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


def watch_memory() -> None:
    """Print the peak of `own_memory` at the end, beyond what it was before the parts of the model were loaded."""
    build, peak = running.build_stage, [0.0, 0.0]

    def watched(*parts: Any) -> Any:
        peak[0] = own_memory()
        return build(*parts)

    def watch() -> None:
        while True:
            peak[1] = max(peak[1], own_memory())
            time.sleep(0.001)

    running.build_stage = watched
    threading.Thread(target=watch, daemon=True).start()
    atexit.register(lambda: print(f"rank {os.environ['RANK']} took {peak[1] - peak[0]:.0f} MB", flush=True))


def run_each(words: list[str]) -> None:
    """Run the stages whose flags stand between the + of `words`; the process group stays for the next stage."""
    running.shutdown = lambda: None
    running.init_distributed = lambda device: None if dist.is_initialized() else init_distributed(device)
    stages: list[list[str]] = [[]]
    for word in words:
        stages.append([]) if word == "+" else stages[-1].append(word)
    for flags in stages:
        run_stage(parse_stage(flags))
    shutdown()


if __name__ == "__main__":
    what, step, *flags = sys.argv[1:]
    if what == "each":
        sys.exit(run_command(lambda: run_each(flags)))
    if what == "memory":
        watch_memory()
    else:
        (keep_at if what == "keep" else kill_at)(int(step))
    sys.exit(run_command(lambda: run_stage(parse_stage(flags))))
