#!/usr/bin/env python
"""Train one stage of a LLaVA-style model or, with --launch (scripts/train_llava.sh), both, and evaluate the model."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from clips.common.errors import UserError, run_command

SCRIPTS = Path(__file__).resolve().parent


def main() -> None:
    first, *words = sys.argv[1:] or [""]
    if first == "--launch":
        return launch(words)
    from mllm.training.config import StageConfig, parse_stage

    is_resolved = first == "--config"  # by `launch`, or by a comparison
    config = StageConfig.from_json(words[0]) if is_resolved else parse_stage(sys.argv[1:])
    from mllm.training.run import run_stage

    return run_stage(config)


def launch(words: list[str]) -> None:
    """Run each stage in separate processes, then the evaluation if there are questions for this model."""
    from clips.common.launch import launcher
    from mllm.training.config import parse_stages

    stages = parse_stages(words, ranks_of)
    last = stages[-1]
    python = os.environ.get("PYTHON") or sys.executable
    command = [python, *launcher(ranks_of(last.device)), str(SCRIPTS / "train_llava.py")]
    is_model = last.stage == 2 and not last.dry_run
    # The demo's questions say nothing about a model that was trained on other data.
    evaluates = is_model and not any(config.data_path for config in stages)
    for config in stages:
        # A stage prints a next step only if none follows here.
        env = {"CLIPS_MLLM_GOES_ON": "1"} if evaluates or config is not last else {}
        run([*command, "--config", config.to_json()], os.environ | env)
    place = Path(last.output_dir)
    # The run of a model that was trained on captions holds images for its evaluation.
    if evaluates or (is_model and (place / "held_out" / "description.jsonl").is_file()):
        script = str(SCRIPTS / "evaluate_llava.py")
        run([python, script, "--model", str(place / "model"), "--device", last.device], os.environ)


def ranks_of(device: str) -> int:
    """Return how many processes train a stage: NUM_GPUS, by default one for each GPU that torch sees."""
    from clips.common.launch import count_ranks

    number = os.environ.get("NUM_GPUS") or None
    if number and not (number.isdecimal() and int(number)):
        raise UserError(f"NUM_GPUS={number} must be a number of GPUs")
    return count_ranks(number and int(number), device, "NUM_GPUS")


def run(command: list[str], env: Mapping[str, str]) -> None:
    """Run `command`, and exit with its code if it fails. After a signal it is waited for, because it saves first."""
    from clips.common.launch import pass_signals_on, shell_code

    came = pass_signals_on(but=signal.SIGINT)  # Ctrl-C reaches the whole process group
    code = shell_code(subprocess.Popen(command, env=env).wait())
    if code or came:
        sys.exit(code or 128 + came[0])


if __name__ == "__main__":
    sys.exit(run_command(main))
