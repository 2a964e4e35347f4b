"""Say in words how far a training is, and what comes next.

A terminal has one line that is rewritten. A file has a line every half minute, or every CLIPS_MLLM_LINE_SECONDS.
"""

import math
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from shutil import get_terminal_size
from time import monotonic
from typing import Any

from tqdm import tqdm

from clips.common.errors import UserError, outlive_readers
from clips.common.escape import clip, one_line
from clips.common.files import read_json, write_json
from clips.common.paths import cache_root

LINE_SECONDS = "CLIPS_MLLM_LINE_SECONDS"
"""Environment variable: seconds between two lines of a file, by default 30."""
SPEEDS = "speeds.json"
"""File in the cache with the samples per second of the last run of each training."""
WORDS = {
    "contrastive_loss": "image-text loss {:.3g}",
    "caption_loss": "caption loss {:.3g}",
    "samples_per_s": "{:,.0f} samples/s",
    "data_wait_share": "waiting for data {:.0%} of the time",
    "mfu": "{:.0%} of the GPU's peak",
    "peak_memory_gb": "{:.1f} GB",
}
"""Words for the metrics of a record, the most useful first, because a narrow terminal cuts the end."""


class LiveLine:
    """The progress line of a loop, on stderr: tqdm's on a terminal, lines of their own in a file."""

    def __init__(self) -> None:
        self._bar: Any = None
        """tqdm's bar, made with the first line, so that ranks that show nothing have none."""
        self._every = float(os.environ.get(LINE_SECONDS) or 30)
        self._last = -math.inf

    def show(self, text: str, *, final: bool = False) -> None:
        """Rewrite the line on a terminal. Add it to a file if it is `final`, or the last line is old enough."""
        outlive_readers()
        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = tqdm(bar_format="{desc}", file=sys.stderr)
            # A longer line would wrap, and only its last row be rewritten.
            self._bar.set_description_str(clip(text, get_terminal_size().columns - 1))
        elif final or monotonic() >= self._last + self._every:
            self._last = monotonic()
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the line."""
        outlive_readers()
        if self._bar is not None:
            self._bar.close()
        self._bar = None


def progress_line(values: Mapping[str, Any], total: int, left: float | None) -> str:
    """Return a record of metrics.jsonl in words; `left` is in seconds, or None if it is not known yet."""
    done = values["samples"]
    words = [f"{done:,} of {total:,} samples ({100 * done // total} %)"]
    if left is not None:
        words.append(f"{in_words(left)} left")
    if values.keys().isdisjoint(("contrastive_loss", "caption_loss")) and "loss" in values:
        words.append(f"loss {values['loss']:.3g}")
    words += [text.format(values[name]).replace("%", " %") for name, text in WORDS.items() if name in values]
    return ", ".join(words)


def say(what: Any) -> None:
    """Print one line of text, or a table, on stderr, above the progress line.

    Whatever a command has to say goes through here, except for its results (`print` and `print_table`, on stdout), the
    error that ends it (clips/common/errors.py), and the warnings of modules that users import (loggers).
    """
    outlive_readers()
    if isinstance(what, str):
        tqdm.write(one_line(what), file=sys.stderr)
        return
    from rich.console import Console  # it takes longer to import than a --help may

    with tqdm.external_write_mode(file=sys.stderr):
        Console(emoji=False, stderr=True, width=None if sys.stderr.isatty() else 160).print(what)


def say_next(command: str) -> None:
    """Print the one next command on stderr, unless the script that runs this command continues by itself."""
    if not os.environ.get("CLIPS_MLLM_GOES_ON"):
        say(f"Next: {command}")


def remember_speed(training: str, samples_per_s: float) -> None:
    """Record in the cache how fast a training was; `training` describes it and the devices. Never raises."""
    path = cache_root() / SPEEDS
    with suppress(OSError, UserError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, read_json(path) | {training: float(f"{samples_per_s:.3g}")})


def expected_time(training: str, samples: int) -> str:
    """Return the expected time in words, from the speed of the last such training here, or "" if none was recorded."""
    with suppress(OSError, UserError):
        speed = read_json(cache_root() / SPEEDS).get(training)
        if isinstance(speed, float) and speed > 0:
            return f"about {in_words(samples / speed)} by the last such run here"
    return ""


def in_words(seconds: float) -> str:
    """Return a time as every plan, progress line and page shows it: 45 s, 1.5 min, 38 min, 2.5 h, 3.0 days."""
    for unit, name, most in ((1, "s", 59.5), (60, "min", 5400), (3600, "h", 48 * 3600)):
        if seconds < most:
            decimals = 1 if unit > 1 and seconds < 9.95 * unit else 0
            return f"{seconds / unit:.{decimals}f} {name}"
    return f"{seconds / 86400:,.1f} days"
