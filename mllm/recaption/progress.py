"""How fast captions come, told by every process in a file of its own, and shown to whoever looks at the folder."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from rich.console import Console
from tqdm import tqdm

from clips.common.escape import for_rich
from clips.common.files import read_json, write_json
from mllm.recaption.manifest import Folder
from mllm.recaption.shards import Shard
from mllm.recaption.work import Tally

EVERY = 2.0
"""Seconds between two writes of a file, and at least between two looks at all of them."""
LONGEST_SILENCE = 60.0
"""Seconds between two lines where there is no terminal; a shard may take hours."""
LOOKING = 0.02
"""Share of the time that may go into looking: thousands of processes have thousands of files."""


class Speed:
    """Keeps `path` at what this process has done, at most once in EVERY seconds and at the end of the `with`."""

    def __init__(self, path: Path, tally: Tally) -> None:
        self.path, self.tally = path, tally
        self._written = float("-inf")

    def __enter__(self) -> Speed:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        write_json(self.path, vars(self.tally))

    def changed(self) -> None:
        if time.monotonic() - self._written >= EVERY:
            self._written = time.monotonic()
            write_json(self.path, vars(self.tally))


def measured(folder: Folder, before: Tally | None = None) -> Tally:
    """What all processes have done in the folder, less what they had done `before`."""
    total = Tally()
    for path in folder.speed.glob("[!.]*.json"):
        record = read_json(path)
        total.add(Tally(**{**record, "bad": Counter(record.get("bad", {}))}))
    return total if before is None else total.less(before)


class Board:
    """A bar on a terminal, elsewhere a line a shard, and a minute; all processes of the folder count."""

    def __init__(self, folder: Folder, shards: Sequence[Shard], console: Console) -> None:
        """`shards`: those that are to be done."""
        self.folder, self.console = folder, console
        self._total = sum(map(len, shards))
        self._before, self._begin = measured(folder), time.monotonic()
        self._bar: tqdm | None = None
        self._next, self._told, self._told_at = float("-inf"), 0, time.monotonic()
        self._last = Tally()

    @contextmanager
    def showing(self) -> Iterator[None]:
        """At its end once more: the last looks are seldom of all that was done."""
        hidden = not self.console.is_terminal or self.console.quiet
        with tqdm(total=self._total, unit=" pairs", desc="captions", smoothing=0.1, disable=hidden) as bar:
            self._bar = None if hidden else bar
            yield
            self._next = float("-inf")
            self.show()

    def show(self) -> Tally:
        """What was done since this began, looked up at most once in EVERY seconds."""
        begin = time.monotonic()
        if begin < self._next or self.console.quiet:
            return self._last
        self._last = tally = measured(self.folder, self._before)
        self._next = time.monotonic() + max(EVERY, (time.monotonic() - begin) / LOOKING)
        if self._bar is not None:
            self._bar.set_postfix_str(self._text(tally), refresh=False)
            self._bar.update(min(tally.pairs + tally.found, self._total) - self._bar.n)
        elif tally.shards > self._told or time.monotonic() - self._told_at >= LONGEST_SILENCE:
            self._told, self._told_at = tally.shards, time.monotonic()
            self.say(f"{tally.shards:,} shards, {tally.pairs:,} of {self._total:,} captions, {self._text(tally)}")
        return tally

    def say(self, text: str) -> None:
        self.console.print(for_rich(text), highlight=False, soft_wrap=True)

    def _text(self, tally: Tally) -> str:
        seconds = max(time.monotonic() - self._begin, 1e-9)
        text = f"{tally.pairs / seconds:.1f} images/s, {tally.tokens / seconds:.0f} tokens/s"
        if self._bar is None and tally.pairs:
            left = (self._total - tally.pairs - tally.found) * seconds / tally.pairs
            text += f", {max(left, 0) / 60:.1f} min left"
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in tally.bad.most_common(4))
        return text + (f", {reasons}" if reasons else "")
