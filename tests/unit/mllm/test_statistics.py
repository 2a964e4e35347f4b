"""Intervals, tests and sample sizes against simulations, published examples and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mllm.compare.statistics import (
    Estimate,
    holm,
    independent_runs,
    interval,
    labels,
    mcnemar,
    over_groups,
    shared_runs,
)

PICTURES, QUESTIONS, SEEDS = 120, 3, 3
CLUSTERS = labels([picture for picture in range(PICTURES) for _ in range(QUESTIONS)])


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
    clusters = np.repeat(np.arange(pictures), QUESTIONS)
    found = []
    for _ in range(tries):
        difficulty = difficulties(rng, pictures)
        a = answers(rng, difficulty, skill=gap, seed_spread=seed_spread, seeds=seeds)
        b = answers(rng, difficulty, seed_spread=seed_spread, seeds=seeds)
        found.append(interval(a - b, clusters).verdict)
    return found


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("seed_spread", [0.0, 0.025, 0.06])
def test_identical_models_tie_in_about_95_of_100_tries(seeds: int, seed_spread: float) -> None:
    """Right and wrong answers; seeds that make no difference, some, and most of it. Two seeds: less."""
    found = verdicts(1500, gap=0.0, seed_spread=seed_spread, seeds=seeds)
    assert (0.02 if seeds == 2 else 0.03) <= 1 - found.count("tie") / len(found) <= 0.07
    wins, losses = found.count("win"), found.count("loss")
    assert abs(wins - losses) <= 4 * np.sqrt(wins + losses + 1)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("pictures_share", [0.0, 0.1, 0.3, 1.0, 10.0])
def test_models_that_differ_by_picture_alone_tie_as_often(seeds: int, pictures_share: float) -> None:
    """Known variances: of seeds, of pictures (`pictures_share` of it in the mean), of single answers."""
    rng, pictures = np.random.default_rng(11), 150
    clusters = np.arange(pictures)
    seed_deviation = 0.02
    picture_deviation = np.sqrt(pictures_share * seed_deviation**2 / seeds * pictures)
    tries, false = 3000, 0
    for _ in range(tries):
        difference = rng.normal(0, seed_deviation, (seeds, 1)) + rng.normal(0, picture_deviation, pictures)
        false += interval(difference + rng.normal(0, 0.1, (seeds, pictures)), clusters).verdict != "tie"
    assert 0.03 <= false / tries <= 0.07


def test_a_known_gap_is_found_and_its_size_is_right() -> None:
    assert verdicts(200, gap=0.15, seed_spread=0.01).count("win") >= 180
    rng = np.random.default_rng(0)
    difficulty = difficulties(rng)
    estimate = interval(answers(rng, difficulty, skill=0.12) - answers(rng, difficulty), CLUSTERS)
    assert estimate.low < 0.12 < estimate.high
    assert estimate.low < estimate.mean < estimate.high


def test_swapped_models_give_the_mirrored_interval() -> None:
    rng = np.random.default_rng(1)
    scores = rng.integers(-1, 2, (SEEDS, len(CLUSTERS))).astype(float)
    there, back = interval(scores, CLUSTERS), interval(-scores, CLUSTERS)
    assert (there.mean, there.low, there.high) == pytest.approx((-back.mean, -back.high, -back.low))


def test_with_one_seed_and_single_items_it_is_the_ordinary_interval_of_a_mean() -> None:
    scores = np.random.default_rng(2).normal(0.3, 1.0, (1, 400))
    estimate = interval(scores, np.arange(400))
    expected = stats.t.interval(0.95, 399, scores.mean(), stats.sem(scores[0]))
    assert (estimate.low, estimate.high) == pytest.approx(expected)


def test_where_pictures_have_nothing_in_common_it_is_the_t_interval_of_the_seeds() -> None:
    scores = np.array([[0.1], [0.2], [0.6]]) + np.zeros((3, 50))
    estimate = interval(scores, np.arange(50))
    expected = stats.t.interval(0.95, 2, 0.3, stats.sem([0.1, 0.2, 0.6]))
    assert (estimate.low, estimate.high) == pytest.approx(expected)


def test_repeating_questions_about_the_same_pictures_buys_nothing() -> None:
    """Ten copies of every question: items in name only. Without clusters the interval would shrink by √10."""
    scores = np.random.default_rng(3).normal(0, 1, (3, 100))
    once = interval(scores, np.arange(100))
    copies = interval(np.repeat(scores, 10, axis=1), np.repeat(np.arange(100), 10))
    assert copies.high - copies.low == pytest.approx(once.high - once.low)


def test_seeds_that_disagree_widen_the_interval() -> None:
    agree = np.full((3, 400), 0.1)
    disagree = agree + np.array([[-0.1], [0.0], [0.1]])
    assert interval(agree, np.arange(400)).verdict == "win"
    assert interval(disagree, np.arange(400)).verdict == "tie"


def test_runs_that_share_an_encoder_are_averaged_before_they_speak_of_other_runs() -> None:
    """Six runs on two encoders that differ much: as six independent ones they would seem to know the mean."""
    pretraining = np.array([0, 1, 0, 1, 0, 1])
    scores = np.where(pretraining == 0, 0.05, 0.25)[:, None] + np.random.default_rng(0).normal(0, 0.05, (6, 200))
    means = over_groups(scores, pretraining)
    assert np.allclose(means, [scores[::2].mean(0), scores[1::2].mean(0)])
    assert interval(scores, np.arange(200)).verdict == "win"
    assert interval(means, np.arange(200)).verdict == "tie"


def test_which_runs_are_independent_of_each_other() -> None:
    nested, own, one = np.array([0, 1, 2, 0]), np.arange(4), np.zeros(4, int)
    assert shared_runs([nested, own]).tolist() == nested.tolist()  # two runs on one of the encoders are not independent
    assert shared_runs([one, nested]).tolist() == nested.tolist()
    assert shared_runs([one, own]).tolist() == own.tolist()
    assert independent_runs(shared_runs([one, one])).tolist() == own.tolist()
    assert independent_runs(nested).tolist() == nested.tolist()


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
