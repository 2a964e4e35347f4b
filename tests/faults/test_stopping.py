"""A launcher that dies and leaves its ranks behind, a second start meanwhile, a scheduler's signal, the sbatch file."""

import os
import platform
import signal
import subprocess
import sys

import pytest
import warm
from conftest import ROOT
from launched import (
    ENV,
    SCRIPT,
    assert_saved_at_the_end,
    deepspeed,
    endless,
    last_step,
    of_run,
    python,
    rank,
    run,
    started,
    torchrun,
    wait_for,
    wait_until_gone,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("launch", "generation"), [(deepspeed, 2), (torchrun, 1)])
def test_ranks_without_their_launcher_save_and_end(launch, generation, shards, tmp_path):
    """`deepspeed` itself (the second generation above a rank), or torchrun, killed with -9.

    It was started in the background by a shell that has ended, which is nobody's wish to stop.
    """
    run_dir, log = tmp_path / "r", tmp_path / "log"
    words = launch(*endless(tmp_path, shards))
    start = ["bash", "-c", 'nohup "$@" &', "-", str(warm.program(tmp_path)), *words[words[0] == sys.executable :]]
    with log.open("wb") as out:  # the shell ends at once
        subprocess.run(start, cwd=ROOT, env=ENV | {warm.ADDRESS: warm.start()}, stdout=out, stderr=out, check=True)
    try:
        wait_for(lambda: last_step(run_dir) >= 5, None, log)
        above = rank(tmp_path, 0).parents()[generation - 1]
        if launch is deepspeed:
            again = run(python(*endless(tmp_path, shards)))
            assert again.code == 2
            assert f"process {rank(tmp_path, 0).pid} under launcher " in again.text
            assert f"{above.pid} on host {platform.node()}" in again.text
        above.kill()
        wait_until_gone(tmp_path)
    finally:
        for process in of_run(tmp_path):
            process.kill()
    assert "the launcher is gone" in log.read_text()
    assert_saved_at_the_end(run_dir)


def test_a_scheduler_s_signal_to_one_rank_saves_and_has_an_exit_code_of_its_own(shards, tmp_path):
    log = tmp_path / "log"
    with started(deepspeed(*endless(tmp_path, shards)), log) as process:
        wait_for(lambda: last_step(tmp_path / "r") >= 3, process, log)
        rank(tmp_path, 1).send_signal(signal.SIGUSR1)
        assert process.wait(60) == 128 + signal.SIGUSR1
        wait_until_gone(tmp_path)
    assert "stopped by SIGUSR1; a checkpoint was saved" in log.read_text()
    assert_saved_at_the_end(tmp_path / "r")


SRUN = """#!/bin/bash
# As srun: the command once per node, signals passed on to each, the highest exit code.
tasks=()
for _ in $(seq "$SLURM_JOB_NUM_NODES"); do "$@" & tasks+=($!); done
trap 'kill -USR1 "${tasks[@]}"' USR1
highest=0
for task in "${tasks[@]}"; do
  while :; do
    wait "$task"; code=$?
    kill -0 "$task" 2>/dev/null || break
  done
  if [ "$code" -gt "$highest" ]; then highest=$code; fi
done
exit "$highest"
"""
SCONTROL = """#!/bin/bash
echo "$@" >>"$(dirname "$0")/scontrol.log"
if [ "$1 $2" = "show hostnames" ]; then echo localhost; fi
"""


def test_the_sbatch_file_saves_before_the_end_and_asks_to_be_queued_again(shards, tmp_path):
    """srun and scontrol stand in for a cluster; torchrun, its two launchers and the training are real."""
    programs = tmp_path / "bin"
    programs.mkdir()
    launcher = f'#!/bin/sh\nexec {warm.program(tmp_path)} -m torch.distributed.run "$@"\n'
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "torchrun": launcher}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "here", "SLURM_GPUS_ON_NODE": "1"}
    env = job | {"PATH": f"{programs}:{os.environ['PATH']}", warm.ADDRESS: warm.start()}
    batch = ["bash", "scripts/slurm/train.sbatch"]
    with started([*batch, *endless(tmp_path, shards)], tmp_path / "log", env) as process:
        wait_for(lambda: last_step(tmp_path / "r") >= 3, process, tmp_path / "log")
        process.send_signal(signal.SIGUSR1)  # to the batch shell alone, as `--signal=B:USR1@120` asks
        assert process.wait(90) != 0
        wait_until_gone(tmp_path)
    assert_saved_at_the_end(tmp_path / "r")
    calls = (programs / "scontrol.log").read_text().splitlines()
    assert calls == ["show hostnames here", "requeue 7"]

    mistake = run([*batch, SCRIPT, "--recipe", "no-such-recipe"], env=env)
    assert mistake.code != 0
    calls = (programs / "scontrol.log").read_text().splitlines()
    assert "requeue 7" not in calls[2:], "what fails by itself would fail again"
