"""Intervals and verdicts against simulations, definitions and closed forms."""

import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats

from clips.lab.stats import (
    FEWEST_SEEDS,
    Estimate,
    detectable,
    difference,
    half_of_interval,
    half_of_unequal,
    independent_runs,
    interval,
    least_variance,
    over_groups,
    over_runs,
    shared_runs,
    simulated,
    turned,
    verdict,
    welch,
)

PICTURES, QUESTIONS, SEEDS = 120, 3, 3
Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
Shape = tuple[Draw, Draw]


def side(estimate: Estimate) -> str:
    """Which side of zero an interval leaves out."""
    return "win" if estimate.low > 0 else "loss" if estimate.high < 0 else "tie"


def answers(rng: np.random.Generator, difficulty: np.ndarray, seed_spread: float = 0.0, seeds: int = SEEDS):
    """Right or wrong [S, I] of one model: images and questions of different difficulty, runs of different luck."""
    run = rng.normal(0, seed_spread, (seeds, 1))
    return (rng.random((seeds, len(difficulty))) < np.clip(difficulty + run, 0, 1)).astype(float)


@pytest.mark.parametrize(("seeds", "seed_spread"), [(2, 0.025), (3, 0.0), (3, 0.06), (5, 0.025)])
def test_identical_models_tie_in_about_95_of_100_tries(seeds: int, seed_spread: float) -> None:
    """Right and wrong answers; seeds that make no difference, some, and most of it."""
    rng, results = np.random.default_rng(7), []
    clusters = np.repeat(np.arange(PICTURES), QUESTIONS)
    for _ in range(1500):
        image = np.repeat(rng.normal(0, 1, PICTURES), QUESTIONS)
        difficulty = 0.2 + 0.6 * stats.norm.cdf(image + rng.normal(0, 1, len(image)))
        a, b = (answers(rng, difficulty, seed_spread, seeds) for _ in range(2))
        results.append(side(interval(a - b, clusters)))
    assert (0.025 if seeds == 2 else 0.03) <= 1 - results.count("tie") / len(results) <= 0.07
    wins, losses = results.count("win"), results.count("loss")
    assert abs(wins - losses) <= 4 * np.sqrt(wins + losses + 1)


JUMP, STEADY = 0.137, 0.014
"""Assumed standard deviations over seeds of a model that learns in a jump and of a steady one."""


def normal(deviation: float) -> Draw:
    return lambda rng, shape: deviation * rng.standard_normal(shape)


def jumping(share: float) -> Draw:
    """Of a model that learns in a jump, which the share of its runs has made."""
    height = np.sqrt((JUMP**2 - STEADY**2) / share / (1 - share))
    return lambda rng, shape: height * ((rng.random(shape) < share) - share) + STEADY * rng.standard_normal(shape)


ALIKE, UNEQUAL = (normal(0.05), normal(0.05)), (normal(0.1), normal(0.02))
SHAPES: dict[str, Shape] = {
    "normal, equal variances": ALIKE,
    "normal, spreads 1 : 5": UNEQUAL,
    "heavy tails (t of 3)": (lambda rng, shape: 0.05 * rng.standard_t(3, shape),) * 2,
    **{f"both jump, {share} % high": (jumping(share / 100),) * 2 for share in (20, 50, 80)},
    **{f"one jumps, {share} % high": (jumping(share / 100), normal(STEADY)) for share in (20, 50, 80)},
}
"""How right answers of the seeds of two models vary about their true means."""


