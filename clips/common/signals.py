"""Remember a stop signal, or the loss of the launcher, until the step has ended and a checkpoint is written."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from functools import cache
from types import FrameType

import psutil

from clips.common.errors import Stopped, outlive_readers

GONE = 0
"""Stands for a launcher that was gone before this process looked: no process has this id."""
STOP_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
"""Signals that stop a run; SIGHUP also stands for a launcher that is gone."""


class StopSignal:
    """Remembers SIGTERM, Ctrl-C, SIGUSR1 (a scheduler's) or SIGHUP, so that the step ends and a checkpoint is written.

    SIGHUP comes when a terminal is closed or its connection is lost. Under `nohup` it stays ignored. Launchers pass on
    a signal that the process group has received already, so a second one changes nothing; only another Ctrl-C
    after `PATIENCE` seconds ends the run at once.
    """

    PATIENCE = 2.0

    def __init__(self) -> None:
        self.number = 0
        self.since = 0.0
        self.launchers = LAUNCHERS
        _takes_over.set()
        self.before = {}
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number = number
            self.since = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.since > self.PATIENCE:
            raise KeyboardInterrupt

    @property
    def requested(self) -> int:
        """Number of the signal that came, or 0; SIGHUP if the launcher is gone. Read at every step."""
        outlive_readers()
        if not self.number and has_lost(self.launchers):
            self.number = signal.SIGHUP
        return self.number

    def restore(self) -> None:
        """Restore the signal handlers that were installed before this object."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def stopped_by(number: int) -> Stopped:
    """Return the error that ends the run after the checkpoint, for the signal `number` that the ranks agreed on."""
    what = f"stopped by {signal.Signals(number).name}"
    if number == signal.SIGHUP:
        what = "the launcher is gone, or the terminal was closed"
    message = f"{what}; a checkpoint was saved, and the same command goes on from there"
    return Stopped(message, exit_code=128 + number)


def launchers() -> list[int]:
    """Return the ids of the launcher processes of torchrun or `deepspeed` above this rank on this host; empty for none.

    torchrun is the parent. `deepspeed` starts a launcher, the parent, and waits for it; killed with -9, or with a
    signal it does not pass on, it leaves launcher and ranks running. Whatever started *them* may end freely, as a
    shell does when its user leaves `deepspeed … &` behind and logs out.
    """
    if not os.environ.keys() & {"TORCHELASTIC_RUN_ID", "CROSS_SIZE"}:  # torchrun's, and the deepspeed launcher's
        return []
    processes = [os.getppid()]
    with contextlib.suppress(psutil.Error):  # gone at this moment, or hidden from this user
        parent = psutil.Process(processes[0])
        line = " ".join(parent.cmdline())
        if _adopts(parent) and not any(word in line for word in ("torch", "deepspeed", "python")):
            return [GONE]
        if "deepspeed.launcher.launch" in line:
            above = psutil.Process(parent.ppid())
            if any("deepspeed" in word for word in above.cmdline()):
                processes.append(above.pid)
            elif _adopts(above):
                return [GONE]  # killed before this rank had begun
    return processes


def _adopts(process: psutil.Process) -> bool:
    """Return True if `process` is the parent of orphans: init, or a user's systemd."""
    return process.pid == 1 or process.name() == "systemd"


def has_lost(known: Sequence[int]) -> bool:
    """Return True if a launcher is gone; `known` are those that `launchers` returned before.

    The system gives an orphan another parent at once. Command lines are not read again, since this runs at every step.
    """
    if not known:
        return False
    *_, above = known
    try:
        return os.getppid() != known[0] or (above != known[0] and psutil.Process(known[0]).ppid() != above)
    except psutil.Error:  # gone in this moment
        return True


LAUNCHERS = launchers()
"""The launchers when this process began, so that one that is killed before the training begins is missed as well."""
_takes_over = threading.Event()
"""Set once a StopSignal watches the launcher."""


@cache
def end_with_launcher() -> None:
    """End this process once its launcher is gone, until a StopSignal takes over. Before that there is nothing to save.

    Ranks that wait for one another would otherwise wait until a collective times out.
    """

    def watch() -> None:
        while not _takes_over.wait(0.5):
            if has_lost(LAUNCHERS):
                print("error: the launcher is gone, which would have stopped this rank", file=sys.stderr, flush=True)
                os._exit(128 + signal.SIGHUP)

    if LAUNCHERS:
        threading.Thread(target=watch, daemon=True).start()


def start_worker(worker: int) -> None:
    """Make a data worker outlive stop signals but not its parent; `worker_init_fn` of every DataLoader with workers."""
    # A stop signal reaches the whole group, but the main process still ends its step, with this worker's batches.
    # Launchers send more than one. SIGTERM is obeyed a minute later: torch sends it too, to a worker that hangs.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    end_with(os.getppid())


def end_with(parent: int) -> None:
    """Start a thread that exits this process with code 1 within a second after `parent`, which started it, is gone.

    torch's own watch stops a worker's work after a SIGKILL of the parent, but then blocks on batches that nobody takes.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
