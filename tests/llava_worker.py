"""Started by test_llava_train.py through the deepspeed launcher: scripts/train_llava.py, stopped by a signal.

python llava_worker.py STEP [flags of train_llava.py]: rank 0 gets SIGUSR1 during optimizer step STEP.
"""

from __future__ import annotations

import os
import signal
import sys

from clips.common.errors import run_command
from mllm.training.arguments import parse_train_arguments
from mllm.training.run import run_stage
from mllm.training.trainer import LlavaTrainer


def stop_in_step(step: int, number: int = signal.SIGTERM) -> None:
    """Send this process the signal `number` when `LlavaTrainer` is in optimizer step `step` (1-based)."""
    original = LlavaTrainer.training_step

    def training_step(self, *arguments, **options):
        if self.state.global_step + 1 == step and self.args.process_index == 0:
            os.kill(os.getpid(), number)
        return original(self, *arguments, **options)

    LlavaTrainer.training_step = training_step


if __name__ == "__main__":
    local_rank = [word for word in sys.argv[1:] if word.startswith("--local_rank")]  # the launcher puts it first
    step, *flags = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    stop_in_step(int(step), signal.SIGUSR1)
    sys.exit(run_command(lambda: run_stage(parse_train_arguments([*flags, *local_rank]))))
