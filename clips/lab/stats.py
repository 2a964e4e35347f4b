"""Are two variants different? Intervals, the verdict, and the difference that a comparison can see.

One interval for each design:
- `interval`: seeds and pictures cross, every run answers every question. Both are random effects.
- `welch`: two groups of runs, where only seeds differ.
- `over_runs`: differences that are paired by run.

One verdict (`verdict`), by the interval and by the seeds of each variant.

Shapes: S independent seeds, R runs, I items (questions), C clusters (pictures; questions may share one). Scores are
[S, I] or [R, I]: 0 or 1 for right answers, any number otherwise. Groups are numbers from 0, of shape [R] or [I].
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, Literal

import numpy as np
from scipy import stats
from scipy.special import stdtrit

LEVEL, POWER = 0.95, 0.8
BEND = 1.5
"""How the quantile of an interval goes from Student's t of pictures to that of seeds (`half_of_interval`)."""
TWO_SEEDS = 0.01
"""The same for two seeds: at this ratio of `runs` to `pictures`, both to the fourth power, the quantile is half-way."""
Verdict = Literal["win", "tie", "loss", "undecided"]
FEWEST_SEEDS = 5
"""Seeds of each variant that a verdict needs. Of fewer seeds too often all stand on one side of a jump."""
UNLIKE = 2.0
"""If one variant spreads more than so many times as much over seeds, a verdict gives its spread to both."""
UNDECIDED = "fewer than five seeds, a plan that was not kept, or seeds that differ in when they learn"
"""Why there is neither win, tie nor loss."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; None if the runs show no spread."""

    mean: float
    low: float | None
    high: float | None

    @property
    def ci95(self) -> list[float] | None:
        return None if self.low is None or self.high is None else [self.low, self.high]


def verdict(
    ci95: Sequence[float] | None, ours: Sequence[float], theirs: Sequence[float], *, kept: bool = True
) -> Verdict:
    """The only verdict rule on a − b: by its interval, and by a figure of each independent seed of a and of b.

    Tie: the interval covers zero. Win or loss: it does not, and the difference stands against unlike spreads, too
    (`half_of_unlike`). Otherwise seeds differ in when they learn, and nothing is decided. Seeds that were added after a
    look are chosen by their figures: `kept` says that the plan with the number of seeds was kept.
    """
    if not kept or min(len(ours), len(theirs)) < FEWEST_SEEDS:
        return "undecided"
    if ci95 is None or not (ci95[0] > 0 or ci95[1] < 0):
        return "tie"
    least = half_of_unlike(np.var(ours, ddof=1), np.var(theirs, ddof=1), len(ours), len(theirs))
    if abs(np.mean(ours) - np.mean(theirs)) <= least:
        return "undecided"
    return "win" if ci95[0] > 0 else "loss"


def half_of_unlike(a: Any, b: Any, ours: int, theirs: int) -> np.ndarray:
    """Half of Student's interval, if all seeds vary as those of the less steady variant; 0 where both vary alike.

    `a`, `b`: variances over seeds of two variants, which may be arrays; `ours`, `theirs`: their numbers of seeds.
    """
    larger = np.maximum(a, b)
    half = stdtrit(ours + theirs - 2, (1 + LEVEL) / 2) * np.sqrt(larger * (1 / ours + 1 / theirs))
    return np.where(larger > UNLIKE**2 * np.minimum(a, b), half, 0.0)


def turned(decision: Verdict) -> Verdict:
    """The verdict on b − a, given the verdict on a − b."""
    swapped: dict[Verdict, Verdict] = {"win": "loss", "loss": "win"}
    return swapped.get(decision, decision)


