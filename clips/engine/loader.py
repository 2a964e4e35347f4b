"""Load batches in worker processes, whose errors end a run in one line, as those of the main process do."""

import multiprocessing
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from clips.common.errors import CommandError
from clips.common.signals import start_worker
from clips.engine.engine import Batch

_DEAD_WORKER = re.compile(r"DataLoader worker \(pid\S* [\d, ]+\)")


def load_batches(read: Callable[[Any], Batch], places: Iterable[Any], workers: int, setting: str) -> Iterator[Batch]:
    """Return an iterator over `read(place)` for each of `places`, in order; the worker processes start at once.

    Iterating raises the CommandErrors of `read`, and CommandError if a worker died.

    Args:
        read: Returns a full micro-batch.
        setting: Name of the setting or flag that says how many workers there are.
    """
    sampler: Any = places  # annotated as if it needed a length
    loader = DataLoader(
        _Batches(read), batch_size=None, sampler=sampler, num_workers=workers, collate_fn=_unchanged,
        worker_init_fn=start_worker, pin_memory=torch.cuda.is_initialized(),
    )  # fmt: skip
    iterator = iter(loader)
    # torch's first loader sets a SIGCHLD handler that raises anywhere in the main process, even in the midst of a save.
    # Without the handler a dead worker is noticed within 5 s, while a batch is awaited.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return _guarded(iterator, multiprocessing.active_children(), setting)


@dataclass
class _Batches(Dataset):
    read: Callable[[Any], Batch]

    def __getitem__(self, place: Any) -> Batch | CommandError:
        try:
            return self.read(place)
        except CommandError as error:  # raised in the main process, where it keeps its type and exit code
            return error


def _unchanged(item: Any) -> Any:
    return item


def _guarded(iterator: Iterator[Any], workers: Sequence[BaseProcess], setting: str) -> Iterator[Batch]:
    try:
        while True:
            batch = next(iterator, None)
            if batch is None:
                return
            if isinstance(batch, CommandError):
                raise batch
            yield batch
    except (RuntimeError, OSError, EOFError) as error:
        worker = _dead_worker(error, workers)
        if worker is None:
            raise
        raise CommandError(f"{worker} died, probably for lack of memory or /dev/shm: use fewer {setting}") from error
    finally:
        del iterator  # a traceback that somebody keeps would keep the workers too


def _dead_worker(error: Exception, workers: Sequence[BaseProcess]) -> str | None:
    """Return the dead worker that caused `error`, or None.

    A worker's socket closes a moment before its process is seen to be dead.
    """
    named = _DEAD_WORKER.search(str(error))
    if named:
        return named.group()
    if not workers or (isinstance(error, RuntimeError) and "Pin memory thread" not in str(error)):
        return None
    time.sleep(1)
    dead = [str(worker.pid) for worker in workers if not worker.is_alive()]
    return f"DataLoader worker (pid(s) {', '.join(dead)})" if dead else None
