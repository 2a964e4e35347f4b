"""Data workers: processes that a DataLoader starts, which end after their parent's last step and never outlive it."""

from __future__ import annotations

import os
import signal
import threading
import time


def start_worker(worker: int) -> None:
    """The `worker_init_fn` of every DataLoader with workers."""
    # A stop signal reaches the whole group, but the main process still ends its step, with this worker's batches.
    # Launchers send more than one. SIGTERM is obeyed a minute later: torch sends it too, to a worker that hangs.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this worker when its parent is gone, as after a SIGKILL of a rank.

    torch's own watch ends the work, but then the worker waits for ever to get rid of batches that nobody takes.
    """
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