def drawn_runs(shape: Shape, seeds: int, tries: int = 6000, gap: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Chances [tries, S] of a right answer of each run of two models, whose means differ by `gap`."""
    rng = np.random.default_rng(0)
    a, b = (draw(rng, (tries, seeds)) for draw in shape)
    return np.clip(0.4 + gap + a, 0, 1), np.clip(0.4 + b, 0, 1)


def decided(a: np.ndarray, b: np.ndarray, questions: int) -> tuple[np.ndarray, np.ndarray]:
    """[tries] win or loss by shares of right answers [tries, S], crossed and Welch; by the interval of few seeds."""
    seeds = a.shape[1]
    between = abs(a.mean(1) - b.mean(1))
    luck = (a * (1 - a) + b * (1 - b)).mean(1) / (questions - 1) / seeds
    variance = (a - b).var(1, ddof=1) / seeds
    crossed = between > half_of_interval(variance, 0.0, least_variance(luck, seeds), seeds, questions)
    by_welch = stats.ttest_ind(a, b, axis=1, equal_var=False).pvalue < 0.05
    unlike = half_of_unequal(a.var(1, ddof=1), b.var(1, ddof=1), seeds, seeds)
    clear = (between > unlike) | (seeds < FEWEST_SEEDS)
    return crossed & clear, by_welch & clear


def rates(shape: Shape, seeds: int, gap: float = 0.0) -> list[int]:
    """Wins and losses in 100: crossed with 400 and with 1,500 questions, Welch with 1,500."""
    rng, chances = np.random.default_rng(1), drawn_runs(shape, seeds, gap=gap)
    few, many = (decided(*(rng.binomial(n, chance) / n for chance in chances), n) for n in (400, 1500))
    return [round(100 * float(wrong.mean())) for wrong in (few[0], *many)]


def assert_stated(page: str, name: str, shape: Shape, counts: Sequence[int], gap: float = 0.0) -> None:
    """The row `name` of a page states the rates: crossed with 400 questions for all `counts` of seeds, then Welch's.

    Versions of numpy round a few of them to the next number.
    """
    (row,) = (line for line in page.splitlines() if line.startswith(f"| {name} | "))
    stated = [int(number) for number in re.findall(r"\d+", row.removeprefix(f"| {name} |"))]
    crossed, _, by_welch = zip(*(rates(shape, seeds, gap) for seeds in counts), strict=True)
    assert [*crossed, *by_welch] == pytest.approx(stated, abs=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Precision loss")  # of runs that happen to be alike
def test_false_findings_and_power_of_the_verdict_are_those_of_the_docs() -> None:
    """At most 7 of 100, but where all seeds of the model that jumps stand on one side, which no rule can see."""
    page = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")
    for name, shape in SHAPES.items():
        assert_stated(page, name, shape, (5, 8))
        share = int(name.split()[2]) / 100 if name.startswith("one") else None
        for seeds in (5, 7, 12):
            unseen = 0.0 if share is None else share**seeds + (1 - share) ** seeds
            assert max(rates(shape, seeds)) <= max(7, 100 * unseen + 2)
    for name, shape, deviation in (("equal variances", ALIKE, 0.05), ("spreads 1 : 5", UNEQUAL, 0.0052**0.5)):
        for times in (1, 2, 3):
            assert_stated(page, f"{times}, {name}", shape, (5, 8), times * deviation)


def test_verdicts_of_drawn_answers_are_those_of_the_simulation() -> None:
    """Through `interval`, `welch` and `verdict`, five seeds and 400 questions."""
    rng, agree = np.random.default_rng(2), []
    for shape in SHAPES.values():
        chances = drawn_runs(shape, 5, tries=20)
        answers_of = [(rng.random((20, 5, 400)) < chance[..., None]).astype(float) for chance in chances]
        a, b = (of_model.mean(2) for of_model in answers_of)
        crossed, by_welch = decided(a, b, 400)
        for i, pair in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
            assert (verdict(welch(*pair).ci95, *pair) in ("win", "loss")) == by_welch[i]
            ci95 = interval(answers_of[0][i] - answers_of[1][i], np.arange(400)).ci95
            agree.append((verdict(ci95, *pair) in ("win", "loss")) == crossed[i])
    assert np.mean(agree) > 0.97


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("images", [40, 347])
def test_intervals_err_in_5_percent_whatever_makes_the_variance(seeds, images, monkeypatch):
    """100 mixtures of what seeds, images and single answers add; of the intervals alone, also with few seeds."""
    monkeypatch.setattr("clips.lab.stats.half_of_unequal", lambda *_: 0.0)
    parts = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
    mixtures = [(r, p, luck) for r in parts for p in parts for luck in (0.0, 1.0) if r + p + luck > 0]
    drawn = [simulated(runs + luck, shared, luck, seeds, images, 20_000) for runs, shared, luck in mixtures]
    rates = [(abs(errors) > halves).mean() for errors, halves in drawn]
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
    assert side(estimate) == "tie"


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


@pytest.mark.parametrize(("seeds", "images"), [(2, 40), (3, 80), (5, 400)])
def test_what_a_comparison_sees_is_seen_in_four_of_five(seeds, images, monkeypatch):
    """Of the intervals alone; tests/unit/mllm/test_compare_archive.py simulates verdicts."""
    monkeypatch.setattr("clips.lab.stats.half_of_unequal", lambda *_: 0.0)
    rng, runs, shared, luck = np.random.default_rng(6), 1e-4, 0.5e-4, 1e-4
    seen = detectable(runs + luck, shared, luck, seeds, images)
    wins, tries = 0, 1500
    for _ in range(tries):
        scores = seen + (runs * seeds) ** 0.5 * rng.standard_normal((seeds, 1))
        scores = scores + (shared * images) ** 0.5 * rng.standard_normal(images)
        scores += (luck * seeds * images) ** 0.5 * rng.standard_normal((seeds, images))
        wins += side(interval(scores, np.arange(images))) == "win"
    assert wins / tries == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize(
    ("scores", "means"),
    [
        (np.random.default_rng(2).normal(0.3, 1.0, (1, 400)), None),  # one seed: the interval of a mean over items
        (np.array([[0.1], [0.2], [0.6]]) + np.zeros((3, 50)), [0.1, 0.2, 0.6]),  # equal images: of the seeds
    ],
)
def test_of_one_source_alone_it_is_student_s_interval(scores: np.ndarray, means: list[float] | None) -> None:
    values = np.array(means) if means else scores[0]
    estimate, back = (interval(sign * scores, np.arange(scores.shape[1])) for sign in (1, -1))
    expected = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
    assert (estimate.low, estimate.high) == pytest.approx(expected)
    assert (-back.high, -back.low) == pytest.approx(expected)


def test_repeating_questions_about_the_same_images_buys_nothing() -> None:
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
    assert side(interval(scores, np.arange(200))) == "win"
    assert side(interval(means, np.arange(200))) == "tie"


def test_which_runs_are_independent_of_each_other() -> None:
    nested, own, one = np.array([0, 1, 2, 0]), np.arange(4), np.zeros(4, int)
    assert shared_runs([nested, own]).tolist() == nested.tolist()  # two runs on one of the encoders are not independent
    assert shared_runs([one, nested]).tolist() == nested.tolist()
    assert shared_runs([one, own]).tolist() == own.tolist()
    assert independent_runs(shared_runs([one, one])).tolist() == own.tolist()
    assert independent_runs(nested).tolist() == nested.tolist()


def test_the_verdict_goes_by_the_interval_and_by_the_seeds_of_each() -> None:
    ours, theirs = [0.70, 0.71, 0.72, 0.73, 0.74], [0.60, 0.61, 0.62, 0.63, 0.64]
    ends = ([-0.01, 1.0], [0.001, 0.02], [-0.02, -0.001], [0.0, 1.0], None, [float("nan")] * 2)
    assert [verdict(ci95, ours, theirs) for ci95 in ends] == ["tie", "win", "loss", "tie", "tie", "tie"]
    assert verdict(ends[1], ours, theirs, kept=False) == "undecided"
    assert verdict(ends[1], ours, theirs[:4]) == "undecided"
    steady, six_of_seven = [0.32 + 0.001 * i for i in range(7)], [0.1] + [0.6] * 6
    apart = welch(six_of_seven, steady).ci95
    assert apart[0] > 0
    assert verdict(apart, six_of_seven, steady) == "undecided"
    assert [turned(word) for word in ("win", "tie", "loss", "undecided")] == ["loss", "tie", "win", "undecided"]


def test_groups_of_runs_have_welch_s_interval_and_paired_runs_student_s() -> None:
    """Against scipy's formulas; groups without any spread have no interval."""
    a, b = [70.0, 74.0, 71.0], [30.0, 31.0, 35.0]
    estimate = welch(a, b)
    variances = np.var(a, ddof=1) / 3, np.var(b, ddof=1) / 3
    reach = stats.t.ppf(0.975, sum(variances) ** 2 / sum(v**2 / 2 for v in variances)) * sum(variances) ** 0.5
    assert estimate.ci95 == pytest.approx([estimate.mean - reach, estimate.mean + reach])
    row = difference([{"x": value} for value in a], [{"x": value} for value in b], "x")
    assert row == {"mean": estimate.mean, "ci95": estimate.ci95}
    assert welch([1.0, 1.0], [0.0, 0.0]).ci95 is None
    assert welch([1.0, 1.0], [0.0, 0.5]).ci95 is not None
    values = np.array([0.1, 0.09, 0.08])
    assert over_runs(values).ci95 == pytest.approx(stats.t.interval(0.95, 2, values.mean(), stats.sem(values)))
    assert over_runs(values[:1]).ci95 is None