# ------------------------------------------------------------------------------------------- only seeds differ
def welch(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Difference of the means of two groups of runs, with Welch's interval.

    Runs are not paired by seed. A seed sets the order of the data and the first weights alike in both groups, but
    little of that remains in common after training, and pairing halves the degrees of freedom. What is in common makes
    this interval too wide, not too narrow.
    """
    between = mean(ours) - mean(theirs)
    if len(set(ours)) == len(set(theirs)) == 1:
        return Estimate(between, None, None)
    with warnings.catch_warnings():  # one group without spread is no mistake
        warnings.simplefilter("ignore", RuntimeWarning)
        interval = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(LEVEL)
    return Estimate(between, float(interval.low), float(interval.high))


def difference(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """`welch` of the figure `name` of two groups of runs, as JSON: `mean` and `ci95`."""
    estimate = welch([row[name] for row in ours], [row[name] for row in theirs])
    return {"mean": estimate.mean, "ci95": estimate.ci95}


def over_runs(values: np.ndarray) -> Estimate:
    """Mean of independent values [S] with Student's t interval; no interval of a single value."""
    if len(values) < 2:
        return Estimate(float(values.mean()), None, None)
    interval = stats.ttest_1samp(values, 0.0).confidence_interval(LEVEL)
    return Estimate(float(values.mean()), float(interval.low), float(interval.high))


# ------------------------------------------------------------------------------------------- one way to show
def signed(value: float, digits: int = 1, scale: float = 1) -> str:
    """`+1.2`, with a true minus."""
    return f"{scale * value:+.{digits}f}".replace("-", "−")


def show_interval(ci95: Sequence[float], digits: int = 1, scale: float = 1) -> str:
    """`[+0.3, +2.1]`"""
    return f"[{', '.join(signed(end, digits, scale) for end in ci95)}]"


def show_difference(row: Mapping[str, Any], digits: int = 1, scale: float = 1) -> str:
    """`+1.2 [+0.3, +2.1]` of a row with `mean` and `ci95`; without an interval only the mean."""
    ends = f" {show_interval(row['ci95'], digits, scale)}" if row["ci95"] else ""
    return signed(row["mean"], digits, scale) + ends


def show_mean(values: Sequence[float], digits: int = 1) -> str:
    """`1.2 ± 0.3`: mean and standard deviation over seeds; one value has no deviation."""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


# ------------------------------------------------------------------------------------------- seeds and pictures cross
def labels(names: Sequence[Hashable]) -> np.ndarray:
    """[N] numbers from 0 in order of first appearance: equal names, equal numbers."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names])


def shared_runs(by_encoder: Sequence[np.ndarray]) -> np.ndarray:
    """[R] groups of runs that share an encoder, for several encoders at once, given the groups of each.

    The result is the coarsest grouping that tells runs apart. Runs that share one of the encoders are not independent,
    even if each has another encoder of its own. An encoder that all runs share does not count.
    """
    telling = [groups for groups in by_encoder if groups.max() > 0]
    return min(telling, key=lambda groups: int(groups.max())) if telling else np.zeros_like(by_encoder[0])


def independent_runs(shared: np.ndarray) -> np.ndarray:
    """[R] groups to average (`over_groups`), so that their spread speaks of other runs.

    If all runs share their encoder, each run is a group, and the result holds for this encoder only.
    """
    return shared if shared.max() > 0 else np.arange(len(shared))


def over_groups(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """[R, …] → [S, …]: the mean of the runs of each group; `groups` holds every number from 0."""
    return np.stack([scores[groups == group].mean(0) for group in range(groups.max() + 1)])


def interval(scores: np.ndarray, clusters: np.ndarray) -> Estimate:
    """Mean of `scores` [S, I] (for two models: the differences), with its interval; `clusters`: [I] from `labels`.

    Seeds and pictures are crossed random effects: every run answers every question. The variance of the mean has two
    parts. The spread between the runs' means contains the luck of single answers. The spread of the pictures counts
    without its share of that luck. `half_of_interval` allows for how badly few seeds tell their spread. A bootstrap
    does not: three seeds have ten different samples. tests/unit/clips/test_stats.py simulates how often the interval
    errs. With one seed the interval says nothing about other training runs.
    """
    scores = np.asarray(scores, dtype=float)
    seeds, items = scores.shape
    sizes = np.bincount(clusters)
    count = len(sizes)
    by_seed = scores.mean(1)
    overall = float(by_seed.mean())
    sums = np.stack([np.bincount(clusters, row, minlength=count) for row in scores])  # [S, C]
    residuals = sums - overall * sizes
    # Sandwich variance of a mean over clusters; the small-sample factor is exact for equal clusters.
    scale = count / max(1, count - 1) / items**2
    pictures = scale * float((residuals.mean(0) ** 2).sum())
    runs = luck = 0.0
    if seeds > 1:
        runs = float(by_seed.var(ddof=1)) / seeds
        own = residuals - residuals.mean(0) - np.outer(by_seed - overall, sizes)
        luck = scale * float((own**2).sum()) / (seeds - 1) / seeds
    # Answers that all agree do not show that the next run agrees: one answer of each run counts as luck.
    luck_known = max(least_variance(luck, seeds), 1 / items**2 / seeds)
    half = float(half_of_interval(runs, max(0.0, pictures - luck), luck_known, seeds, count))
    return Estimate(overall, overall - half, overall + half)


def half_of_interval(runs: Any, pictures: Any, luck: Any, seeds: int, clusters: int) -> np.ndarray:
    """Half of the interval of a mean whose variance is `runs` + `pictures`; all three variances may be arrays.

    `runs` is estimated from `seeds`, `pictures` from `clusters`. The quantile lies between Student's t of both. Its
    place goes by the share of `runs` to the power `BEND`. Two seeds tell so little of their spread that it goes by
    `TWO_SEEDS`. Simulated with 2 to 5 seeds, 3.5 to 6.5 % of the intervals miss zero if the true mean is zero and all
    effects are normal. Where only one of two models learns in a jump, more do, which `verdict` allows for.

    The half is at least one standard error of single answers, by their variance `luck` (`least_variance`). Seeds that
    agree by chance would otherwise leave an interval without width.
    """
    variance, tail = np.asarray(runs) + pictures, (1 + LEVEL) / 2
    of_pictures = stdtrit(max(1.0, clusters - 1), tail)
    of_runs = stdtrit(seeds - 1, tail) if seeds >= 2 else of_pictures
    share = np.divide(runs, variance, out=np.zeros_like(variance, dtype=float), where=variance > 0)
    bent = share**BEND if seeds > 2 else share**4 / (share**4 + TWO_SEEDS * (1 - share) ** 4)
    quantile = of_pictures + (of_runs - of_pictures) * bent
    return np.maximum(quantile * np.sqrt(variance), np.sqrt(luck))


def least_variance(luck: Any, seeds: int) -> Any:
    """The variance of single answers that an interval allows for at least; with two seeds all of it is too much."""
    return 0.64 * luck if seeds == 2 else luck


# ------------------------------------------------------------------------------------------- before anything trains
def detectable(runs: float, pictures: float, luck: float, seeds: int, clusters: int) -> float:
    """Return the difference that `POWER` of the comparisons of this size see: neither tie nor undecided.

    Args:
        runs, pictures, luck: variances of the mean as `interval` estimates them; `runs` contains `luck`.
        seeds, clusters: seeds of each variant, and pictures.
    """
    errors, halves = simulated(runs, pictures, luck, seeds, clusters)
    return float(np.quantile(halves - errors, POWER))


def simulated(
    runs: float, pictures: float, luck: float, seeds: int, clusters: int, tries: int = 100_000
) -> tuple[np.ndarray, np.ndarray]:
    """Draw `tries` comparisons. Return the errors of their means, and what a difference must exceed to be seen.

    Seeds of both models vary alike, and the other variances that the interval estimates are drawn for each comparison.
    """
    rng, last = np.random.default_rng(0), max(1, clusters - 1)
    of_seeds = rng.normal(0.0, (runs * seeds / 2) ** 0.5, (2, tries, seeds))
    between = of_seeds[0] - of_seeds[1]
    errors = rng.normal(0.0, pictures**0.5, tries) + between.mean(1)
    pictures_and_luck = (pictures + luck) * rng.chisquare(last, tries) / last
    freedom = (seeds - 1) * last
    drawn_luck = luck * rng.chisquare(freedom, tries) / freedom
    shared = np.maximum(0.0, pictures_and_luck - drawn_luck)
    least = least_variance(drawn_luck, seeds)
    halves = half_of_interval(between.var(1, ddof=1) / seeds, shared, least, seeds, clusters)
    ours, theirs = of_seeds.var(2, ddof=1)
    return errors, np.maximum(halves, half_of_unlike(ours, theirs, seeds, seeds))
