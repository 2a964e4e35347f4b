"""Intervals, components of variance and needed numbers against simulations, definitions and closed forms."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats

from clips.lab.stats import (
    ANSWERS,
    TOGETHER,
    Spread,
    components,
    difference,
    distinct_levels,
    half_of_interval,
    independent_runs,
    interval,
    least_variance,
    over_groups,
    over_runs,
    shared_runs,
    spread,
    turned,
    verdict,
    welch,
)

PICTURES, QUESTIONS, SEEDS = 120, 3, 3


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


@pytest.mark.parametrize(("seeds", "seed_spread"), [(2, 0.025), (3, 0.0), (3, 0.06), (5, 0.025)])
def test_identical_models_tie_in_about_95_of_100_tries(seeds: int, seed_spread: float) -> None:
    """Right and wrong answers; seeds that make no difference, some, and most of it."""
    found = verdicts(1500, gap=0.0, seed_spread=seed_spread, seeds=seeds)
    assert (0.025 if seeds == 2 else 0.03) <= 1 - found.count("tie") / len(found) <= 0.07
    wins, losses = found.count("win"), found.count("loss")
    assert abs(wins - losses) <= 4 * np.sqrt(wins + losses + 1)


JUMP, STEADY = 0.137, 0.014
"""Standard deviations over seeds of *where* in docs/results.md: of CLIPS, which learns in a jump, and of `random`."""


def right_answers_of_equal_encoders(
    rng: np.random.Generator, jumped: float, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Shares of right answers of runs of two encoders with equal means.

    One learns in a jump, which the share `jumped` of its runs has made. The other has no jump.
    """
    height = np.sqrt((JUMP**2 - STEADY**2) / jumped / (1 - jumped))
    jumping = height * ((rng.random(shape) < jumped) - jumped) + STEADY * rng.standard_normal(shape)
    return np.clip(0.4 + jumping, 0, 1), np.clip(0.4 + STEADY * rng.standard_normal(shape), 0, 1)


@pytest.mark.filterwarnings("ignore:Precision loss")  # of runs that happen to be alike
@pytest.mark.parametrize(("questions", "crossed", "welchs"), [(160, (7, 18), (6, 21)), (640, (6, 37), (6, 43))])
def test_equal_encoders_are_called_different_if_only_one_learns_in_a_jump(
    questions: int, crossed: tuple[int, int], welchs: tuple[int, int]
) -> None:
    """docs/comparison.md states these ranges, in percent of the comparisons with three to five seeds."""
    rng, rates = np.random.default_rng(0), []
    for seeds, jumped in product((3, 4, 5), (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9)):
        runs = right_answers_of_equal_encoders(rng, jumped, (4000, seeds))
        a, b = (rng.binomial(questions, shares) / questions for shares in runs)
        variance = (a - b).var(1, ddof=1) / seeds
        luck = (a * (1 - a) + b * (1 - b)).mean(1) / (questions - 1) / seeds
        halves = half_of_interval(variance, 0.0, least_variance(luck, seeds), seeds, questions)
        by_welch = stats.ttest_ind(a, b, axis=1, equal_var=False).pvalue < 0.05
        assert [welch(*pair).verdict != "tie" for pair in zip(a[:50].tolist(), b[:50].tolist(), strict=True)] == (
            by_welch[:50].tolist()
        )
        rates.append((np.mean(abs((a - b).mean(1)) > halves), by_welch.mean()))
    by_crossed, by_welch = 100 * np.array(rates).T
    assert (by_crossed.min(), by_crossed.max()) == pytest.approx(crossed, abs=1)
    assert (by_welch.min(), by_welch.max()) == pytest.approx(welchs, abs=1)
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    assert f"| {questions} | {crossed[0]} to {crossed[1]} | {welchs[0]} to {welchs[1]} |" in page


def test_the_crossed_interval_of_single_answers_errs_as_often() -> None:
    """The same with every answer drawn, through `interval` itself."""
    rng = np.random.default_rng(1)
    a, b = right_answers_of_equal_encoders(rng, 0.2, (1000, 5, 1))
    scores = (rng.random((1000, 5, 160)) < a).astype(float) - (rng.random((1000, 5, 160)) < b)
    verdicts = [interval(of_comparison, np.arange(160)).verdict for of_comparison in scores]
    assert 1 - verdicts.count("tie") / len(verdicts) == pytest.approx(0.18, abs=0.035)


