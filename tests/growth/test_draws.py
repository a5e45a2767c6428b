"""New values: their distribution, their independence, and that they depend on their place alone."""

import numpy as np
import pytest
from scipy import stats

from phigrow.checkpoints.bits import narrow
from phigrow.growth.draws import LEVELS, NormalStream, quantiles


def test_quantiles_are_the_normal_distribution_in_equal_steps():
    values = quantiles()
    assert values.shape == (LEVELS,)
    assert (np.diff(values) > 0).all()
    np.testing.assert_array_equal(values, -values[::-1])
    assert np.mean(values**2) == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(values, stats.norm.ppf((np.arange(LEVELS) + 0.5) / LEVELS), rtol=2e-5)
    assert stats.kurtosis(values, fisher=False) == pytest.approx(3, abs=2e-3)
    assert 4.3 < values.max() < 4.4


def test_values_are_normal():
    drawn = NormalStream(0, "new rows", "a.weight", 1000).values(0, 1000).ravel()
    assert stats.kstest(drawn, "norm").pvalue > 0.01
    assert abs(drawn.mean()) < 4e-3
    assert drawn.std() == pytest.approx(1, abs=4e-3)
    flat = np.random.default_rng(0).uniform(-(3**0.5), 3**0.5, 1_000_000)  # negative control: the same variance
    assert stats.kstest(flat, "norm").pvalue < 1e-6
    for lag in (1, 2, 3, 4, 5, 1000):  # a 64-bit draw makes four values, a row a thousand
        assert abs(np.corrcoef(drawn[:-lag], drawn[lag:])[0, 1]) < 4e-3


@pytest.mark.parametrize("width", [1, 3, 4, 70, 1024])
def test_rows_are_the_same_wherever_drawing_starts(width):
    stream = NormalStream(7, "new columns", "b.weight", width)
    whole = stream.values(0, 300)
    assert whole.shape == (300, width)
    for first, count in ((0, 1), (1, 7), (299, 1), (17, 200)):
        np.testing.assert_array_equal(stream.values(first, count), whole[first : first + count])
    assert not np.array_equal(stream.values(1, 10), whole[:10])


def test_streams_differ_by_seed_purpose_and_tensor():
    streams = [(0, "new rows", "a"), (1, "new rows", "a"), (0, "new columns", "a"), (0, "new rows", "b")]
    drawn = np.stack([NormalStream(*each, 100).values(0, 1000).ravel() for each in streams])
    assert np.abs(np.corrcoef(drawn) - np.eye(4)).max() < 0.015


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_stored_bits_are_the_rounded_values(dtype):
    stream = NormalStream(3, "new rows", "c", 33)
    np.testing.assert_array_equal(stream.bits(5, 40, 0.02, dtype), narrow(stream.values(5, 40) * 0.02, dtype))
