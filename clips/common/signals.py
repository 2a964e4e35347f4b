"""A stop signal is remembered until the step has ended and a checkpoint is written."""

from __future__ import annotations

import signal
import time
from types import FrameType

from clips.common.errors import Stopped


class StopSignal:
    """Remembers a SIGTERM or Ctrl-C, so that the step ends and a checkpoint is written.

    Launchers pass on what the whole process group has got already, so a second signal is no second wish; only
    another Ctrl-C after `PATIENCE` seconds ends the run at once.
    """

    PATIENCE = 2.0

    def __init__(self) -> None:
        self.requested, self.since = 0, 0.0
        self.before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self.since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.since > self.PATIENCE:
            raise KeyboardInterrupt

    def error(self) -> Stopped:
        """What to end with after the checkpoint, also on a rank that got no signal itself."""
        number = signal.Signals(self.requested or signal.SIGTERM)
        return Stopped(
            f"stopped by {number.name}; a checkpoint was saved, and the same command goes on from there",
            exit_code=128 + number,
        )

    def restore(self) -> None:
        """Signals mean again what they meant before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
