"""Figures against the budget and during training."""

import numpy as np
import pytest

from phigrow.measure import budget_figure, compare, curves, diagnostics_figure, load_runs, save
from phigrow.measure.estimates import Arm, BudgetPoint, Comparison, Estimate
from phigrow.measure.figures import plain
from phigrow.records.schema import UNITS


def point(budget, speedup, interval=None, basis="ends", **state):
    estimates = tuple(
        Estimate(unit, accounting, 1.0, speedup, **{"censored": False, "speedup_interval": interval} | state)
        for unit in ("tokens", "flops", "seconds")
        for accounting in ("sunk", "charged")
    )
    return BudgetPoint(budget, 3.0, basis, (0, 1, 2), estimates)


def comparison(*points, name="wr"):
    arm = Arm(name, (), 3.0, {}, budgets=points)
    return Comparison(Arm("scratch", (), 3.0, {}), (arm,), {0: 3.0})


def test_bounds_stand_alone_and_vertical_lines_are_intervals():
    exact = (point(2e6, 2.5, (2.0, 3.0)), point(4e6, 2.0, (1.5, 2.4)))
    found = comparison(point(1e6, 3.0, upper_bound=True), *exact, point(8e6, 1.0, censored=True))
    sunk = budget_figure(found).axes[0]
    line = next(line for line in sunk.lines if len(line.get_xdata()) == 4)
    assert np.isnan(line.get_ydata()).tolist() == [True, False, False, True]
    assert line.get_linestyle() == "-"
    markers = [line.get_marker() for line in sunk.lines if len(line.get_xdata()) == 1]
    assert markers == ["^", "o", "o", "v"]
    intervals = [each.get_paths()[0].vertices[:, 1].tolist() for each in sunk.collections]
    assert intervals == [[2.0, 3.0], [1.5, 2.4]]


def test_arms_that_met_the_target_before_training_stand_above_the_axis():
    early = BudgetPoint(
        1e6, 4.0, "ends", (0,),
        tuple(Estimate(unit, how, 0.0, 1.0, False) for unit in UNITS for how in ("sunk", "charged")),
    )  # fmt: skip
    sunk = budget_figure(comparison(early, point(2e6, 2.0))).axes[0]
    assert [line.get_ydata()[0] for line in sunk.lines if line.get_marker() != "None"] == [1.06, 2.0]
    assert [text.get_text() for text in sunk.texts] == ["∞"]


def test_points_of_a_schedule_that_goes_on_are_dashed_and_open():
    sunk = budget_figure(comparison(point(1e6, 3.0, basis="curve"), point(2e6, 2.0, basis="curve"))).axes[0]
    line = next(line for line in sunk.lines if len(line.get_xdata()) == 2 and line.get_label() == "wr")
    assert line.get_linestyle() == "--"
    assert all(each.get_markerfacecolor() == "white" for each in sunk.lines if len(each.get_xdata()) == 1)


def test_nothing_to_draw():
    alone = Comparison(Arm("scratch", (), 3.0, {}), (), {0: 3.0})
    assert budget_figure(alone) is None
    assert diagnostics_figure(alone) is None


@pytest.mark.parametrize("name", ["$x_{", "_hidden", "a$b$c", "\\frac", "long" * 50])
def test_names_are_drawn_as_they_are(write_run, tmp_path, name):
    write_run("scratch", [5.0, 4.0, 3.0], [0, 1e6, 2e6])
    folder = write_run(name, [5.0, 2.0, 1.0], [0, 1e6, 2e6], name="odd")
    found = compare(load_runs(folder.parent))
    assert save(curves(found), tmp_path / "curves.pdf").is_file()
    assert save(budget_figure(found), tmp_path / "budget.pdf").is_file()
    assert plain(name).replace(r"\$", "$").strip() == (name if len(name) < 28 else "longlonglonglonglonglonglon…")


def test_fonts_in_pdfs_are_truetype(write_run, tmp_path):
    folder = write_run("scratch", [5.0, 4.0, 3.0], [0, 1e6, 2e6])
    text = save(curves(compare(load_runs(folder))), tmp_path / "curves.pdf").read_bytes()
    assert b"/Type3" not in text
    assert b"/CIDFontType2" in text
