"""The figures of docs/stages.md on grown optimizer state, and the comparison behind them."""

from __future__ import annotations

import dataclasses

import pytest
import state_table
from state_table import EXACT, PAGE, measure, table, written


def test_the_page_has_the_measured_figures():
    assert written(PAGE.read_text(encoding="utf-8")) == table()


@pytest.mark.parametrize("wrong", ["all", "model.layers.0.mlp.fc2.weight"])
def test_an_error_of_a_percent_is_measured_as_one(wrong, monkeypatch):
    # Negative control: every moment of the source is 1 % too large, or those of one tensor are.
    compare = state_table.compare

    def spoilt(plan, weights, source, grown):
        for values in source.values():
            values.update({name: 1.01 * value for name, value in values.items() if wrong in ("all", name)})
        return compare(plan, weights, source, grown)

    monkeypatch.setattr(state_table, "compare", spoilt)
    errors = measure("phi", "hypercloning", {"snr": "none"}, whole=True).errors
    line = "model.layers.{layer}.mlp.fc2.weight"
    assert errors["exp_avg"][line] == pytest.approx(0.01)
    assert errors["exp_avg_sq"][line] == pytest.approx(1.01**0.5 - 1)
    off = {line for line, error in errors["exp_avg"].items() if error > EXACT}
    assert off == (set(errors["exp_avg"]) if wrong == "all" else {line})


def test_figures_of_two_runs_are_equal():
    one, other = (measure("gpt_neox", "isometric", {}, whole=False) for _ in range(2))
    assert dataclasses.asdict(one) == dataclasses.asdict(other)
