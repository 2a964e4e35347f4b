"""Carry out the runs of a study: locks, jobs, resume of finished runs, and a line for each change.

A finished step is never run again, and an interrupted run resumes from its files. A run is locked while a process
works on it, also by a child process that outlives a killed study.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from clips.common.errors import CommandError, Stopped
from clips.common.files import lock, read_json, write_json
from clips.common.live import say
from clips.common.page import table_of
from clips.lab.grid import COST, RECORD, Run, Step

T = TypeVar("T")
R = TypeVar("R")
WAITS, LOCK, DONE = "waits", "waits for its lock", "done"


@contextmanager
def locked(directory: Path, commands: Commands) -> Iterator[int]:
    """Hold `directory` for this process and for children that get the yielded descriptor; wait for another holder.

    A child that outlives a killed parent keeps the lock, so a second run never trains at the same time. Raises
    CommandError if the study is stopped while it waits.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    file = None
    while file is None:
        try:
            file = lock(directory.parent / f".{directory.name}.lock", wait=False)
        except BlockingIOError:
            if commands.stopping.wait(1):  # a signal also ends the wait
                raise CommandError("stopped") from None
    with file:
        yield file.fileno()


class Commands:
    """Runs commands, with `map` up to `jobs` at a time, each with its share of the cores and its output in a file."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.threads = max(1, (os.cpu_count() or 1) // jobs)
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopping = threading.Event()

    def run(self, command: Sequence[str], log: Path, **popen: Any) -> None:
        """Run a command with its share of the cores and append its output to `log`; `popen` goes to `subprocess.Popen`.

        Raises CommandError if `stopping` is set, or, with the end of the log, if the command fails.
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
        """Call `function` on each item, `jobs` at a time, and return the results in order. Main thread only.

        After the first error no further item starts, running ones finish, and the error is raised. A stop signal is
        passed on to the running commands, which save first; then Stopped is raised.
        """
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, self._stop) for number in signals}
        try:
            with ThreadPoolExecutor(self.jobs) as pool:
                futures = [pool.submit(function, item) for item in items]
                try:
                    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                finally:  # also after a signal, which raises here
                    for future in futures:
                        future.cancel()
                for future in done:
                    future.result()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return [future.result() for future in futures]

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping.set()
        for process in list(self.running):
            process.terminate()
        raise Stopped("stopped by a signal; the same command goes on where it was", exit_code=128 + number)


class Runner:
    """Runs the steps of a study that are not done, `jobs` runs at a time, each under the lock of its directory."""

    def __init__(self, runs: Sequence[Run], jobs: int) -> None:
        """`runs`: rows and columns of the table."""
        self.runs, self.jobs = runs, jobs
        self.commands = Commands(jobs)

    def run(self, runs: Sequence[Run]) -> None:
        """Run the missing steps of `runs` (all known to the runner), `jobs` at a time, with a line for each change.

        Raises UserError if a directory holds other settings, CommandError with the log's end if a command fails.
        """
        for run in runs:
            run.check()
        self.commands.map(self._work, [run for run in runs if not run.is_done()])

    def print_plan(self, title: str, facts: Mapping[str, str] | None = None) -> None:
        """Print which runs are missing, and further `facts`, a line each."""
        say(title)
        columns = list(dict.fromkeys(run.seed for run in self.runs))
        rows: dict[str, dict[str, str]] = {}
        for run in self.runs:
            rows.setdefault(run.variant, {})[run.seed] = DONE + run.result() if run.is_done() else WAITS
        texts = [[variant, *(row.get(column, "") for column in columns)] for variant, row in rows.items()]
        say(table_of("", ["", *columns], texts))
        todo = sum(not run.is_done() for run in self.runs)
        lines = {
            **{run.variant: run.about for run in self.runs if run.about},
            "runs": f"{todo} of {len(self.runs)} to run, {self.jobs} at a time",
            **(facts or {}),
        }
        for name, value in lines.items():
            say(f"  {name:<10} {value}")

    def _work(self, run: Run) -> None:
        say(f"{run.name}: {LOCK}")
        with locked(run.directory, self.commands) as descriptor:
            for step in run.steps:
                if not step.is_done():  # the process that held the lock may have done it
                    say(f"{run.name}: {step.name}")
                    _note(run, step)
                    with _timed(run, step):
                        self._run(run, step, descriptor)
        say(f"{run.name}: {DONE}{run.result()}")

    def _run(self, run: Run, step: Step, descriptor: int) -> None:
        if step.folder:
            shutil.rmtree(step.folder, ignore_errors=True)
            step.folder.mkdir(parents=True)
        try:
            self.commands.run(step.command, step.log or run.log, pass_fds=[descriptor])
        except CommandError:
            if not step.may_fail or self.commands.stopping.is_set():
                raise


def failed_steps(runs: Sequence[Run]) -> list[tuple[str, Path]]:
    """Return name and log of each step that may fail and is not done."""
    steps = [(run, step) for run in runs for step in run.steps if step.may_fail]
    return [(step.name, step.log or run.log) for run, step in steps if not step.is_done()]


def _note(run: Run, step: Step) -> None:
    """Write the run's record and the step's command to run.json, and keep the plan that an earlier run noted."""
    if run.record is None:
        return
    run.directory.mkdir(parents=True, exist_ok=True)
    before = read_json(run.directory / RECORD)
    commands = before.get("commands", {}) | {step.name: shlex.join(["python", *step.command[1:]])}
    plan = {"plan": before["plan"]} if "plan" in before else {}
    write_json(run.directory / RECORD, {**run.record, **plan, "commands": commands})


@contextmanager
def _timed(run: Run, step: Step) -> Iterator[None]:
    """Add the seconds of the step to cost.json, also if it fails."""
    begin = time.monotonic()
    try:
        yield
    finally:
        if run.record is not None:
            costs = read_json(run.directory / COST)
            costs[step.name] = round(costs.get(step.name, 0.0) + time.monotonic() - begin, 1)
            write_json(run.directory / COST, costs)
