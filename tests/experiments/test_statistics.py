import math

import numpy as np
import pytest

from experiments.statistics import paired_difference, t_quantile


@pytest.mark.parametrize("probability", [0.8, 0.975, 0.3])
def test_quantiles_are_those_of_the_closed_forms(probability):
    one = math.tan(math.pi * (probability - 0.5))
    centred = 2 * probability - 1
    two = centred * math.sqrt(2 / (1 - centred**2))
    alpha = 4 * probability * (1 - probability)
    four = math.copysign(
        2 * math.sqrt(math.cos(math.acos(math.sqrt(alpha)) / 3) / math.sqrt(alpha) - 1), probability - 0.5
    )
    for degrees, exact in ((1, one), (2, two), (4, four)):
        assert t_quantile(probability, degrees) == pytest.approx(exact, rel=1e-9)


def test_a_difference_worked_out_by_hand():
    a, b = {0: 2.0, 1: 2.1, 2: 2.4, 9: 7.0}, {0: 2.1, 1: 2.3, 2: 2.7, 5: 1.0}
    d = paired_difference(a, b)
    assert d.seeds == (0, 1, 2)
    assert d.differences == pytest.approx((-0.1, -0.2, -0.3))
    assert d.mean == pytest.approx(-0.2) and d.deviation == pytest.approx(0.1)
    # t(0.975, 2) = 4.302652..., t(0.8, 2) = 1.060660...
    assert d.half_width == pytest.approx(4.3026527 * 0.1 / math.sqrt(3), rel=1e-6)
    assert d.detectable == pytest.approx((4.3026527 + 1.0606602) * 0.1 / math.sqrt(3), rel=1e-6)
    assert d.interval == pytest.approx((-0.2 - d.half_width, -0.2 + d.half_width))
    assert d.verdict == "not shown"  # three seeds: the interval covers 0


@pytest.mark.parametrize(("sign", "verdict"), [(-1, "lower"), (1, "higher")])
def test_a_difference_is_shown_when_the_interval_does_not_cover_0(sign, verdict):
    d = paired_difference({i: sign * (1.0 + 0.01 * i) for i in range(4)}, dict.fromkeys(range(4), 0.0))
    assert d.verdict == verdict


def test_a_difference_that_is_shown_alone_may_not_be_shown_among_many():
    d = paired_difference({0: -0.1, 1: -0.2, 2: -0.15, 3: -0.1}, dict.fromkeys(range(4), 0.0))
    assert d.verdict == "lower" and d.is_shown_among(1)
    # t = mean / (sd / 2) = 5.745; t(1 - 0.025 / n, 3) is 4.857 for n = 3 and 5.84 for n = 5
    assert d.is_shown_among(3) and not d.is_shown_among(5)
    assert not paired_difference({0: -1.0}, {0: 0.0}).is_shown_among(1)


def test_one_seed_has_no_interval_and_no_seed_no_difference():
    one = paired_difference({3: 1.0}, {3: 1.5})
    assert (one.mean, one.deviation, one.half_width, one.detectable, one.interval) == (-0.5, None, None, None, None)
    assert one.verdict == "one seed"
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Synthetic plans of five seeds whose scatter between seeds is ten times that of the paired difference."""
    random, truth, covered, shown = np.random.default_rng(0), -0.02, 0, 0
    plans = 4000
    seed_effect = random.normal(0, 0.1, (plans, 5))
    b = seed_effect + random.normal(0, 0.01, (plans, 5))
    detectable = []
    for row, base in zip(seed_effect + truth + random.normal(0, 0.01, (plans, 5)), b, strict=True):
        d = paired_difference(dict(enumerate(row)), dict(enumerate(base)))
        covered += d.interval[0] <= truth <= d.interval[1]
        shown += d.verdict == "lower"
        detectable.append(d.detectable)
    assert covered / plans == pytest.approx(0.95, abs=0.012)  # three and a half standard errors
    # The true difference is near what five such seeds detect with probability 0.8, and so is the share that shows it.
    assert np.mean(detectable) == pytest.approx(0.0223, abs=0.001)
    assert 0.6 < shown / plans < 0.8
