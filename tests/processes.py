"""Which processes of a training run live: its ranks, its launchers, what has outlived them."""

import time
from pathlib import Path

import psutil


def of_run(out: Path) -> list[psutil.Process]:
    """Those whose command names the output directory `out`."""

    def is_ours(process: psutil.Process) -> bool:
        try:
            return str(out) in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    return [process for process in psutil.process_iter() if is_ours(process)]


def wait_until_gone(out: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while of_run(out) and time.monotonic() < end:
        time.sleep(0.1)
    assert of_run(out) == []


def rank(out: Path, number: int) -> psutil.Process:
    """The training process of a rank."""
    processes = [process for process in of_run(out) if process.environ().get("RANK") == str(number)]
    return min(processes, key=psutil.Process.create_time)  # its workers came later
