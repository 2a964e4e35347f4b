"""Intervals, tests and sample sizes against simulations, published examples and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mllm.compare.statistics import Bootstrap, Estimate, holm, mcnemar

PICTURES, QUESTIONS, SEEDS = 120, 3, 3
CLUSTERS = [picture for picture in range(PICTURES) for _ in range(QUESTIONS)]


def answers(
    rng: np.random.Generator,
    difficulty: np.ndarray,
    *,
    skill: float = 0.0,
    seed_spread: float = 0.0,
    seeds: int = SEEDS,
):
    """Right or wrong [S, I] of one model: pictures and questions of different difficulty, runs of different luck."""
    run = rng.normal(0, seed_spread, (seeds, 1))
    return (rng.random((seeds, len(difficulty))) < np.clip(difficulty + skill + run, 0, 1)).astype(float)


def difficulties(rng: np.random.Generator, pictures: int = PICTURES) -> np.ndarray:
    picture = np.repeat(rng.normal(0, 1, pictures), QUESTIONS)
    return 0.2 + 0.6 * stats.norm.cdf(picture + rng.normal(0, 1, len(picture)))


def verdicts(tries: int, *, gap: float, seed_spread: float, seeds: int = SEEDS, pictures: int = PICTURES) -> list[str]:
    rng = np.random.default_rng(7)
    bootstrap = Bootstrap(np.repeat(range(pictures), QUESTIONS).tolist(), seeds=seeds, resamples=1000)
    found = []
    for _ in range(tries):
        difficulty = difficulties(rng, pictures)
        a = answers(rng, difficulty, skill=gap, seed_spread=seed_spread, seeds=seeds)
        b = answers(rng, difficulty, seed_spread=seed_spread, seeds=seeds)
        found.append(bootstrap.interval(a - b).verdict)
    return found


@pytest.mark.parametrize(
    ("seeds", "seed_spread", "low", "high"),
    [
        pytest.param(3, 0.0, 0.95, 1.0, id="seeds make no difference"),
        pytest.param(3, 0.025, 0.93, 0.97, id="seeds make some"),
        pytest.param(3, 0.06, 0.91, 0.96, id="seeds make most of it"),
        pytest.param(2, 0.0, 0.95, 1.0, id="two seeds make no difference"),
        pytest.param(2, 0.06, 0.87, 0.96, id="two seeds make most of it"),
    ],
)
def test_identical_models_tie_in_about_95_of_100_tries(seeds: int, seed_spread: float, low: float, high: float) -> None:
    found = verdicts(2000, gap=0.0, seed_spread=seed_spread, seeds=seeds)
    assert low <= found.count("tie") / len(found) <= high
    wins, losses = found.count("win"), found.count("loss")
    assert abs(wins - losses) <= 4 * np.sqrt(wins + losses + 1)


def test_a_known_gap_is_found_and_its_size_is_right() -> None:
    assert verdicts(200, gap=0.15, seed_spread=0.01).count("win") >= 190
    rng = np.random.default_rng(0)
    bootstrap = Bootstrap(CLUSTERS, seeds=SEEDS)
    difficulty = difficulties(rng)
    estimate = bootstrap.interval(answers(rng, difficulty, skill=0.12) - answers(rng, difficulty))
    assert estimate.low < 0.12 < estimate.high
    assert estimate.low < estimate.mean < estimate.high


def test_swapped_models_give_the_mirrored_interval() -> None:
    rng = np.random.default_rng(1)
    scores = rng.integers(-1, 2, (SEEDS, len(CLUSTERS))).astype(float)
    bootstrap = Bootstrap(CLUSTERS, seeds=SEEDS)
    there, back = bootstrap.interval(scores), bootstrap.interval(-scores)
    assert (there.mean, there.low, there.high) == pytest.approx((-back.mean, -back.high, -back.low))


def test_with_one_seed_and_single_items_it_is_the_ordinary_interval_of_a_mean() -> None:
    scores = np.random.default_rng(2).normal(0.3, 1.0, (1, 400))
    estimate = Bootstrap(range(400), seeds=1).interval(scores)
    expected = stats.t.interval(0.95, 399, scores.mean(), stats.sem(scores[0]))
    assert (estimate.low, estimate.high) == pytest.approx(expected, abs=0.006)


def test_repeating_questions_about_the_same_pictures_buys_nothing() -> None:
    """Ten copies of every question: items in name only. Without clusters the interval would shrink by √10."""
    scores = np.random.default_rng(3).normal(0, 1, (1, 100))
    once = Bootstrap(range(100), seeds=1).interval(scores)
    copies = Bootstrap([i for i in range(100) for _ in range(10)], seeds=1).interval(np.repeat(scores, 10, axis=1))
    assert copies.high - copies.low == pytest.approx(once.high - once.low, rel=0.05)


def test_seeds_that_disagree_widen_the_interval() -> None:
    agree = np.full((3, 400), 0.1)
    disagree = agree + np.array([[-0.1], [0.0], [0.1]])
    bootstrap = Bootstrap(range(400), seeds=3)
    assert bootstrap.interval(agree).verdict == "win"
    wide = bootstrap.interval(disagree)
    # Between-seed standard error 0.1 / √3, two degrees of freedom: at least the t interval's half of it.
    assert wide.verdict == "tie"
    assert wide.high - wide.mean > 0.5 * stats.t.ppf(0.975, 2) * 0.1 / np.sqrt(3)


def test_verdict_goes_by_the_interval_not_by_the_mean() -> None:
    assert Estimate(0.5, -0.01, 1.0).verdict == "tie"
    assert Estimate(0.01, 0.001, 0.02).verdict == "win"
    assert Estimate(-0.01, -0.02, -0.001).verdict == "loss"


# ------------------------------------------------------------------------------------------------------------- tests


def pairs(both: int, first: int, second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    a = [1] * both + [1] * first + [0] * second + [0] * neither
    b = [1] * both + [0] * first + [1] * second + [0] * neither
    return np.array([a]), np.array([b])


def test_mcnemar_against_a_published_example() -> None:
    """Fagerland, Lydersen & Laake 2013 (BMC Med Res Methodol 13:91), table 1: 21 children, 1 against 7 discordant.

    They give the exact conditional test as P = 0.070.
    """
    result = mcnemar(*pairs(1, 1, 7, 12))
    assert (result.wins, result.losses) == (1, 7)
    assert result.p == pytest.approx(0.0703125)


def test_mcnemar_counts_an_item_once_however_many_seeds_there_are() -> None:
    a, b = pairs(5, 4, 1, 5)
    once, thrice = mcnemar(a, b), mcnemar(np.repeat(a, 3, 0), np.repeat(b, 3, 0))
    assert once == thrice
    assert mcnemar(a, a).p == 1.0


def test_holm_against_a_published_example() -> None:
    """The worked example of Wikipedia's article on the Holm–Bonferroni method: the first and the last are rejected."""
    adjusted = holm([0.01, 0.04, 0.03, 0.005])
    assert adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert [p <= 0.05 for p in adjusted] == [True, False, False, True]
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_items_needed_is_the_closed_form_of_a_paired_comparison() -> None:
    """One seed, one question per picture: n = (z_0.975 + z_0.8)² (p10 + p01 − δ²) / δ²."""
    a, b = pairs(500, 120, 80, 300)
    needed = Bootstrap(range(1000), seeds=1).items_needed(a - b)
    delta = 0.04
    assert needed == pytest.approx((1.959964 + 0.841621) ** 2 * (0.2 - delta**2) / delta**2, rel=5e-3)


