"""Are two variants different? Intervals, the verdict, and the difference that a comparison can detect.

One interval for each design:
- `interval`: seeds and images are crossed random effects, since every run answers every question.
- `welch`: two groups of runs, where only seeds differ.
- `over_runs`: differences that are paired by run.

One verdict (`verdict`), by the interval and by the seeds of each variant.

Shapes: S independent seeds, R runs, I items (questions), C clusters (images; questions may share one). Scores are
[S, I] or [R, I]: 0 or 1 for right answers, any number otherwise. Groups are numbers from 0, of shape [R] or [I].
"""

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
"""Exponent that moves the quantile of an interval from Student's t of images to that of seeds (`half_of_interval`)."""
TWO_SEEDS = 0.01
"""For two seeds: at this ratio of `runs` to `images`, both to the fourth power, the quantile is half-way."""
Verdict = Literal["win", "tie", "loss", "undecided"]
FEWEST_SEEDS = 5
"""Seeds of each variant that a verdict needs. With fewer, too often all seeds are on one side of a jump in training."""
UNEQUAL = 2.0
"""If one variant's spread over seeds is more than this many times the other's, a verdict assumes it for both."""
UNDECIDED = "fewer than five seeds, a plan that was not kept, or seeds that differ in when they learn"
"""Why a verdict is neither win, tie nor loss."""


@dataclass(frozen=True)
class Estimate:
    """A mean with the ends of its 95 % interval, which are None if there are too few runs or these show no spread."""

    mean: float
    low: float | None
    high: float | None

    @property
    def ci95(self) -> list[float] | None:
        """The 95 % interval [low, high], or None if there are too few seeds for one."""
        return None if self.low is None or self.high is None else [self.low, self.high]


def verdict(
    ci95: Sequence[float] | None, ours: Sequence[float], other: Sequence[float], *, kept: bool = True
) -> Verdict:
    """Return the verdict on a − b, from the difference's interval and the metric of each independent seed.

    - "undecided": the plan was not `kept` (another number of seeds than planned; adding seeds after seeing results
      biases a verdict), or a variant has fewer than FEWEST_SEEDS seeds.
    - "tie": the interval covers zero, or there is none.
    - "win" or "loss": it does not, and the difference also holds for unequal variances (`half_of_unequal`).
    - "undecided" otherwise, because seeds then differ in when they learn.

    `ours` and `other` are the metrics of a's and b's seeds.
    """
    if not kept or min(len(ours), len(other)) < FEWEST_SEEDS:
        return "undecided"
    if ci95 is None or not (ci95[0] > 0 or ci95[1] < 0):
        return "tie"
    least = half_of_unequal(np.var(ours, ddof=1), np.var(other, ddof=1), len(ours), len(other))
    if abs(np.mean(ours) - np.mean(other)) <= least:
        return "undecided"
    return "win" if ci95[0] > 0 else "loss"


def half_of_unequal(a: Any, b: Any, ours: int, other: int) -> np.ndarray:
    """Return half of Student's interval if all seeds had the larger of the two variances, or 0 if these are equal.

    `a`, `b`: variances over seeds of two variants (may be arrays); `ours`, `other`: their numbers of seeds.
    """
    larger = np.maximum(a, b)
    half = stdtrit(ours + other - 2, (1 + LEVEL) / 2) * np.sqrt(larger * (1 / ours + 1 / other))
    return np.where(larger > UNEQUAL**2 * np.minimum(a, b), half, 0.0)


def turned(decision: Verdict) -> Verdict:
    """Return the verdict on b − a, given the verdict on a − b."""
    swapped: dict[Verdict, Verdict] = {"win": "loss", "loss": "win"}
    return swapped.get(decision, decision)


# ------------------------------------------------------------------------------------------- only seeds differ
def welch(ours: Sequence[float], other: Sequence[float]) -> Estimate:
    """Return the difference in mean between two groups of runs, with Welch's interval.

    Runs are not paired by seed. A seed gives both groups the same order of the data and initial weights, but little of
    that remains in common after training, and pairing halves the degrees of freedom. What does remain in common makes
    this interval too wide, not too narrow.
    """
    between = mean(ours) - mean(other)
    if len(set(ours)) == len(set(other)) == 1:
        return Estimate(between, None, None)
    with warnings.catch_warnings():  # one group without spread is no mistake
        warnings.simplefilter("ignore", RuntimeWarning)
        interval = stats.ttest_ind(ours, other, equal_var=False).confidence_interval(LEVEL)
    return Estimate(between, float(interval.low), float(interval.high))


