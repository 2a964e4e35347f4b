"""Where a training is, in words, and what comes next.

A terminal has one line that is rewritten. A file has a line every half minute, or every CLIPS_MLLM_LINE_SECONDS.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from shutil import get_terminal_size
from time import monotonic
from typing import Any

from clips.common.escape import clip, for_terminal
from clips.common.signals import outlive_readers

LINE_SECONDS = "CLIPS_MLLM_LINE_SECONDS"
"""Name of the environment's value: seconds between two lines of a file, 30 without it."""
WORDS = {
    "contrastive_loss": "image-text loss {:.3g}",
    "caption_loss": "caption loss {:.3g}",
    "samples_per_s": "{:,.0f} samples/s",
    "data_wait_share": "waiting for data {:.0%} of the time",
    "mfu": "{:.0%} of the processor's peak",
    "peak_memory_gb": "{:.1f} GB",
}
"""Figure of a record → words for it, in the order of worth: a narrow terminal cuts the end."""


class LiveLine:
    """The progress line of a loop, on stderr."""

    def __init__(self) -> None:
        self.rewrites = sys.stderr.isatty()
        self._every = float(os.environ.get(LINE_SECONDS) or 30)
        self._last, self._width = -math.inf, 0

    def show(self, text: str, *, final: bool = False) -> None:
        """Rewrite the line on a terminal. Add it to a file if it is `final`, or the last line is old enough."""
        if self.rewrites:
            text = clip(text, get_terminal_size().columns - 1)  # a longer line would not be rewritten whole
            self._write(f"\r{text.ljust(self._width)}")
            self._width = len(text)
        elif final or monotonic() >= self._last + self._every:
            self._last = monotonic()
            self._write(f"{text}\n")

    def say(self, text: str) -> None:
        """A line that stays, above the progress line."""
        self._write(f"\r{' ' * self._width}\r{text}\n" if self._width else f"{text}\n")
        self._width = 0

    def close(self) -> None:
        """End the line."""
        if self._width:
            self._write("\n")
        self._width = 0

    @staticmethod
    def _write(text: str) -> None:
        outlive_readers()
        print(text, end="", file=sys.stderr, flush=True)


def progress_line(values: Mapping[str, Any], total: int, left: float | None) -> str:
    """A record of metrics.jsonl in words; `left` in seconds, None if it is not known yet."""
    done = values["samples"]
    words = [f"{done:,} of {total:,} samples ({100 * done // total} %)"]
    words += [] if left is None else [f"{in_words(left)} left"]
    shown = WORDS if "contrastive_loss" in values or "caption_loss" in values else {"loss": "loss {:.3g}"} | WORDS
    words += [text.format(values[name]).replace("%", " %") for name, text in shown.items() if name in values]
    return ", ".join(words)


def say_next(command: str) -> None:
    """Name the one next step, on stderr, unless the script that runs this command goes on by itself."""
    if not os.environ.get("CLIPS_MLLM_GOES_ON"):
        outlive_readers()
        print(f"Next: {for_terminal(command)}", file=sys.stderr, flush=True)


def in_words(seconds: float) -> str:
    """A time as every plan, progress line and page tells it: 45 s, 1.5 min, 38 min, 2.5 h, 3.0 days."""
    for unit, name, most in ((1, "s", 59.5), (60, "min", 5400), (3600, "h", 48 * 3600)):
        if seconds < most:
            decimals = 1 if unit > 1 and seconds < 9.95 * unit else 0
            return f"{seconds / unit:.{decimals}f} {name}"
    return f"{seconds / 86400:,.1f} days"
