"""The order of samples at full size: how well it mixes, and what it costs in memory, time and reading.

Nothing is read: the order is a function of the shards' sizes, so 10¹⁰ samples are simulated as they would be trained
on. A full shuffle, which would have to open a shard for nearly every sample, is what the mixing is held against.
"""

from __future__ import annotations

import sys
import time
import tracemalloc
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from clips.common.errors import UserError
from clips.common.files import write_json
from clips.data.order import SampleOrder

SETS = (
    (10**6, 10**2), (10**7, 10**3), (10**8, 10**4), (10**9, 10**2), (10**9, 10**5), (10**10, 10**3), (10**10, 10**6),
)  # fmt: skip
"""(samples, shards): usual shards of 10,000 samples, and sets of few huge ones."""
SPREAD = 0.5
"""Standard deviation of the logarithm of the shards' sizes: most are between 0.4 and 2.7 times the median."""
AT = 0.8
"""Where in an epoch the order is asked, as a share of it."""


@dataclass(frozen=True, kw_only=True)
class Row:
    samples: int
    shards: int
    open_s: float
    """Seconds until the order exists."""
    seek_ms: float
    """Milliseconds from there to the first sample at 0.8 of an epoch: what a resume waits for."""
    next_us: float
    """Microseconds for each sample after it."""
    memory_mb: float
    """Most that was held meanwhile, in 10⁶ bytes, the shards' sizes included."""
    shards_per_step: int
    """Shards that the samples of one step come from."""
    shards_per_rank: int
    """The same for one rank's share of the step."""
    ahead_gb: float
    """10⁹ bytes of the pieces that are read from at a time: what a cache by shard has to hold, whatever the ranks."""
    neighbours_again: float
    """Share of the pairs of one step that are in one step again in the next epoch."""
    neighbours_again_full: float
    """The same in a full shuffle."""


def uneven_sizes(samples: int, shards: int, seed: int) -> np.ndarray:
    """Log-normal sizes of `shards` shards that sum to `samples`, none empty: int64 [shards]."""
    if not 0 < shards <= samples:
        raise UserError(f"{samples:,} samples cannot be in {shards:,} shards: give at least one sample a shard")
    weights = np.random.default_rng(seed).lognormal(0.0, SPREAD, shards)
    edges = np.round(np.cumsum(weights) / weights.sum() * (samples - shards)).astype(np.int64)
    return np.diff(edges, prepend=0) + 1


def simulate(samples: int, shards: int, *, batch: int, ranks: int, sample_bytes: int, seed: int) -> Row:
    """One row of the table, for steps of `batch` samples over `ranks` ranks and samples of `sample_bytes` bytes."""
    sizes = uneven_sizes(samples, shards, seed)
    ends = np.cumsum(sizes)
    steps = samples // batch
    if steps < 2 or batch % ranks:
        raise UserError(f"a step of {batch:,} must divide by {ranks} ranks, and {samples:,} samples must hold two")
    first = int(AT * steps) * batch
    tracemalloc.start()
    begin = time.perf_counter()
    order = SampleOrder(sizes, seed)
    opened = time.perf_counter()
    order.index(0, first)
    found = time.perf_counter()
    indices = np.array([order.index(0, first + i) for i in range(batch)])
    read = time.perf_counter()
    memory = tracemalloc.get_traced_memory()[1] + sizes.nbytes
    tracemalloc.stop()
    shard_of = np.searchsorted(ends, indices, side="right")
    # Pairs that meet again: a step of the next epoch is met by `count` of these samples, which are count² pairs.
    counts = np.unique(order.offsets(1, indices) // batch, return_counts=True)[1].astype(np.float64)
    return Row(
        samples=samples,
        shards=shards,
        open_s=opened - begin,
        seek_ms=1e3 * (found - opened),
        next_us=1e6 * (read - found) / batch,
        memory_mb=memory / 1e6,
        shards_per_step=len(np.unique(shard_of)),
        shards_per_rank=len(np.unique(shard_of[: batch // ranks])),
        ahead_gb=order.held(0, first) * sample_bytes / 1e9,
        neighbours_again=float((counts * (counts - 1)).sum() / (batch * (batch - 1))),
        neighbours_again_full=(batch - 1) / (samples - 1),
    )


def run(*, batch: int, ranks: int, sample_bytes: int, seed: int, out: str | None) -> list[Row]:
    """Simulate every set of SETS, print the table, and write it to `out` as JSON."""
    console = Console(emoji=False, width=None if sys.stdout.isatty() else 120)  # in a file, as wide as it needs
    rows = [
        simulate(samples, shards, batch=batch, ranks=ranks, sample_bytes=sample_bytes, seed=seed)
        for samples, shards in track(SETS, "simulating", console=Console(emoji=False, stderr=True), transient=True)
    ]
    table = Table(
        title=f"steps of {batch:,} samples over {ranks} ranks, {sample_bytes:,} bytes a sample",
        caption="open, seek, µs/sample, MB: time and memory of the order itself · shards/step, shards/rank: from how "
        "many shards a step comes · from GB: the pieces of shards that are read from at a time · again %: pairs of "
        "one step that are in one step again in the next epoch, and the same in a full shuffle",
    )
    names = ("samples", "shards", "open s", "seek ms", "µs/sample", "MB", "shards/step", "shards/rank", "from GB")
    for name in (*names, "again %", "shuffled %"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"10^{round(np.log10(row.samples))}",
            f"10^{round(np.log10(row.shards))}",
            f"{row.open_s:.2f}",
            f"{row.seek_ms:.0f}",
            f"{row.next_us:.1f}",
            f"{row.memory_mb:.0f}",
            f"{row.shards_per_step:,}",
            f"{row.shards_per_rank:,}",
            f"{row.ahead_gb:.1f}",
            f"{100 * row.neighbours_again:.3g}",
            f"{100 * row.neighbours_again_full:.3g}",
        )
    console.print(table)
    if out is not None:
        write_json(Path(out), [asdict(row) for row in rows])
    return rows