def difference(ours: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Return `welch` for the metric `name` in two groups of runs, as JSON: `mean` and `ci95`."""
    estimate = welch([row[name] for row in ours], [row[name] for row in other])
    return {"mean": estimate.mean, "ci95": estimate.ci95}


def over_runs(values: np.ndarray) -> Estimate:
    """Return the mean of independent values [S] with Student's t interval; a single value has no interval."""
    if len(values) < 2:
        return Estimate(float(values.mean()), None, None)
    interval = stats.ttest_1samp(values, 0.0).confidence_interval(LEVEL)
    return Estimate(float(values.mean()), float(interval.low), float(interval.high))


# ------------------------------------------------------------------------------------------- one way to show
def signed(value: float, digits: int = 1, scale: float = 1) -> str:
    """Return a text such as `+1.2`, with a true minus."""
    return f"{scale * value:+.{digits}f}".replace("-", "−")


def show_interval(ci95: Sequence[float], digits: int = 1, scale: float = 1) -> str:
    """Return an interval, times `scale` and with `digits` decimals, as text such as `[+0.3, +2.1]`."""
    return f"[{', '.join(signed(end, digits, scale) for end in ci95)}]"


def show_difference(row: Mapping[str, Any], digits: int = 1, scale: float = 1) -> str:
    """Return `+1.2 [+0.3, +2.1]` for a row with `mean` and `ci95`, or only the mean without an interval."""
    ends = f" {show_interval(row['ci95'], digits, scale)}" if row["ci95"] else ""
    return signed(row["mean"], digits, scale) + ends


def show_mean(values: Sequence[float]) -> str:
    """Return `1.2 ± 0.3`: mean and standard deviation over seeds, or only the mean for one value."""
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}"


# ------------------------------------------------------------------------------------------- seeds and images cross
def labels(names: Sequence[Hashable]) -> np.ndarray:
    """Return [N] numbers from 0 in order of first appearance; equal names get equal numbers."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names])


def shared_runs(by_encoder: Sequence[np.ndarray]) -> np.ndarray:
    """Return group numbers from 0 [R] for the runs, equal for runs that share one of several encoders.

    `by_encoder` holds for each encoder numbers from 0 [R] that are equal for runs on the same weights of it. The result
    is the one of these groupings with the fewest groups, because runs that share one encoder are not independent, even
    if each has another encoder of its own. The groups of the others must lie within its groups. An encoder that all
    runs share does not count; if there is no other, all numbers are 0.
    """
    telling = [groups for groups in by_encoder if groups.max() > 0]
    return min(telling, key=lambda groups: int(groups.max())) if telling else np.zeros_like(by_encoder[0])


def independent_runs(shared: np.ndarray) -> np.ndarray:
    """Return the group number of each run [R] for `over_groups`, such that the group means are independent.

    `shared` has equal numbers for runs on the same encoder (`shared_runs`). If all runs share one encoder, each run is
    a group of its own, and an interval over the groups holds only for this encoder.
    """
    return shared if shared.max() > 0 else np.arange(len(shared))


def over_groups(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Average the runs [R, …] of each group, and return [S, …]; `groups` holds every number from 0."""
    return np.stack([scores[groups == group].mean(0) for group in range(groups.max() + 1)])


