"""Errors that end a command, with the exit code each one means (one table for every script).

0 done · 2 the user's mistake · 3 loss not finite, or spiking again and again · 4 data broken beyond the limit ·
5 no usable checkpoint · 130/138/143 stopped by Ctrl-C/SIGUSR1/SIGTERM, and 129 by the loss of the launcher or terminal,
each after saving.
"""

import io
import logging
import multiprocessing
import os
import pkgutil
import select
import signal
import sys
import traceback
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from clips.common.escape import printable
from clips.common.paths import CACHE_VARIABLE, cache_root, without_secrets

PACKAGES = tuple(str(Path(__file__).parents[2] / name) for name in ("clips", "mllm"))
LONGEST_MESSAGE = 20_000
"""Maximum number of characters of an error that are printed; an error may list keys and reasons from data."""


class CommandError(Exception):
    """A condition that ends the command with `exit_code` and its message, without a traceback."""

    exit_code = 1


class UserError(CommandError):
    """The user's mistake: the message says what is wrong, where, and how to fix it."""

    exit_code = 2


class NotFiniteError(CommandError):
    """The loss or a gradient became NaN or infinite; no weight was changed."""

    exit_code = 3


class DivergedError(CommandError):
    """Loss or gradient norm spikes again and again, although updates are skipped."""

    exit_code = 3


class BrokenDataError(CommandError):
    """More samples are broken than the configured limit allows."""

    exit_code = 4


class NoCheckpointError(CommandError):
    """Checkpoints exist but none is usable; a run never restarts from zero silently."""

    exit_code = 5


class Stopped(CommandError):
    """A signal asked the run to end; a checkpoint was written first. `exit_code` is 128 + signal."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, because some errors have pages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def reason(error: BaseException) -> str:
    """Return the text of an error, without an OSError's number and path."""
    return getattr(error, "strerror", None) or str(error)


def in_one_line(error: BaseException) -> str:
    """Return the error in one line, to print instead of a traceback: `ValueError: …, at report.py:44`.

    The place is the innermost frame in this project's code, or the last one if there is none.
    """
    frames = traceback.extract_tb(error.__traceback__)
    *_, last = [frame for frame in frames if frame.filename.startswith(PACKAGES)] or frames
    what = " ".join(str(error).split())
    return f"{type(error).__name__}: {what}, at {Path(last.filename).name}:{last.lineno}"


@contextmanager
def never_in_the_way(failed: str) -> Iterator[None]:
    """Turn any failure inside into one line on stderr, for a report or plot that must not end the run."""
    try:
        yield
    except Exception as error:
        print(printable(f"warning: {failed}. {in_one_line(error)}"), file=sys.stderr, flush=True)


class _ForTerminal(logging.Formatter):
    """Removes escape sequences from warnings, because they may show paths and members of archives."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(without_secrets(super().format(record)), LONGEST_MESSAGE)


def start(parser: Callable[[], ArgumentParser], function: str) -> NoReturn:
    """Run a script: parse its flags, call `function` (MODULE:NAME) with them, and exit with the exit code.

    The module is imported after the flags are parsed, because its imports may take seconds.
    """

    def main() -> None:
        flags = parser().parse_args()
        pkgutil.resolve_name(function)(flags)

    sys.exit(run_command(main))


def outlive_readers() -> bool:
    """Redirect stdout and stderr to /dev/null once their reader is gone. Return True if stdout has no reader.

    Otherwise the next `print` would end a run in the background after a logout, and a run of `deepspeed --hostfile`
    after Ctrl-C, which cuts the connections before it asks the ranks to stop.
    """
    streams = select.poll()
    for stream in (1, 2):
        streams.register(stream, 0)  # a reader's end is reported unasked
    ended = [stream for stream, event in streams.poll(0) if event & (select.POLLERR | select.POLLHUP)]
    for stream in ended:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream)
        os.close(nowhere)
    return 1 in ended


def _kill_workers() -> None:
    """Kill the data workers of this process before it ends with an error, whose traceback keeps their loader alive.

    torch would send each of them SIGTERM, but `start_worker` (clips/common/signals.py) makes it wait for a minute.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error of its own
    for worker in multiprocessing.active_children():
        worker.kill()


def run_command(main: Callable[[], None]) -> int:
    """Run `main` and return the exit code; a CommandError, an OSError or Ctrl-C becomes one message on stderr.

    Other exceptions are raised again. Data workers are killed in each of these cases. Also makes stdout and stderr
    replace characters that the terminal's encoding lacks.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # An ASCII terminal gets \\xb1 for ±. A stream whose file was replaced refuses the change.
            with suppress(OSError):
                stream.reconfigure(errors="backslashreplace")
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_ForTerminal())
    # torch, which is not imported yet, would print 20 lines of C++ frames above the message about a lost rank.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    try:
        try:
            main()
        except SystemExit:  # of --help
            print(end="", flush=True)
            raise
        print(end="", flush=True)
    except (CommandError, OSError) as error:  # a target that cannot be written, a full disk, too many open files
        _kill_workers()
        if isinstance(error, BrokenPipeError) and outlive_readers():  # `| head` has ended
            return 128 + signal.SIGPIPE
        message = str(error) if isinstance(error, CommandError) else _of_system(error)
        print(f"\nerror: {printable(without_secrets(message), LONGEST_MESSAGE)}", file=sys.stderr, flush=True)
        return error.exit_code if isinstance(error, CommandError) else CommandError.exit_code
    except KeyboardInterrupt:  # before the first step, or for the second time
        _kill_workers()
        print("\nerror: stopped by Ctrl-C", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    except BaseException:
        _kill_workers()
        raise
    return 0


def _of_system(error: OSError) -> str:
    """Return the message of an OSError; for the cache folder it also gives the variable that moves it."""
    message = in_one_line(error)
    place = Path(os.fsdecode(error.filename or ""))
    if place.is_absolute() and (place.is_relative_to(cache_root()) or cache_root().is_relative_to(place)):
        message += f"; set {CACHE_VARIABLE} to a folder that can be written"
    return message
