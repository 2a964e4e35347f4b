"""The order of samples: a permutation per epoch, a pure function, small at a billion samples."""

import pickle
import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clips.data.order import BLOCK, MixedOrder, SampleOrder


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


def test_epochs_and_seeds_differ_and_repeat() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        order = SampleOrder([50, 50], seed)
        return [order.index(number, i) for i in range(100)]

    assert epoch(0, 0) == epoch(0, 0)
    assert len({tuple(epoch(seed, number)) for seed in range(3) for number in range(3)}) == 9


def test_a_small_set_is_shuffled_whole() -> None:
    """Uniform: over many seeds, the mean index at each offset is the middle one."""
    orders = [SampleOrder([10] * 4, seed) for seed in range(50)]
    mean = np.mean([[order.index(0, i) for i in range(40)] for order in orders], axis=0)
    assert abs(mean - 19.5).max() < 5 * 11.5 / np.sqrt(50)


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


SHARES = st.lists(st.floats(0.01, 100), min_size=1, max_size=4).filter(lambda s: min(s) > 0.001 * sum(s))


@settings(max_examples=40, deadline=None)
@given(shares=SHARES, seed=st.integers(0, 3), data=st.data())
def test_a_mix_has_its_shares_and_walks_each_set_in_its_own_order(shares, seed, data) -> None:
    sets = [[data.draw(st.integers(1, 900)) for _ in range(3)] for _ in shares]
    parts = [SampleOrder(sizes, seed, 50, 200) for sizes in sets]
    mix = MixedOrder(parts, shares, seed)
    first = data.draw(st.integers(0, 10**12)) * BLOCK  # far into a run as well as at its start
    drawn = [mix.draw(first + i) for i in range(2 * BLOCK)]
    for part in range(len(shares)):
        turns = [turn for label, turn in drawn if label == part]
        assert turns == list(range(turns[0], turns[0] + len(turns))), "no sample of a set is left out or seen twice"
        assert abs(len(turns) - 2 * BLOCK * shares[part] / sum(shares)) <= 2
        assert abs(turns[0] - first * shares[part] / sum(shares)) <= 1 + first * 1e-15
    part, turn = drawn[7]
    assert mix.sample(first + 7) == sum(map(sum, sets[:part])) + parts[part].sample(turn)
    assert mix.epoch(first + 7) == turn // sum(sets[part])
    substitute = mix.substitute(first + 7, random.Random(0)) - sum(map(sum, sets[:part]))
    assert 0 <= substitute < sum(sets[part]), "a substitute is of the same set"


def test_a_mix_of_one_set_is_that_set() -> None:
    order = SampleOrder([30, 40], 5)
    mix = pickle.loads(pickle.dumps(MixedOrder([order], [3.0], 5)))
    assert [mix.sample(i) for i in range(BLOCK + 100)] == [order.sample(i) for i in range(BLOCK + 100)]


def test_sets_are_mixed_everywhere() -> None:
    mix = MixedOrder([SampleOrder([10**6], 0), SampleOrder([10**6], 0)], [1, 3], 0)
    labels = np.array([mix.draw(i)[0] for i in range(4 * BLOCK)])
    assert labels.reshape(-1, 128).mean(axis=1).min() > 0.6
    assert labels.reshape(-1, 128).mean(axis=1).max() < 0.9
    assert (labels[:BLOCK] != labels[BLOCK : 2 * BLOCK]).any()


@pytest.mark.parametrize("shares", [[1, 0], [1, -1], [1, float("nan")], [1, float("inf")], [1], [1, 1e-4]])
def test_shares_that_cannot_be_kept_are_refused(shares: list[float]) -> None:
    with pytest.raises(ValueError, match="none below"):
        MixedOrder([SampleOrder([5], 0), SampleOrder([5], 0)], shares, 0)
