"""The simulation of the order: its sets of shards, and its figures against counting by hand."""

import itertools

import numpy as np
import pytest

from clips.common.errors import UserError
from clips.data.order import SampleOrder
from clips.studies.order import simulate, uneven_sizes


@pytest.mark.parametrize(("samples", "shards"), [(100, 100), (1000, 7), (10**6, 100)])
def test_uneven_sizes_sum_to_the_set(samples, shards):
    sizes = uneven_sizes(samples, shards, seed=1)
    assert sizes.sum() == samples
    assert len(sizes) == shards
    assert sizes.min() >= 1
    assert shards == samples or sizes.max() > 1.5 * sizes.min()


def test_figures_are_what_counting_gives():
    row = simulate(200_000, 40, batch=200, ranks=4, sample_bytes=10, seed=3)
    sizes = uneven_sizes(200_000, 40, seed=3)
    order, first = SampleOrder(sizes, 3), 160_000
    step = [order.index(0, first + i) for i in range(200)]
    shard = {i: int(np.searchsorted(np.cumsum(sizes), i, side="right")) for i in step}
    assert row.shards_per_step == len(set(shard.values()))
    assert row.shards_per_rank == len({shard[i] for i in step[:50]})
    step_of = {order.index(1, offset): offset // 200 for offset in range(200_000)}
    again = sum(step_of[a] == step_of[b] for a, b in itertools.combinations(step, 2))
    assert row.neighbours_again == pytest.approx(again / (200 * 199 / 2))
    assert row.neighbours_again_full == pytest.approx(199 / 199_999)


def test_a_set_below_one_group_is_as_mixed_as_a_full_shuffle():
    rows = [simulate(20_000, 10, batch=1000, ranks=1, sample_bytes=1, seed=seed) for seed in range(5)]
    assert np.mean([row.neighbours_again for row in rows]) == pytest.approx(rows[0].neighbours_again_full, rel=0.02)
    assert rows[0].ahead_gb == pytest.approx(20_000 / 1e9)


def test_what_cannot_be_simulated_is_refused():
    with pytest.raises(UserError, match="at least one sample a shard"):
        uneven_sizes(5, 6, seed=0)
    with pytest.raises(UserError, match="divide by 3 ranks"):
        simulate(1000, 2, batch=100, ranks=3, sample_bytes=1, seed=0)
