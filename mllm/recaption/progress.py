"""How fast captions come: each process writes its tally to a file, and any process sums the files up."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from tqdm import tqdm

from clips.common.escape import for_rich
from clips.common.files import read_json, write_json
from clips.common.live import in_words
from mllm.recaption.manifest import Folder
from mllm.recaption.shards import Shard

EVERY = 2.0
"""Least seconds between two writes of a file, and between two looks at all files."""
LONGEST_SILENCE = 60.0
"""Seconds between two lines without a terminal; a shard may take hours."""
LOOKING = 0.02
"""Greatest share of the time that goes into looking: thousands of processes have thousands of files."""


class Speed:
    """Writes `tally` (see `mllm.recaption.work.Worker`) to `path`, at most once in EVERY seconds."""

    def __init__(self, path: Path, tally: Counter[str]) -> None:
        self.path, self.tally = path, tally
        self._next = float("-inf")
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, *, now: bool = False) -> None:
        if now or time.monotonic() >= self._next:
            self._next = time.monotonic() + EVERY
            write_json(self.path, self.tally)


def measured(folder: Folder) -> Counter[str]:
    """The tallies of all processes of the folder, summed up."""
    tallies = (read_json(path) for path in folder.speed.glob("[!.]*.json"))
    numbers = ({name: n for name, n in tally.items() if isinstance(n, (int, float))} for tally in tallies)
    return sum(map(Counter, numbers), Counter())


class Board:
    """Shows the work of all processes of the folder: a bar on a terminal, else a line for each shard and minute."""

    def __init__(self, folder: Folder, shards: Sequence[Shard], console: Console) -> None:
        """`shards`: the unfinished ones."""
        self.folder, self.console = folder, console
        self._total = sum(map(len, shards))
        self._before, self._begin = measured(folder), time.monotonic()
        self._bar: tqdm | None = None
        self._next, self._told, self._told_at = float("-inf"), 0, time.monotonic()

    @contextmanager
    def showing(self) -> Iterator[None]:
        hidden = not self.console.is_terminal or self.console.quiet
        with tqdm(total=self._total, unit=" pairs", desc="captions", smoothing=0.1, disable=hidden) as bar:
            self._bar = None if hidden else bar
            yield
            self._next = float("-inf")  # the last look seldom showed the end
            self.show()

    def show(self) -> None:
        """Show the work since the start, looked up at most once in EVERY seconds."""
        begin = time.monotonic()
        if begin < self._next:
            return
        tally = measured(self.folder) - self._before
        self._next = time.monotonic() + max(EVERY, (time.monotonic() - begin) / LOOKING)
        if self._bar is not None:
            self._bar.set_postfix_str(self._text(tally), refresh=False)
            self._bar.update(min(tally["pairs"] + tally["found"], self._total) - self._bar.n)
        elif tally["shards"] > self._told or time.monotonic() - self._told_at >= LONGEST_SILENCE:
            self._told, self._told_at = tally["shards"], time.monotonic()
            done = f"{tally['shards']:,} shards, {tally['pairs']:,} of {self._total:,} captions"
            self.say(f"{done}, {self._text(tally)}")

    def say(self, text: str) -> None:
        self.console.print(for_rich(text), highlight=False, soft_wrap=True)

    def _text(self, tally: Counter[str]) -> str:
        seconds = max(time.monotonic() - self._begin, 1e-9)
        text = f"{tally['pairs'] / seconds:.1f} images/s, {tally['tokens'] / seconds:.0f} tokens/s"
        if self._bar is None and tally["pairs"]:
            left = (self._total - tally["pairs"] - tally["found"]) * seconds / tally["pairs"]
            text += f", {in_words(max(left, 0))} left"
        bad = {name.removeprefix("bad "): count for name, count in tally.most_common() if name.startswith("bad ")}
        return ", ".join([text, *(f"{reason} {count:,}" for reason, count in list(bad.items())[:4])])
