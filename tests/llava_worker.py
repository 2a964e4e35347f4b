"""Started through the deepspeed launcher or alone: scripts/train_llava.py, to which something happens at a step.

python llava_worker.py keep STEP [flags]: the sealed checkpoint of STEP is copied beside the run, to OUTPUT_DIR-kept.
python llava_worker.py kill STEP [flags]: SIGKILL when the checkpoint of STEP is written and not sealed yet.
python llava_worker.py each 0 [flags] + [flags] + …: several stages, one after the other, in the same processes.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import torch.distributed as dist
from accelerate.state import AcceleratorState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from clips.common.errors import run_command
from clips.common.runtime import init_distributed, shutdown
from mllm.training import run as running
from mllm.training import trainer
from mllm.training.arguments import parse_train_arguments
from mllm.training.run import run_stage
from mllm.training.task import LlavaTrainer


def stop_in_step(step: int) -> None:
    """Send this process SIGTERM when `LlavaTrainer` is in optimizer step `step` (1-based)."""
    original = LlavaTrainer.training_step

    def training_step(self, *arguments, **options):
        if self.state.global_step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments, **options)

    LlavaTrainer.training_step = training_step


def at_seal(step: int, *, before: bool, act) -> None:
    """`act(checkpoint)` before or after the checkpoint of `step` is sealed, on the rank that seals it."""
    original = trainer.seal

    def seal(directory: Path) -> None:
        if not before:
            original(directory)
        if directory.name == f"checkpoint-{step}":
            act(directory)
        if before:
            original(directory)

    trainer.seal = seal


def keep(checkpoint: Path) -> None:
    """Copy the run, as far as it is, to a place of its own."""
    run_dir = checkpoint.parents[1]
    shutil.copytree(run_dir, run_dir.with_name(f"{run_dir.name}-kept"))


def run_each(words: list[str], local_rank: list[str]) -> None:
    """Run the stages whose flags stand between the + of `words`; the process group stays for the next stage."""
    running.shutdown = lambda: None
    running.init_distributed = lambda device: None if dist.is_initialized() else init_distributed(device)
    stages: list[list[str]] = [[]]
    for word in words:
        stages.append([]) if word == "+" else stages[-1].append(word)
    for flags in stages:
        run_stage(parse_train_arguments([*flags, *local_rank]))
        unset_hf_deepspeed_config()  # ZeRO-3's would split the next stage's model while it is loaded
        AcceleratorState._reset_state(reset_partial_state=True)
    shutdown()


if __name__ == "__main__":
    local_rank = [word for word in sys.argv[1:] if word.startswith("--local_rank")]  # the launcher puts it first
    what, step, *flags = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    if what == "each":
        sys.exit(run_command(lambda: run_each(flags, local_rank)))
    if what == "keep":
        at_seal(int(step), before=False, act=keep)
    else:
        at_seal(int(step), before=True, act=lambda _: os.kill(os.getpid(), signal.SIGKILL))
    sys.exit(run_command(lambda: run_stage(parse_train_arguments([*flags, *local_rank]))))
