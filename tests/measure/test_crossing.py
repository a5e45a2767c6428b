"""Crossings of noisy curves with a target, against values worked out by hand."""

import numpy as np
import pytest

from phigrow.errors import GrowthError
from phigrow.measure import cost_to_loss, monotone

NAN, INF = float("nan"), float("inf")


def test_a_falling_curve_is_its_own_fit():
    losses = [5.0, 4.0, 3.0]
    assert monotone([0, 1, 2], losses).tolist() == losses
    crossing = cost_to_loss([0, 100, 300], losses, 3.25)
    assert (crossing.cost, crossing.censored, crossing.end_cost, crossing.fit_end) == (250.0, False, 300.0, 3.0)


def test_hitting_a_point_exactly():
    assert cost_to_loss([0, 100, 300], [5.0, 4.0, 3.0], 3.0).cost == 300.0
    assert cost_to_loss([0, 100, 300], [5.0, 4.0, 3.0], 4.0).cost == 100.0


def test_one_lucky_point_is_no_crossing():
    losses = [5.0, 4.0, 3.0, 3.8, 3.7, 2.5]
    # 3.0 is pooled with 3.8 to 3.4, and that again with 3.7 to 3.5, one level at the cost 3.
    assert monotone(range(6), losses).tolist() == pytest.approx([5.0, 4.0, 3.5, 3.5, 3.5, 2.5])
    assert cost_to_loss(range(6), losses, 3.0).cost == pytest.approx(4.0)  # between (3, 3.5) and (5, 2.5)
    first_touch = 2.0
    assert cost_to_loss(range(6), losses, 3.0).cost > first_touch


def test_never_there_is_censored():
    crossing = cost_to_loss([0, 100, 200], [5.0, 4.0, 3.0], 2.9)
    assert (crossing.cost, crossing.censored, crossing.end_cost, crossing.fit_end) == (None, True, 200.0, 3.0)


def test_below_from_the_start_costs_nothing():
    assert cost_to_loss([0, 100, 200], [3.0, 2.9, 2.8], 3.5).cost == 0.0


def test_a_start_that_is_not_held_is_no_start():
    # Below the target before the first update, thrown off by the warm-up, back later.
    crossing = cost_to_loss([0, 1, 2, 3], [3.4, 4.4, 3.6, 3.0], 3.5)
    assert monotone([0, 1, 2, 3], [3.4, 4.4, 3.6, 3.0])[:3] == pytest.approx([3.9, 3.9, 3.6])
    assert crossing.cost == pytest.approx(2 + 1 / 6)


@pytest.mark.parametrize("end", [NAN, INF, 50.0])
def test_divergence_takes_the_crossing_back(end):
    assert cost_to_loss([0, 1, 2, 3], [5.0, 3.0, 2.0, end], 3.5).censored
    assert cost_to_loss([0, 1, 2], [5.0, 3.0, 2.0], 3.5).cost == 0.75


def test_recovery_counts_from_the_recovery():
    losses = [5.0, 3.0, NAN, 3.2, 2.0]
    assert monotone(range(5), losses).tolist() == [INF, INF, INF, 3.2, 2.0]
    assert cost_to_loss(range(5), losses, 3.5).cost == 3.0
    assert cost_to_loss(range(5), losses, 2.6).cost == pytest.approx(3.5)


def test_only_divergence():
    assert cost_to_loss([0, 1], [NAN, NAN], 3.0).censored


def test_the_fit_never_rises_and_keeps_the_mean():
    rng = np.random.default_rng(0)
    for _ in range(50):
        size = int(rng.integers(1, 40))
        losses = rng.normal(size=size)
        fit = monotone(np.arange(size), losses)
        assert (np.diff(fit) <= 0).all()
        assert fit.mean() == pytest.approx(losses.mean())
        again = cost_to_loss(np.arange(size), losses, float(max(losses[-1], fit[-1])))
        assert not again.censored, "a curve reaches its own end"


@pytest.mark.parametrize(
    ("costs", "losses", "target", "text"),
    [
        ([], [], 3.0, "form no curve"),
        ([0, 1], [3.0], 3.0, r"costs of shape \(2,\) and losses of shape \(1,\)"),
        ([1, 0], [3.0, 2.0], 3.0, "the costs decrease or are not finite"),
        ([0, NAN], [3.0, 2.0], 3.0, "the costs decrease or are not finite"),
        ([0, 1], [3.0, 2.0], NAN, "the target loss is nan"),
    ],
)
def test_refusals(costs, losses, target, text):
    with pytest.raises(GrowthError, match=text):
        cost_to_loss(costs, losses, target)
