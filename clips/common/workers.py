"""Processes that another one starts, and that never outlive it: data workers, which end after its last step."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time


def start_worker(worker: int) -> None:
    """The `worker_init_fn` of every DataLoader with workers."""
    # A stop signal reaches the whole group, but the main process still ends its step, with this worker's batches.
    # Launchers send more than one. SIGTERM is obeyed a minute later: torch sends it too, to a worker that hangs.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    end_with(os.getppid())


def end_with(parent: int) -> None:
    """End this process once `parent`, which started it, is gone, as after a SIGKILL; it looks every second.

    torch's own watch ends a worker's work, but then it waits for ever to get rid of batches that nobody takes.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def kill_workers() -> None:
    """Kill the workers of this process, which ends with an error: the error's traceback keeps their loader alive.

    torch would end each with SIGTERM, which `start_worker` lets it obey a minute later.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error of its own
    for worker in multiprocessing.active_children():
        worker.kill()