def sized(seeds: int, pictures: int, runs: float, shared: float, luck: float, within: int = 1) -> Spread:
    """A comparison with these variances of the mean, one question per picture, `within` LLaVA runs of each seed."""
    levels = ("pretraining seed", "LLaVA seed")[: 1 + (within > 1)], ("picture",)
    variances = np.zeros((1 + len(levels[0]), 2))
    variances[0, 1], variances[1, 0], variances[-1, 1] = shared * pictures, runs * seeds, luck * seeds * pictures
    return Spread(*levels, variances, (1.0, float(seeds), float(seeds * within))[: 1 + len(levels[0])], (1.0, pictures))


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("pictures", [40, 347])
def test_false_findings_stay_at_5_percent_whatever_makes_the_variance(seeds: int, pictures: int) -> None:
    """100 mixtures of what seeds, pictures and single answers add."""
    parts = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
    mixtures = [(r, p, luck) for r in parts for p in parts for luck in (0.0, 1.0) if r + p + luck > 0]
    rates = [sized(seeds, pictures, *mixture).power(0.0, 20_000) for mixture in mixtures]
    assert min(rates) >= 0.035
    assert max(rates) <= 0.065


def half(scores: np.ndarray) -> float:
    estimate = interval(scores, np.arange(scores.shape[1]))
    return estimate.high - estimate.mean


def test_seeds_that_agree_by_chance_leave_an_interval_with_width() -> None:
    """Three seeds, each two questions of 80 ahead: other questions, or the same. It was [0.025, 0.025] and ± 4.4."""
    others, same, one_shared = (np.zeros((3, 80)) for _ in range(3))
    for seed in range(3):
        others[seed, [2 * seed, 2 * seed + 1]] = 1
        one_shared[seed, [0, 1 + seed]] = 1
    same[:, :2] = 1
    luck_of_one_run = np.sqrt(0.025 * 0.975 / 80)
    for scores in (others, same, one_shared):
        assert scores.mean(1).tolist() == [0.025] * 3
        assert luck_of_one_run / np.sqrt(3) * 0.9 <= half(scores) <= 2.1 * luck_of_one_run
    assert half(others) < half(one_shared) < half(same)


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_answers_that_are_all_alike_say_no_more_than_one_answer_of_each_run_could_change(seeds: int) -> None:
    """Two models that always say "One": no difference was seen, and a small one may be there."""
    estimate = interval(np.zeros((seeds, 80)), np.arange(80))
    assert estimate.ci95 == pytest.approx([-1 / 80 / seeds**0.5, 1 / 80 / seeds**0.5])
    assert estimate.verdict == "tie"


@pytest.mark.parametrize(("right", "unequal"), [(0.02, 0.0), (0.1, 0.1), (0.5, 0.3), (0.95, 0.03)])
def test_intervals_of_few_rare_answers_are_neither_empty_nor_endless(right: float, unequal: float) -> None:
    """80 questions of a kind, three seeds, right and wrong: at worst it was ± 6e12 points."""
    rng, halves, false = np.random.default_rng(5), [], 0
    for _ in range(3000):
        difficulty = np.clip(right + unequal * rng.standard_normal(80), 0, 1)
        scores = answers(rng, difficulty) - answers(rng, difficulty)
        halves.append(half(scores))
        false += abs(scores.mean()) > halves[-1] + 1e-12
    spread_of_a_run = np.sqrt(2 * right * (1 - right) / 80)
    assert min(halves) >= 1 / 80 / 3**0.5
    assert max(halves) < 12 * spread_of_a_run
    assert 0.02 < false / len(halves) <= 0.065


def test_power_is_the_share_of_simulated_comparisons_that_find_the_difference() -> None:
    rng, seeds, pictures = np.random.default_rng(6), 3, 80
    size = sized(seeds, pictures, runs=1e-4, shared=0.5e-4, luck=1e-4)
    deviations = np.sqrt([[0, size.variances[0, 1]], [size.variances[1, 0], size.variances[1, 1]]])
    runs, items = [np.arange(seeds)], [np.arange(pictures)]
    found = [interval(0.05 + drawn(rng, runs, items, deviations), items[0]).verdict for _ in range(2000)]
    assert found.count("win") / len(found) == pytest.approx(size.power(0.05), abs=0.04)
    crossed = sized(seeds, pictures, runs=1e-4, shared=0.5e-4, luck=1e-4, within=3)
    assert size.power(0.0) < size.power(0.02) < size.power(0.05) < crossed.power(0.05)
    assert crossed.power(crossed.detectable()) == pytest.approx(0.78, abs=0.03)