@pytest.mark.parametrize("seed_spread", [0.0, 0.01])
def test_with_as_many_items_as_needed_the_interval_finds_the_difference_in_four_of_five_tries(
    seed_spread: float,
) -> None:
    """Three seeds, three questions a picture: the number found on a large sample, then tries with so many."""
    rng, gap, pictures = np.random.default_rng(5), 0.06, 20_000
    difficulty, luck = difficulties(rng, pictures), np.array([[-1.0], [0.0], [1.0]]) * seed_spread
    better, other = (
        rng.random((SEEDS, len(difficulty))) < difficulty + skill + luck * sign for skill, sign in ((gap, 1), (0, -1))
    )
    bootstrap = Bootstrap(np.repeat(range(pictures), QUESTIONS).tolist(), seeds=SEEDS, resamples=1)
    needed = bootstrap.items_needed(better.astype(float) - other)
    found = verdicts(400, gap=gap, seed_spread=seed_spread, pictures=round(needed / QUESTIONS))
    assert 0.72 <= found.count("win") / len(found) <= 0.88


def test_no_number_of_items_mends_seeds_that_disagree() -> None:
    scores = np.random.default_rng(0).normal(0, 0.1, (3, 500)) + np.array([[-0.3], [0.05], [0.4]])
    assert Bootstrap(range(500), seeds=3).items_needed(scores) is None
