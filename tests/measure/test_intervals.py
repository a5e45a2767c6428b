"""Intervals: what they cover is simulated, and the plain bootstrap is seen failing."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

from phigrow.measure.intervals import speedup_intervals

spec = importlib.util.spec_from_file_location(
    "coverage_benchmark", Path(__file__).parents[2] / "benchmarks/coverage.py"
)
simulation = importlib.util.module_from_spec(spec)
spec.loader.exec_module(simulation)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_coverage_is_93_to_97_percent(seeds):
    costs, against = simulation.simulated_costs(np.random.default_rng(seeds), "normal", seeds, 4000)
    share, _ = simulation.covered(costs, against, "phigrow")
    assert 0.93 <= share <= 0.97


@pytest.mark.parametrize("seeds", [3, 5])
def test_coverage_of_the_whole_meter_on_noisy_curves(seeds):
    costs, against = simulation.simulated_curves(np.random.default_rng(seeds), seeds, 1500)
    share, _ = simulation.covered(costs, against, "phigrow")
    assert 0.93 <= share <= 0.97
    assert np.median(against.mean(1) / costs.mean(1)) == pytest.approx(simulation.TRUE, rel=0.02)


def test_the_plain_percentile_bootstrap_would_not_cover():
    """Negative control: three values cannot spread further than from the smallest to the largest of them."""
    costs, against = simulation.simulated_costs(np.random.default_rng(0), "normal", 3, 1000)
    assert simulation.covered(costs, against, "percentile")[0] < 0.8


def test_it_is_student_s_interval_of_the_log_where_the_baseline_does_not_vary():
    """With little spread the bootstrap's error is the textbook's; t for 4 degrees of freedom is 2.776."""
    costs = np.array([[1.00, 1.01, 0.99, 1.02, 0.98]])
    low, high = speedup_intervals(costs, np.full((1, 5), 2.0), resamples=100_000)[0]
    error = costs.std(ddof=1) / math.sqrt(5)
    assert math.log(high / low) == pytest.approx(2 * 2.776 * error, rel=0.01)
    assert low * high == pytest.approx(4.0)


def test_rows_share_their_resamples_and_come_out_as_alone():
    rng = np.random.default_rng(1)
    costs, against = rng.uniform(1, 2, (4, 4)), rng.uniform(2, 3, (4, 4))
    together = speedup_intervals(costs, against)
    assert together == [pytest.approx(speedup_intervals(costs[i], against[i])[0]) for i in range(4)]


def test_zeros_unknowns_and_few_seeds():
    ones = np.ones(3)
    assert speedup_intervals(np.ones(2), np.ones(2)) == [None]
    assert speedup_intervals(np.array([1, np.nan, 1]), ones) == [None]
    assert speedup_intervals(np.zeros(3), ones) == [(math.inf, math.inf)]
    low, high = speedup_intervals(np.array([0.0, 0.1, 0.2]), ones)[0]
    assert high == math.inf  # no cost at all lies within it
    # The ratio is 0.1, its error 0.1 / sqrt(3), Student's t for two degrees of freedom 4.303.
    assert 1 / low == pytest.approx(0.1 + 4.303 * 0.1 / math.sqrt(3), rel=0.05)
