"""Check a data set before a training: run the training's own reader in a loop, and print the faults."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import DataLoader
from tqdm import tqdm

from clips.common.errors import CommandError
from clips.common.escape import one_line, printable
from clips.common.signals import start_worker

PRINTED = 100
"""Maximum number of faults of each kind that are printed."""


@dataclass
class Checked:
    """What the check found about a sample."""

    shown: str
    """The sample as it would be trained on, or what is wrong with it."""
    kind: str = ""
    """Kind of the fault; empty if the sample would be trained on."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Texts, and the hash of an image, whose repetitions are counted."""
    cut: Sequence[str] = ()
    """Names of the texts of which the model reads only the beginning."""


@dataclass
class Found:
    """Counts of what a check of a data set found."""

    checked: int
    faults: Counter[str] = field(default_factory=Counter)
    """Number of samples with each kind of fault."""
    cut: Counter[str] = field(default_factory=Counter)
    repeated: Counter[str] = field(default_factory=Counter)


@dataclass
class _Samples:
    read: Callable[[int], Checked]

    def __getitem__(self, index: int) -> Checked | CommandError:
        try:
            return self.read(index)
        except CommandError as error:  # raised in the main process, where it keeps its type and exit code
            return error


def drawn(samples: int, limit: int | None) -> Sequence[int]:
    """Return the indices of all `samples`, or a random choice of `limit` of them that is always the same."""
    every = range(samples)
    return every if limit is None or limit >= samples else sorted(random.Random(0).sample(every, limit))


def check(read: Callable[[int], Checked], indices: Sequence[int], jobs: int = 1) -> Found:
    """Read the samples `indices` in `jobs` processes, print their faults and how many are good, and return the counts.

    If no sample at all can be used, only the first fault of each kind is printed. Raises the CommandErrors that `read`
    raises, and one if a process died.
    """
    found, first = Found(len(indices)), ""
    faults: list[Checked] = []  # since the last good sample
    seen: set[tuple[str, int]] = set()
    workers: dict[str, Any] = {"num_workers": jobs, "multiprocessing_context": "fork"} if jobs > 1 else {}
    loader: Any = DataLoader(_Samples(read), None, sampler=indices, worker_init_fn=start_worker, **workers)  # type: ignore[arg-type]
    try:
        for sample in tqdm(loader, "samples", len(indices), unit="", leave=False, disable=None):
            if isinstance(sample, CommandError):
                raise sample
            if sample.kind:
                found.faults[sample.kind] += 1
                if found.faults[sample.kind] <= PRINTED:
                    faults.append(sample)
                continue
            _print(faults)
            faults.clear()
            first = first or sample.shown
            found.cut.update(sample.cut)
            texts = {(name, hash(text)) for name, text in sample.texts.items()}
            found.repeated.update(name for name, _ in texts & seen)
            seen |= texts
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise CommandError(f"a process died, probably for lack of memory: use fewer than --jobs {jobs}") from error
    _print(faults if first else {fault.kind: fault for fault in reversed(faults)}.values())
    for what, counts in (("", found.faults), ("cut: ", found.cut), ("repeated: ", found.repeated)):
        for name, count in counts.most_common():
            print(f"{count:>11,} × {what}{name}")
    trained = found.checked - found.faults.total()
    print(f"{trained:,} of {found.checked:,} samples checked would be trained on{'. The first is' * bool(first)}")
    if first:
        print(f"  {printable(first)}")
    return found


def _print(faults: Iterable[Checked]) -> None:
    for fault in faults:
        tqdm.write(one_line(fault.shown))