@pytest.mark.parametrize(
    ("scores", "means"),
    [
        (np.random.default_rng(2).normal(0.3, 1.0, (1, 400)), None),  # one seed: the interval of a mean over items
        (np.array([[0.1], [0.2], [0.6]]) + np.zeros((3, 50)), [0.1, 0.2, 0.6]),  # equal pictures: of the seeds
    ],
)
def test_of_one_source_alone_it_is_student_s_interval(scores: np.ndarray, means: list[float] | None) -> None:
    values = np.array(means) if means else scores[0]
    estimate, back = (interval(sign * scores, np.arange(scores.shape[1])) for sign in (1, -1))
    expected = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
    assert (estimate.low, estimate.high) == pytest.approx(expected)
    assert (-back.high, -back.low) == pytest.approx(expected)


def test_repeating_questions_about_the_same_pictures_buys_nothing() -> None:
    """Ten copies of every question: items in name only. Without clusters the interval would shrink by √10."""
    scores = np.random.default_rng(3).normal(0, 1, (3, 100))
    once = interval(scores, np.arange(100))
    copies = interval(np.repeat(scores, 10, axis=1), np.repeat(np.arange(100), 10))
    assert copies.high - copies.low == pytest.approx(once.high - once.low)


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


def test_the_verdict_goes_by_the_interval() -> None:
    assert [verdict(ends) for ends in ([-0.01, 1.0], [0.001, 0.02], [-0.02, -0.001], [0.0, 1.0], None)] == [
        "tie", "win", "loss", "tie", "tie"
    ]  # fmt: skip
    assert verdict([float("nan")] * 2) == "tie"
    assert [turned(said) for said in ("win", "tie", "loss")] == ["loss", "tie", "win"]


def test_groups_of_runs_have_welch_s_interval_and_paired_runs_student_s() -> None:
    """Against scipy's formulas; groups without any spread have no interval."""
    a, b = [70.0, 74.0, 71.0], [30.0, 31.0, 35.0]
    found = welch(a, b)
    variances = np.var(a, ddof=1) / 3, np.var(b, ddof=1) / 3
    reach = stats.t.ppf(0.975, sum(variances) ** 2 / sum(v**2 / 2 for v in variances)) * sum(variances) ** 0.5
    assert found.ci95 == pytest.approx([found.mean - reach, found.mean + reach])
    row = difference([{"x": value} for value in a], [{"x": value} for value in b], "x")
    assert row == {"mean": found.mean, "ci95": found.ci95}
    assert welch([1.0, 1.0], [0.0, 0.0]).ci95 is None
    assert welch([1.0, 1.0], [0.0, 0.5]).ci95 is not None
    values = np.array([0.1, 0.09, 0.08])
    assert over_runs(values).ci95 == pytest.approx(stats.t.interval(0.95, 2, values.mean(), stats.sem(values)))
    assert over_runs(values[:1]).ci95 is None


