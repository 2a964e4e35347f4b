"""A stop signal, or a launcher that is gone, is remembered until the step has ended and a checkpoint is written."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

import psutil

from clips.common.errors import Stopped

GONE = 0
"""Stands for a launcher that was gone before this process looked: no process has this id."""
STOP_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
"""What a run can be stopped by; SIGHUP also stands for a launcher that is gone."""


class StopSignal:
    """Remembers SIGTERM, Ctrl-C, SIGUSR1 (a scheduler's) or SIGHUP, so that the step ends and a checkpoint is written.

    SIGHUP comes when a terminal is closed or its connection is lost. Under `nohup` it stays ignored. Launchers pass on
    what the whole process group has got already, so a second signal is no second wish; only another Ctrl-C after
    `PATIENCE` seconds ends the run at once.
    """

    PATIENCE = 2.0
    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self) -> None:
        self.number, self.since = 0, 0.0
        self.launchers = LAUNCHERS
        _takes_over.set()
        ignores = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        taken = [number for number in self.SIGNALS if number != signal.SIGHUP or not ignores]
        self.before = {number: signal.signal(number, self._handle) for number in taken}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self.since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.since > self.PATIENCE:
            raise KeyboardInterrupt

    @property
    def requested(self) -> int:
        """The number of the signal that came, 0 for none; SIGHUP where the launcher is gone. Asked at every step."""
        outlive_readers()
        if not self.number and has_lost(self.launchers):
            self.number = signal.SIGHUP
        return self.number

    def restore(self) -> None:
        """Signals mean again what they meant before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stopping(first: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Inside, SIGTERM, SIGUSR1 (of a scheduler) and Ctrl-C call `first` and end the command, which has no more to save.

    Raises Stopped.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        first()
        raise Stopped("stopped by a signal; the same command goes on where it was", exit_code=128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def outlive_readers() -> None:
    """Once nobody reads this process's output any more, let it go nowhere: the next `print` would end the run.

    So it is after a logout with the run in the background, and after Ctrl-C of `deepspeed --hostfile`, which cuts the
    connections first and asks the ranks to stop after that.
    """
    streams = select.poll()
    for stream in (1, 2):
        streams.register(stream, 0)  # a reader's end is reported unasked
    for stream, event in streams.poll(0):
        if event & (select.POLLERR | select.POLLHUP):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream)
            os.close(nowhere)


def stopped_by(number: int) -> Stopped:
    """What to end with after the checkpoint; `number`: what the ranks agreed on, whoever of them got it."""
    what = "the launcher is gone, or the terminal was closed" if number == signal.SIGHUP else ""
    return Stopped(
        f"{what or f'stopped by {signal.Signals(number).name}'}; a checkpoint was saved, and the same command goes on "
        "from there",
        exit_code=128 + number,
    )


def launchers() -> list[int]:
    """Process ids of what torchrun or `deepspeed` runs above this rank on this host; empty where it has no launcher.

    torchrun is the parent. `deepspeed` starts a launcher, the parent, and waits for it; killed with -9, or with a
    signal it does not pass on, it leaves launcher and ranks running. Whatever started *them* may end as it likes: a
    shell does, when its user leaves `deepspeed … &` behind and logs out.
    """
    if not os.environ.keys() & {"TORCHELASTIC_RUN_ID", "CROSS_SIZE"}:  # torchrun's, and the deepspeed launcher's
        return []
    found = [os.getppid()]
    if found == [1] and not _is_launcher(1):
        return [GONE]
    with contextlib.suppress(psutil.Error):  # gone in this moment, or hidden from this user
        parent = psutil.Process(found[0])
        if "deepspeed.launcher.launch" in parent.cmdline():
            above = psutil.Process(parent.ppid())
            if any("deepspeed" in word for word in above.cmdline()):
                found.append(above.pid)
    return found


def _is_launcher(process: int) -> bool:
    """Whether its command line may be that of a launcher; True if it cannot be read."""
    try:
        line = " ".join(psutil.Process(process).cmdline())
    except psutil.Error:
        return True
    return any(word in line for word in ("torch", "deepspeed", "python"))


def has_lost(known: Sequence[int]) -> bool:
    """Whether one of `known`, which `launchers` gave before, is gone.

    The system gives an orphan another parent at once. Command lines are not read again: this is asked at every step.
    """
    if not known:
        return False
    *_, above = known
    try:
        return os.getppid() != known[0] or (above != known[0] and psutil.Process(known[0]).ppid() != above)
    except psutil.Error:  # gone in this moment
        return True


LAUNCHERS = launchers()
"""As they were when this process began: one that is killed before the training begins is missed as well."""
_takes_over = threading.Event()
"""A StopSignal looks after the launcher from then on."""


def end_with_launcher() -> None:
    """End this process once its launcher is gone, until a StopSignal takes over: before that nothing is to be saved.

    Ranks that wait for one another would otherwise wait for the whole timeout of a collective.
    """

    def watch() -> None:
        while not _takes_over.wait(0.5):
            if has_lost(LAUNCHERS):
                print("error: the launcher is gone, which would have stopped this rank", file=sys.stderr, flush=True)
                os._exit(128 + signal.SIGHUP)

    if LAUNCHERS:
        threading.Thread(target=watch, daemon=True).start()
