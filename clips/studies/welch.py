"""Differences between groups of seeds with Welch's interval."""

from __future__ import annotations

import warnings
from statistics import mean
from typing import Any

from scipy import stats


def difference(ours: list[dict], theirs: list[dict], name: str) -> dict[str, Any]:
    """Mean difference over seeds with a 95 % Welch interval: None where the seeds show no spread at all.

    Welch, not pairs by seed: a seed sets the order of the data and the first weights alike in both, but what that
    leaves in common after training is small, and pairing costs half of the degrees of freedom (three seeds: 2 instead
    of up to 4, so intervals up to 1.5 times as wide). What is in common makes this interval too wide, not too narrow.
    """
    a, b = [row[name] for row in ours], [row[name] for row in theirs]
    if len({*a}) == len({*b}) == 1:
        return {"mean": mean(a) - mean(b), "ci95": None}
    with warnings.catch_warnings():  # one side alone without spread is no mistake: Welch's variances are apart
        warnings.simplefilter("ignore", RuntimeWarning)
        interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    return {"mean": mean(a) - mean(b), "ci95": [float(interval.low), float(interval.high)]}


def show_difference(found: dict[str, Any]) -> str:
    """`+1.2 [+0.3, +2.1]`"""
    ends = f" [{found['ci95'][0]:+.1f}, {found['ci95'][1]:+.1f}]" if found["ci95"] else ""
    return f"{found['mean']:+.1f}{ends}".replace("-", "−")
