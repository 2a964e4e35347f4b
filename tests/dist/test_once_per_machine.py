"""One rank of a machine opens the data for all: others wait beyond a collective's timeout, and open nothing."""

from __future__ import annotations

import multiprocessing
import os
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from clips.common import ranks
from clips.common.ranks import once_per_machine
from clips.common.runtime import unused_port

pytestmark = pytest.mark.slow
TIMEOUT = 1.0
"""Seconds of a collective, which the tests' work exceeds."""


def in_ranks(work, *arguments) -> list:
    """What `work(rank, …)` returns on each of two ranks of one group."""
    with multiprocessing.get_context("fork").Pool(2) as pool:  # which ends a rank that waits for the other for ever
        return pool.map_async(partial(_in_group, work, arguments, unused_port()), range(2)).get(120)


def _in_group(work, arguments: tuple, port: int, rank: int):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    # Not before: on a busy machine the ranks take longer to find each other, and one that gives up leaves the other.
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT))
    try:
        return work(rank, *arguments)
    finally:
        dist.destroy_process_group()


def slowly(calls: Path) -> int:
    time.sleep(2 * TIMEOUT)
    with calls.open("a") as file:
        file.write("called\n")
    return os.getpid()


def opened(rank: int, machine: str, calls: Path) -> tuple[int, int]:
    ranks.this_machine = lambda: machine.format(rank=rank)
    groups, new_group = [], dist.new_group
    dist.new_group = lambda *ranks, **options: groups.append(new_group(*ranks, **options)) or groups[-1]
    try:
        process = once_per_machine(partial(slowly, calls))
        assert once_per_machine(os.getpid) == process, "it may be asked for again"
    finally:
        dist.new_group = new_group
    # One of the same name would meet at the addresses of the first, which nobody listens at any more.
    names = [group.group_name for group in groups if group is not dist.GroupMember.NON_GROUP_MEMBER]
    assert len(set(names)) == len(names) == 2
    return os.getpid(), process


@pytest.mark.parametrize(("machine", "times"), [("the same", 1), ("machine of rank {rank}", 2)])
def test_one_rank_works_and_the_others_wait_beyond_the_timeout(tmp_path: Path, machine: str, times: int) -> None:
    (first, of_first), (second, of_second) = in_ranks(opened, machine, tmp_path / "calls")
    assert (tmp_path / "calls").read_text().count("called") == times
    assert of_first == first
    assert of_second == (first if times == 1 else second)
