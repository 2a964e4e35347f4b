"""One rank, or one of its workers, fails: all end with a reason, and no process is left."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from launched import (
    SCRIPT,
    deepspeed,
    lines,
    pictures,
    python,
    recap,
    small_data,
    started,
    torchrun,
    wait_for,
    write_shard,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return small_data(tmp_path_factory.mktemp("shards"))


def command(out: Path, shards: tuple[str, ...], *flags: str) -> list[str]:
    """More steps than any test waits for."""
    return [SCRIPT, "--debug", "--name", "r", "--output-dir", str(out), *shards, "--samples", "400000", *flags]


def of_rank(launcher: int, rank: int) -> psutil.Process:
    """The training process of a rank, below its launcher."""
    found = [p for p in psutil.Process(launcher).children(recursive=True) if p.environ().get("RANK") == str(rank)]
    return min(found, key=psutil.Process.create_time)  # its workers came later


def left_over(out: Path) -> list[psutil.Process]:
    """Processes of the run in `out` that still live."""

    def is_ours(process: psutil.Process) -> bool:
        try:
            return str(out) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    return [process for process in psutil.process_iter() if is_ours(process)]


def assert_nothing_left(out: Path, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while left_over(out) and time.monotonic() < end:
        time.sleep(0.1)
    assert left_over(out) == []


@pytest.mark.parametrize("launch", [deepspeed, torchrun])
def test_a_killed_rank_ends_the_others(
    launch: Callable[..., list[str]], shards: tuple[str, ...], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with started(launch(*command(tmp_path, shards)), log) as process:
        wait_for(lambda: len(lines(tmp_path / "r")) >= 3, process, log)
        of_rank(process.pid, 1).send_signal(signal.SIGKILL)
        assert process.wait(60) != 0
        assert_nothing_left(tmp_path)
    assert "rank 0: a collective of step" in log.read_text()
    assert "No sign of life from rank 1" in log.read_text()


def test_a_rank_that_hangs_is_named_with_the_place_after_the_timeout(shards: tuple[str, ...], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with started(deepspeed(*command(tmp_path, shards, "--timeout-minutes", "0.3")), log) as process:
        wait_for(lambda: len(lines(tmp_path / "r")) >= 3, process, log)
        of_rank(process.pid, 1).send_signal(signal.SIGSTOP)
        assert process.wait(150) != 0
        assert_nothing_left(tmp_path)
    said = log.read_text()
    assert "No sign of life from rank 1" in said
    assert "failed at clips/" in said
    assert "18000ms" in said


def failed_with_own_data_on_rank_1(data: Path, shards: tuple[str, ...], tmp_path: Path) -> str:
    """What a run of two ranks, the second with `data` of its own, says before it ends, which it must."""
    own = f'exec "$0" "$@" $([ "$RANK" = 1 ] && echo --data {data})'
    log = tmp_path / "log"
    words = torchrun("--no-python", "bash", "-c", own, *python(*command(tmp_path, shards)))
    with started(words, log) as process:
        assert process.wait(120) != 0
        assert_nothing_left(tmp_path)
    return log.read_text()


def test_broken_data_of_one_rank_ends_all_with_its_reason(shards: tuple[str, ...], tmp_path: Path) -> None:
    """The second rank's copy of the data is broken, as a bad disk of one node would have it."""
    broken = [(b"no picture", recap("stock photo", "A plain picture."))] * 64
    write_shard(tmp_path / "broken/0.tar", broken[:40])
    write_shard(tmp_path / "broken/1.tar", broken[40:])
    said = failed_with_own_data_on_rank_1(tmp_path / "broken", shards, tmp_path)
    assert "16 samples drawn one after another are all broken" in said
    assert "exitcode  : 4" in said


def test_a_shard_that_one_rank_lacks_is_named_before_training(shards: tuple[str, ...], tmp_path: Path) -> None:
    fewer = [(picture, recap(web, long)) for picture, web, long in pictures(40)]
    write_shard(tmp_path / "fewer/0.tar", fewer)
    said = failed_with_own_data_on_rank_1(tmp_path / "fewer", shards, tmp_path)
    assert "rank 0: 64 samples in 2 shards" in said
    assert "rank 1: 40 samples in 1 shards" in said
    assert not lines(tmp_path / "r")


def test_a_killed_worker_of_one_rank_ends_all_and_is_named(shards: tuple[str, ...], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with started(deepspeed(*command(tmp_path, shards, "--set", "data.workers=1")), log) as process:
        wait_for(lambda: len(lines(tmp_path / "r")) >= 3, process, log)
        worker = max(of_rank(process.pid, 1).children(), key=psutil.Process.create_time)
        os.kill(worker.pid, signal.SIGKILL)
        assert process.wait(60) != 0
        assert_nothing_left(tmp_path)
    assert f"(pid(s) {worker.pid})" in log.read_text()
