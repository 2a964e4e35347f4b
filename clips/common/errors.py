"""Errors that end a command, with the exit code each one means (one table for every script).

0 done · 2 the user's mistake · 3 loss not finite · 4 data broken beyond the limit ·
5 no usable checkpoint · 130/143 stopped by Ctrl-C/SIGTERM after saving.
"""

from __future__ import annotations

import sys
from collections.abc import Callable


class CommandError(Exception):
    """A condition that ends the command with `exit_code` and its message, without a traceback."""

    exit_code = 1


class UserError(CommandError):
    """The user's mistake: the message says what, where, and how to mend it."""

    exit_code = 2


class NotFiniteError(CommandError):
    """The loss or a gradient became NaN or infinite; no weight was touched."""

    exit_code = 3


class BrokenDataError(CommandError):
    """More samples are broken than the configured limit allows."""

    exit_code = 4


class NoCheckpointError(CommandError):
    """Checkpoints exist but none of them is usable; never a silent restart from zero."""

    exit_code = 5


class Stopped(CommandError):
    """A signal asked the run to end; a checkpoint was written first. `exit_code` is 128 + signal."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_command(main: Callable[[], None]) -> int:
    """Run `main` and return its exit code; a `CommandError` is printed as one message."""
    try:
        main()
    except CommandError as error:
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0
