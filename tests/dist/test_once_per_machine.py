"""One rank of a machine opens the data for all: others wait beyond a collective's timeout, and open nothing."""

import json
import multiprocessing
import os
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist
from launched import pictures, recap, write_shard

from clips.common import ranks
from clips.common.ranks import once_per_machine
from clips.common.runtime import unused_port
from clips.config import Fields
from clips.data.sources import Source, open_source

pytestmark = pytest.mark.slow
TIMEOUT = 1.0
"""Seconds of a collective, which the tests' work exceeds."""


def write_small_shards(folder: Path, count: int) -> None:
    """`count` tars of img2dataset's layout, of one and of two samples in turns."""
    samples = [(picture, recap(web, long)) for picture, web, long in pictures(2)]
    for i in range(count):
        write_shard(folder / f"{i:06d}.tar", samples[: 1 + i % 2])


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
    with calls.open("a", encoding="utf-8") as file:
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


def read_by(rank: int, spec: str, fields: Fields) -> tuple[list[str], list[str]]:
    """Keys of the source that a rank gets, and below `spec` what it opened, listed or looked at to get it."""
    touched: list[str] = []
    stat, listening = os.stat, True

    def noting(path, *rest, **named):
        touched.append(str(path))
        return stat(path, *rest, **named)

    def heard(event: str, arguments: tuple) -> None:
        if listening and event in ("open", "os.listdir", "os.scandir"):
            touched.append(str(arguments[0]))

    os.stat = noting  # of which there is no audit event
    sys.addaudithook(heard)
    source: Source = once_per_machine(partial(open_source, spec, fields, need_long=True))
    listening, before_reading = False, [path for path in touched if path.startswith(spec)]
    return [source.read(i).key for i in range(len(source))], before_reading


@pytest.mark.parametrize("kind", ["shards", "table"])
def test_the_others_read_alike_and_look_at_no_file_before(tmp_path: Path, kind: str) -> None:
    spec, fields, samples = tmp_path / "data", Fields(), 9 + 4
    if kind == "shards":
        write_small_shards(spec, 9)
    else:
        spec, fields, samples = tmp_path / "data.jsonl", Fields(image="image", web="web", long="long"), 5
        rows = [{"image": f"{i}.png", "web": "a tile", "long": "It is teal."} for i in range(samples)]
        for row in rows:
            (tmp_path / row["image"]).write_bytes(b"bytes")
        spec.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (first, looked_at), (others, nothing) = in_ranks(read_by, str(spec), fields)
    assert first == others
    assert len(first) == samples
    assert looked_at
    assert nothing == []
