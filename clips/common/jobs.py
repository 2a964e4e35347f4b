"""Runs commands as parallel processes; a lock keeps two programs out of one directory."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from clips.common.errors import CommandError
from clips.common.files import lock
from clips.common.signals import stopping

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def locked(directory: Path, commands: Commands) -> Iterator[int]:
    """Hold `directory` for this process and for children that get the yielded descriptor; wait for another holder.

    A child that outlives a killed parent keeps the lock, so a second run never trains beside it.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    file = None
    while file is None:
        try:
            file = lock(directory.parent / f".{directory.name}.lock", wait=False)
        except BlockingIOError:
            if commands.stopping.wait(1):  # a signal ends the waiting too
                raise CommandError("stopped") from None
    with file:
        yield file.fileno()


class Commands:
    """Parallel commands, each with its own threads and its output in a file."""

    def __init__(self, jobs: int, threads: int | None = None) -> None:
        """`threads` of each command; default: its share of the cores."""
        self.jobs, self.threads = jobs, threads or max(1, (os.cpu_count() or 1) // jobs)
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopping = threading.Event()

    def run(self, command: Sequence[str], log: Path, **popen: Any) -> None:
        """Run a command and append its output to `log`; `popen` goes to `subprocess.Popen`.

        Raises CommandError with the log's end if the command fails.
        """
        if self.stopping.is_set():
            raise CommandError("stopped")
        env = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        with log.open("a", encoding="utf-8") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env, **popen)
        self.running.add(process)
        if self.stopping.is_set():  # the signal came between the check above and here
            process.terminate()
        code = process.wait()
        self.running.discard(process)
        if code != 0:
            end = "\n  ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])
            raise CommandError(f"{log.stem} ended with exit code {code}; the end of {log}:\n  {end}")

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`function` of each item, `jobs` at a time. After an error no item begins, and running items end first.

        A signal, as of `clips.common.signals.stopping`, is passed on to the running commands, which save first.
        """

        def stop() -> None:
            self.stopping.set()
            for process in list(self.running):
                process.terminate()

        with stopping(stop), ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # also after a signal, which raises here
                for future in futures:
                    future.cancel()
            for future in done:
                future.result()
        return [future.result() for future in futures]