def interval(scores: np.ndarray, clusters: np.ndarray) -> Estimate:
    """Return the mean of `scores` [S, I] (of two models: differences) with its interval; `clusters`: [I] from `labels`.

    Seeds and images are crossed random effects: every run answers every question. The variance of the mean has two
    parts. The spread between the runs' means contains the luck of single answers. The spread of the images counts
    without its share of that luck. `half_of_interval` allows for how poorly few seeds estimate their spread. A
    bootstrap does not: three seeds have ten different samples. tests/unit/clips/test_stats.py simulates how often the
    interval errs. With one seed the interval says nothing about other training runs.
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
    images = scale * float((residuals.mean(0) ** 2).sum())
    runs = luck = 0.0
    if seeds > 1:
        runs = float(by_seed.var(ddof=1)) / seeds
        single = residuals - residuals.mean(0) - np.outer(by_seed - overall, sizes)
        luck = scale * float((single**2).sum()) / (seeds - 1) / seeds
    # Even if all answers agree, the next run may not, so at least one answer of each run counts as luck.
    luck_known = max(least_variance(luck, seeds), 1 / items**2 / seeds)
    half = float(half_of_interval(runs, max(0.0, images - luck), luck_known, seeds, count))
    return Estimate(overall, overall - half, overall + half)


def half_of_interval(runs: Any, images: Any, luck: Any, seeds: int, clusters: int) -> np.ndarray:
    """Return half of the interval of a mean with the variance `runs` + `images`; all three variances may be arrays.

    `runs` is estimated from `seeds`, `images` from `clusters`. The quantile lies between Student's t of both, at a
    position given by the share of `runs` to the power `BEND`, or by `TWO_SEEDS` for two seeds, because two say little
    about their spread. In simulations with 2 to 5 seeds, 3.5 to 6.5 % of the intervals miss zero if the true mean is
    zero and all effects are normal. If only one of two models learns in a jump, more miss it, and `verdict` allows
    for that.

    The half is at least one standard error of single answers, from their variance `luck` (`least_variance`), because
    seeds that agree by chance would otherwise leave an interval without width.
    """
    variance, tail = np.asarray(runs) + images, (1 + LEVEL) / 2
    of_images = stdtrit(max(1.0, clusters - 1), tail)
    of_runs = stdtrit(seeds - 1, tail) if seeds >= 2 else of_images
    share = np.divide(runs, variance, out=np.zeros_like(variance, dtype=float), where=variance > 0)
    bent = share**BEND if seeds > 2 else share**4 / (share**4 + TWO_SEEDS * (1 - share) ** 4)
    quantile = of_images + (of_runs - of_images) * bent
    return np.maximum(quantile * np.sqrt(variance), np.sqrt(luck))


def least_variance(luck: Any, seeds: int) -> Any:
    """Return the smallest variance of single answers for which an interval must be wide enough.

    It is `luck`, the estimated part of the mean's variance that single answers cause, or 64 % of it with two seeds, for
    which the full value makes intervals too wide.
    """
    return 0.64 * luck if seeds == 2 else luck


# ------------------------------------------------------------------------------------------- before anything trains
def detectable(runs: float, images: float, luck: float, seeds: int, clusters: int) -> float:
    """Return the difference that `POWER` of the comparisons of this size detect: neither tie nor undecided.

    Args:
        runs, images, luck: variances of the mean as `interval` estimates them; `runs` contains `luck`.
        seeds, clusters: numbers of seeds of each variant, and of images.
    """
    errors, halves = simulated(runs, images, luck, seeds, clusters)
    return float(np.quantile(halves - errors, POWER))


def simulated(
    runs: float, images: float, luck: float, seeds: int, clusters: int, tries: int = 100_000
) -> tuple[np.ndarray, np.ndarray]:
    """Draw `tries` comparisons. Return the errors of their means, and what a difference must exceed to be detected.

    Seeds of both models vary alike, and the other variances that the interval estimates are drawn for each comparison.
    """
    rng, last = np.random.default_rng(0), max(1, clusters - 1)
    of_seeds = rng.normal(0.0, (runs * seeds / 2) ** 0.5, (2, tries, seeds))
    between = of_seeds[0] - of_seeds[1]
    errors = rng.normal(0.0, images**0.5, tries) + between.mean(1)
    images_and_luck = (images + luck) * rng.chisquare(last, tries) / last
    freedom = (seeds - 1) * last
    drawn_luck = luck * rng.chisquare(freedom, tries) / freedom
    shared = np.maximum(0.0, images_and_luck - drawn_luck)
    least = least_variance(drawn_luck, seeds)
    halves = half_of_interval(between.var(1, ddof=1) / seeds, shared, least, seeds, clusters)
    ours, other = of_seeds.var(2, ddof=1)
    return errors, np.maximum(halves, half_of_unequal(ours, other, seeds, seeds))
