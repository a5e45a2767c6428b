"""Rates are halved at each length, and the grid widens until the best lies inside it."""

from __future__ import annotations

import math

import pytest

from phigrow.study.rates import choose
from phigrow.study.settings import Sweep


def bowl(best: float, floor: float = 3.0):
    """A held-out loss that is lowest at one rate, at every length."""
    return lambda rate, length: floor - length + math.log2(rate / best) ** 2


def test_half_of_the_rates_go_on_at_each_length():
    sweep = Sweep(lr=(1e-3, 2e-3, 4e-3, 8e-3), steps=(10, 20, 40), seeds=(0,), widen=0)
    rates = choose(sweep, bowl(4.4e-3))
    assert rates.best == 4e-3
    assert rates.tried == {1e-3: 1, 2e-3: 1, 4e-3: 3, 8e-3: 2}
    assert [len(rates.losses[rate]) for rate in sorted(rates.losses)] == [1, 1, 3, 2]
    assert rates.edge is None


@pytest.mark.parametrize(
    ("best", "tried", "edge"),
    [
        (2e-3, [1e-3, 2e-3, 4e-3], None),
        (0.5e-3, [0.25e-3, 0.5e-3, 1e-3, 2e-3, 4e-3], None),
        (16e-3, [1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3], None),
        (1.0, [1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3], "high"),
    ],
)
def test_the_grid_widens_until_the_best_rate_is_inside(best, tried, edge):
    sweep = Sweep(lr=(1e-3, 2e-3, 4e-3), steps=(10, 40), seeds=(0,), widen=3)
    rates = choose(sweep, bowl(best))
    assert sorted(rates.tried) == pytest.approx(tried)
    assert rates.edge == edge
    assert rates.best == pytest.approx(tried[-1] if edge else best)
    record = rates.record(sweep)
    assert (record["steps"], record["edge"], record["lr"]) == ([10, 40], edge, pytest.approx(tried))
    assert record["losses"]["0.002"][0] == pytest.approx(bowl(best)(2e-3, 0), abs=1e-6)


def test_missing_runs_are_named_before_a_rate_is_chosen():
    sweep = Sweep(lr=(1e-3, 2e-3, 4e-3), steps=(10, 40), seeds=(0,), widen=2)
    known: dict[tuple[float, int], float] = {}

    def loss_of(rate: float, length: int) -> float | None:
        return known.get((rate, length))

    rates = choose(sweep, loss_of)
    assert (rates.best, rates.tried, rates.undecided) == (None, dict.fromkeys(sweep.lr, 1), (0, 2))
    known |= {(1e-3, 0): 3.0, (2e-3, 0): 3.1, (4e-3, 0): math.nan}
    rates = choose(sweep, loss_of)
    assert (rates.best, rates.tried, rates.undecided) == (None, {1e-3: 2, 2e-3: 2, 4e-3: 1}, (0, 0))
    known |= {(1e-3, 1): 2.0, (2e-3, 1): 2.2}
    rates = choose(sweep, loss_of)  # the best is the smallest: one beyond it is tried, at every length
    assert (rates.best, rates.tried[0.5e-3]) == (None, 2)
    known |= {(0.5e-3, 0): 3.0, (0.5e-3, 1): 2.1}
    assert choose(sweep, loss_of).best == 1e-3


def test_a_sweep_of_which_all_rates_diverge_tries_smaller_ones_and_then_has_no_best():
    sweep = Sweep(lr=(1e-3, 2e-3), steps=(10, 40), seeds=(0,), widen=2)
    rates = choose(sweep, lambda rate, length: math.nan)
    assert sorted(rates.tried) == [0.25e-3, 0.5e-3, 1e-3, 2e-3]
    assert (rates.best, rates.edge) == (None, "low")
    assert rates.record(sweep)["losses"]["0.001"] == [None, None]
    assert choose(sweep, lambda rate, length: 3.0 if rate < 1e-3 else math.inf).best == 0.5e-3


def test_a_sweep_of_one_length_is_recorded_as_it_was():
    sweep = Sweep(lr=(1e-3, 4e-3), steps=(10,), seeds=(0,))
    rates = choose(sweep, bowl(4e-3))
    assert rates.record(sweep) == {"lr": [1e-3, 4e-3], "steps": 10, "seeds": [0]}
    assert (rates.best, rates.edge) == (4e-3, "high")
