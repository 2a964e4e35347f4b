"""Sources that are made of others: several that are mixed, and a part of one."""

import itertools
from collections.abc import Sequence

import numpy as np

from clips.data.order import MixedOrder, Order, SampleOrder
from clips.data.sample import RawSample, Texts
from clips.data.sources import Source, place_of


class MixedSource(Source):
    """Several sources one after the other; training sees each as often as its share says."""

    def __init__(self, sources: Sequence[Source], shares: Sequence[float]) -> None:
        """Join the sources. Raises ValueError for shares that `MixedOrder` refuses."""
        self.sources = self._parts = list(sources)
        self.shares = list(shares)
        self.files = [file for source in sources for file in source.files]
        self.problems = [problem for source in sources for problem in source.problems]
        self.unreadable = sum(source.unreadable for source in sources)
        self.rows = sum(source.rows for source in sources)
        self._set_sizes([size for source in sources for size in source.shard_sizes])
        self._firsts = [0, *itertools.accumulate(map(len, sources))]
        self.order(0)

    def order(self, seed: int) -> Order:
        """Return the order that draws from the sources by their shares."""
        return MixedOrder([SampleOrder(source.shard_sizes, seed) for source in self.sources], self.shares, seed)

    def _part(self, index: int) -> tuple[Source, int]:
        part, index = place_of(self._firsts, index)
        return self.sources[part], index

    def read(self, index: int) -> RawSample:
        """Read a sample of the source that `index` falls into. Raises like `Source.read`."""
        source, index = self._part(index)
        return source.read(index)

    def texts(self, index: int) -> Texts:
        """Return the captions from the source that `index` falls into."""
        source, index = self._part(index)
        return source.texts(index)


class PartSource(Source):
    """The samples `indices` (ascending) of a source."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source, self._parts = source, [source]
        self.files = source.files
        self.left_out = source.left_out
        self.unreadable = source.unreadable
        self.rows = source.rows
        self.problems = source.problems
        self._indices = indices
        ends = np.cumsum(source.shard_sizes)
        self._set_sizes(np.diff(np.searchsorted(indices, ends), prepend=0).tolist())

    def read(self, index: int) -> RawSample:
        """Read sample `index` of the part. Raises like `Source.read`."""
        return self.source.read(int(self._indices[index]))

    def texts(self, index: int) -> Texts:
        """Return the captions of sample `index` of the part."""
        return self.source.texts(int(self._indices[index]))

    def missing(self, index: int) -> str | None:
        """Return why the image of sample `index` of the part is missing, or None."""
        return self.source.missing(int(self._indices[index]))