# ------------------------------------------------------------------------------------------- components of variance
def runs_and_items(pretraining: int, llava: int, pictures: int, questions: int):
    """Groups of every level, balanced: ([pretraining, run], [picture, question])."""
    runs, items = np.arange(pretraining * llava), np.arange(pictures * questions)
    return [runs % pretraining, runs], [items // questions, items]


def drawn(rng: np.random.Generator, runs, items, deviations: np.ndarray) -> np.ndarray:
    """[R, I] with effects of known standard deviations [1 + levels of runs, 1 + levels of items]."""
    total = np.zeros((len(runs[-1]), len(items[-1])))
    for (a, row), (b, column) in product(
        enumerate([np.zeros_like(runs[0]), *runs]), enumerate([np.zeros_like(items[0]), *items])
    ):
        total += deviations[a, b] * rng.standard_normal((row.max() + 1, column.max() + 1))[np.ix_(row, column)]
    return total


def slow_components(scores: np.ndarray, runs, items) -> np.ndarray:
    """Every pair of scores by itself, sorted by how many levels of runs and of items it shares."""
    shape = len(runs) + 1, len(items) + 1
    squares, counts = np.zeros(shape), np.zeros(shape)
    places = list(np.ndindex(scores.shape))
    for (r, i), (s, j) in product(places, places):
        shared = sum(level[r] == level[s] for level in runs), sum(level[i] == level[j] for level in items)
        squares[shared] += (scores[r, i] - scores[s, j]) ** 2 / 2
        counts[shared] += 1
    covariance = squares[0, 0] / counts[0, 0] - squares / counts
    found = np.zeros(shape)
    for a, b in np.ndindex(shape):
        found[a, b] = covariance[a, b] - found[: a + 1, : b + 1].sum()
    return found


@pytest.mark.parametrize("is_balanced", [True, False])
def test_components_are_those_of_all_pairs_of_scores(is_balanced: bool) -> None:
    rng = np.random.default_rng(0)
    runs, items = runs_and_items(3, 2, 5, 2)
    if not is_balanced:
        runs = [np.array([0, 1, 2, 0]), np.arange(4)]
        items = [np.array([0, 0, 0, 1, 2, 2, 3]), np.arange(7)]
    scores = rng.integers(0, 2, (len(runs[0]), len(items[0]))).astype(float)
    assert np.allclose(components(scores, runs, items), slow_components(scores, runs, items))


def test_of_equal_numbers_they_are_those_of_the_analysis_of_variance() -> None:
    """Two crossed factors, one score each: mean squares and their expectations (any textbook)."""
    scores = np.random.default_rng(1).normal(0, 1, (4, 30)) + np.arange(4)[:, None]
    seeds, pictures = scores.shape
    centred = scores - scores.mean()
    ms_seeds = pictures * (centred.mean(1) ** 2).sum() / (seeds - 1)
    ms_pictures = seeds * (centred.mean(0) ** 2).sum() / (pictures - 1)
    rest = centred - centred.mean(0) - centred.mean(1)[:, None]
    ms_rest = (rest**2).sum() / (seeds - 1) / (pictures - 1)
    expected = [[0, (ms_pictures - ms_rest) / seeds], [(ms_seeds - ms_rest) / pictures, ms_rest]]
    assert np.allclose(components(scores, [np.arange(seeds)], [np.arange(pictures)]), expected)


def test_known_effects_are_found_without_bias() -> None:
    deviations = np.array([[0, 0.3, 0.4], [0.2, 0.1, 0.1], [0.1, 0.1, 0.5]])
    rng = np.random.default_rng(2)
    runs, items = [np.array([0, 1, 2, 3, 0, 1]), np.arange(6)], [np.arange(80) // 2, np.arange(80)]
    found = np.mean([components(drawn(rng, runs, items, deviations), runs, items) for _ in range(600)], axis=0)
    assert found == pytest.approx(deviations**2, abs=0.006)


def test_levels_that_cannot_be_told_apart_become_one() -> None:
    runs, pictures = np.arange(3), np.array([0, 0, 1, 1])
    named = distinct_levels([("pretraining seed", runs), ("LLaVA seed", runs)])
    assert [name for name, _ in named] == ["pretraining seed and LLaVA seed"]
    assert [name for name, _ in distinct_levels([("pretraining seed", 0 * runs), ("LLaVA seed", runs)])] == [
        "LLaVA seed"
    ]
    one = spread(np.eye(4)[:1], [("pretraining seed", np.zeros(1, int)), ("LLaVA seed", np.zeros(1, int))],
                 [("picture", pictures), ("question", np.arange(4))])  # fmt: skip
    assert one.runs == ()
    assert set(one.shares()) == {"picture", "question"}


def split_of(scores: np.ndarray, runs, items):
    return spread(scores, [("pretraining seed", runs[0]), ("LLaVA seed", runs[1])],
                  [("picture", items[0]), ("question", items[1])])  # fmt: skip


def test_shares_add_up_to_the_square_of_the_interval_s_standard_error() -> None:
    runs, items = runs_and_items(5, 2, 100, 2)
    scores = drawn(np.random.default_rng(3), runs, items, np.array([[0, 0.3, 0.4], [0.1, 0.2, 0.2], [0.1, 0.2, 0.5]]))
    found = split_of(scores, runs, items)
    assert set(found.shares()) == {"pretraining seed", "LLaVA seed", "picture", "question", ANSWERS}
    assert (found.variances > 0)[1:].all()
    rows = np.stack([scores[runs[0] == seed].mean(0) for seed in range(5)])
    estimate = interval(rows, items[0])
    # Power 0.8 needs t and its quantile of 0.8 on top of a standard error that both have in common.
    assert found.detectable() > estimate.high - estimate.mean
    assert sum(found.shares().values()) == pytest.approx(_variance(rows, items[0]), rel=0.02)


def _variance(rows: np.ndarray, clusters: np.ndarray) -> float:
    """Of the mean, for equal clusters: between rows, and between pictures without what single answers add."""
    pictures = np.stack([np.bincount(clusters, row) / np.bincount(clusters) for row in rows])
    rest = pictures - pictures.mean(0) - pictures.mean(1)[:, None] + pictures.mean()
    count = pictures.shape[1]
    luck = (rest**2).sum() / (len(rows) - 1) / (count - 1) / len(rows) / count
    return pictures.mean(1).var(ddof=1) / len(rows) + pictures.mean(0).var(ddof=1) / count - luck


def test_items_needed_is_the_closed_form_of_a_paired_comparison() -> None:
    """One run, one question per picture: n = (z_0.975 + z_0.8)² (p10 + p01 − δ²) / δ²."""
    difference = np.array([[1.0] * 120 + [-1.0] * 80 + [0.0] * 800])
    question = np.arange(1000)
    found = spread(difference, [("LLaVA seed", np.zeros(1, int))], [("picture", question), ("question", question)])
    delta = 0.04
    expected = (1.959964 + 0.841621) ** 2 * (0.2 - delta**2) / delta**2
    assert found.items_needed(delta) == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("level", ["pretraining seed", "picture", "both"])
def test_with_as_many_as_needed_a_difference_is_found_in_four_of_five_tries(level: str) -> None:
    deviations = np.array([[0, 0.25, 0.3], [0.02, 0.05, 0.05], [0.02, 0.05, 0.4]])
    rng, gap = np.random.default_rng(4), 0.06
    levels = ("pretraining seed", "LLaVA seed"), ("picture", "question")
    found = Spread(*levels, deviations**2, (1.0, 4.0, 8.0), (1.0, 250.0, 500.0))
    needed = found.needed(gap)
    seeds = needed["pretraining seed" + TOGETHER * (level == "both")] if level != "picture" else 4
    pictures = needed["picture" + TOGETHER * (level == "both")] if level != "pretraining seed" else 250
    assert seeds is not None
    assert pictures is not None
    runs, items = runs_and_items(seeds, 2, pictures, 2)
    wins, tries = 0, 300
    for _ in range(tries):
        scores = gap + drawn(rng, runs, items, deviations)
        rows = np.stack([scores[runs[0] == seed].mean(0) for seed in range(seeds)])
        wins += interval(rows, items[0]).verdict == "win"
    assert 0.72 <= wins / tries <= 0.9


def test_no_number_of_pictures_mends_seeds_that_disagree() -> None:
    runs, items = runs_and_items(3, 1, 250, 2)
    scores = np.random.default_rng(0).normal(0, 0.1, (3, 500)) + np.array([[-0.3], [0.05], [0.4]])
    found = split_of(scores, runs, items)
    assert found.needed(0.05)["picture"] is None
    assert found.items_needed(0.05) is None
    assert found.items_needed(0.0) is None
    seeds = found.needed(0.05)["pretraining seed and LLaVA seed"]
    assert seeds is not None
    assert seeds > 100


def test_estimates_below_zero_are_taken_from_the_others_not_forgotten() -> None:
    """Two runs on one of five encoders that happen to differ: what all seeds add stays what their means say."""
    rng = np.random.default_rng(8)
    runs, items = [np.array([0, 1, 2, 3, 4, 0]), np.arange(6)], [np.arange(200) // 2, np.arange(200)]
    luck = np.array([0.1, 0.0, 0.0, 0.0, 0.0, -0.1])[:, None]
    scores = luck + rng.normal(0, 0.05, (6, 200))
    raw = components(scores, runs, items)
    assert raw[1, 0] < 0 < raw[2, 0]
    found = split_of(scores, runs, items)
    assert (found.variances >= 0).all()
    assert found.variances[1, 0] == 0
    parts = raw / np.outer(found.run_counts, found.item_counts)
    assert found.shares()["LLaVA seed"] == pytest.approx(max(0.0, parts[1:, 0].sum()), abs=1e-12)
