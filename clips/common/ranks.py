"""What ranks do for one another: share work, do long work once for all, and report which rank was lost."""

import contextlib
import platform
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from clips.common.errors import CommandError
from clips.common.paths import this_machine

ROOT = f"{Path(__file__).resolve().parents[2]}/"
OURS = (f"{ROOT}clips/", f"{ROOT}mllm/")
PATIENCE = timedelta(days=30)
"""Timeout for work that grows with the data. The usual timeout of a collective is for ranks that hang."""
T = TypeVar("T")


def my_share(items: Sequence[T], *, sharded: bool) -> Sequence[T]:
    """Return the `items` that this rank works on: every n-th for n ranks, or all of them unless `sharded`."""
    return items[dist.get_rank() :: dist.get_world_size()] if sharded else items


def all_shares(mine: list[T], *, sharded: bool) -> list[T]:
    """Return the results of all ranks in the order of the items, on every rank. Collective if `sharded`."""
    if not sharded:
        return mine
    parts: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, mine)
    return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]


def once_per_machine(make: Callable[[], T]) -> T:
    """Run `make` on the first rank of each machine, and return its result on all ranks of that machine.

    Collective. The other ranks wait however long it takes, and receive the result by pickle. If `make` raises, only its
    own rank gets the error, and the others go on waiting until something else ends them.
    """
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, f"{platform.node()} {this_machine()}")
    # Every rank makes all groups: a group that only its members make is named after them, and a second group of that
    # name meets at the addresses of the first.
    groups: dict[str, Any] = {}
    for host in dict.fromkeys(hosts):
        ranks = [rank for rank, other in enumerate(hosts) if other == host]
        groups[host] = dist.new_group(ranks, timeout=PATIENCE, backend="gloo")

    host = hosts[dist.get_rank()]
    first = hosts.index(host)
    result: list[Any] = [make() if dist.get_rank() == first else None]
    dist.broadcast_object_list(result, src=first, group=groups[host])
    dist.destroy_process_group(groups[host])
    return result[0]


@contextlib.contextmanager
def naming_lost_ranks(step: Callable[[], int]) -> Iterator[None]:
    """Turn a failed or timed-out collective into a CommandError that shows this rank, the place and the lost ranks.

    NCCL's watchdog ends its process by itself instead, with a report of its own. gloo's errors are plain
    RuntimeErrors, known by their text.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(OURS)]
        place = f"{frames[-1].filename.removeprefix(ROOT)}:{frames[-1].lineno}" if frames else "the engine"
        lost = ", ".join(map(str, lost_ranks()))
        raise CommandError(
            f"rank {dist.get_rank()}: a collective of step {step()} failed at {place}: {str(error).splitlines()[0]}\n"
            + (f"No sign of life from rank {lost}: look for its error above" if lost else "Every rank is alive")
            + ". The same command goes on from the last checkpoint"
        ) from error


def lost_ranks(seconds: float = 10) -> list[int]:
    """Return the ranks that do not call this too within `seconds`, or rank 0 if its store does not answer."""
    store = dist.distributed_c10d._get_default_store()
    waiting = [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
    end = time.monotonic() + seconds
    try:
        store.set_timeout(timedelta(seconds=seconds))
        store.set(f"alive/{dist.get_rank()}", "yes")
        while waiting and time.monotonic() < end:
            waiting = [rank for rank in waiting if not store.check([f"alive/{rank}"])]
            time.sleep(0.1)
    except RuntimeError:
        return [0]
    return waiting
