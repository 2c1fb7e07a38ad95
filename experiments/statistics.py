"""Paired differences between arms: mean, standard deviation, interval, and the smallest difference that can be shown.

Two arms of one seed see the same batches and start from the same values, so what is compared is their difference
within a seed, d_i = a_i - b_i, i = 1..n. With mean m and standard deviation s (n - 1 in the divisor) of the d_i:

    interval      m +- h,  h = t(0.975, n-1) s / sqrt(n)           covers the true difference in 95 of 100 such plans
    detectable    (t(0.975, n-1) + t(0.8, n-1)) s / sqrt(n)        a true difference this large is shown in about 80 of
                                                                   100 such plans

t(p, k) is the p-quantile of Student's t with k degrees of freedom. A difference is *shown* when the interval does not
cover 0: that is when |m| > h, so h is the smallest difference that this plan, as it came out, shows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping

from scipy import stats

CONFIDENCE = 0.95
POWER = 0.8


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """What a comparison of two arms came to.

    Attributes:
        seeds: that both arms have, in order; the differences are theirs.
        differences: a - b, by seed.
        mean: m.
        deviation: s; None with one seed.
        half_width: h; None with one seed.
        detectable: see the module; None with one seed.
    """

    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float
    deviation: float | None
    half_width: float | None
    detectable: float | None

    def is_shown_among(self, comparisons: int) -> bool:
        """Whether it is still shown when the chance of a false one is shared out over so many (Bonferroni)."""
        if self.deviation is None:
            return False
        quantile = t_quantile(1 - (1 - CONFIDENCE) / 2 / comparisons, len(self.seeds) - 1)
        return abs(self.mean) > quantile * self.deviation / math.sqrt(len(self.seeds))

    @property
    def interval(self) -> tuple[float, float] | None:
        """(low, high); None with one seed."""
        return None if self.half_width is None else (self.mean - self.half_width, self.mean + self.half_width)

    @property
    def verdict(self) -> str:
        """ "lower", "higher", "not shown" where the interval covers 0, or "one seed"."""
        if self.interval is None:
            return "one seed"
        low, high = self.interval
        return "lower" if high < 0 else "higher" if low > 0 else "not shown"


def paired_difference(a: Mapping[int, float], b: Mapping[int, float]) -> PairedDifference | None:
    """The difference a - b over the seeds that both have; None without one.

    Args:
        a, b: seed -> value.
    """
    seeds = tuple(sorted(set(a) & set(b)))
    if not seeds:
        return None
    differences = tuple(a[seed] - b[seed] for seed in seeds)
    mean = statistics.fmean(differences)
    if len(seeds) == 1:
        return PairedDifference(seeds, differences, mean, None, None, None)
    deviation = statistics.stdev(differences)
    error = deviation / math.sqrt(len(seeds))
    quantile = t_quantile((1 + CONFIDENCE) / 2, len(seeds) - 1)
    detectable = (quantile + t_quantile(POWER, len(seeds) - 1)) * error
    return PairedDifference(seeds, differences, mean, deviation, quantile * error, detectable)


@functools.cache
def t_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t distribution with `degrees` degrees of freedom."""
    return float(stats.t.ppf(probability, degrees))
