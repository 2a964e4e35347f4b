"""The order of samples: a permutation per epoch, a pure function, small at a billion samples."""

from __future__ import annotations

import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clips.data.order import SampleOrder


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any),
    piece=st.integers(1, 40),
    group=st.integers(1, 100),
    seed=st.integers(0, 5),
)
def test_every_epoch_is_a_permutation(sizes: list[int], piece: int, group: int, seed: int) -> None:
    order = SampleOrder(sizes, seed, piece, group)
    for epoch in range(3):
        indices = [order.index(epoch, i) for i in range(len(order))]
        assert sorted(indices) == list(range(sum(sizes)))
        assert order.offsets(epoch, np.array(indices)).tolist() == list(range(sum(sizes)))


def test_epochs_and_seeds_differ_and_repeat() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        order = SampleOrder([50, 50], seed)
        return [order.index(number, i) for i in range(100)]

    assert epoch(0, 0) == epoch(0, 0)
    assert len({tuple(epoch(seed, number)) for seed in range(3) for number in range(3)}) == 9


def test_positions_do_not_depend_on_what_was_asked_before() -> None:
    order, asked = SampleOrder([7] * 40, 1, 7, 30), np.random.default_rng(0).integers(0, 3 * 280, 500)
    shuffled = [order.index(*order.locate(int(position))) for position in asked]
    fresh = [SampleOrder([7] * 40, 1, 7, 30).index(*divmod(int(position), 280)) for position in asked]
    assert shuffled == fresh


def test_a_small_set_is_shuffled_whole() -> None:
    """Uniform: over many seeds, the mean index at each offset is the middle one."""
    orders = [SampleOrder([10] * 4, seed) for seed in range(200)]
    mean = np.mean([[order.index(0, i) for i in range(40)] for order in orders], axis=0)
    assert abs(mean - 19.5).max() < 5 * 11.5 / np.sqrt(200)


def test_a_billion_samples_stay_small_and_local() -> None:
    sizes = np.full(100_000, 10_000)
    tracemalloc.start()
    order = SampleOrder(sizes, 0)
    indices = [order.index(0, 123_456_789 + i) for i in range(20_000)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(order) == 10**9
    assert peak < 64 * 2**20
    assert len(set(indices)) == len(indices)
    assert len({i // 10_000 for i in indices}) <= 32, "reading must stay within a few shards at a time"


@pytest.mark.parametrize("count", [2_000_000, 100_001])
def test_one_huge_shard_is_cut_into_pieces(count: int) -> None:
    order = SampleOrder([count], 0)
    sample = {order.index(1, i) for i in range(0, count, 997)}
    assert len(sample) == len(range(0, count, 997))
    assert max(sample) < count


def test_it_travels_to_a_worker() -> None:
    order = SampleOrder([10, 20], 3)
    copy = pickle.loads(pickle.dumps(order))
    assert [copy.index(2, i) for i in range(30)] == [order.index(2, i) for i in range(30)]
