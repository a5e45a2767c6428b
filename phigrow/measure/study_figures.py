"""Figures of a study: held-out loss against FLOPs with the flat frontier, and saving against the source's age."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from phigrow.measure.arms import source_age
from phigrow.measure.estimates import ACCOUNTINGS, Accounting, Arm, Comparison
from phigrow.measure.figures import STYLE, TITLES, WIDTH, colour_of, marker_of, plain
from phigrow.measure.frontier import FlatFrontier, frontier_of
from phigrow.measure.wording import NAMES
from phigrow.records.run import Run
from phigrow.records.schema import Unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FLAT_COLOUR = "#8A8A8A"


def age_lines(comparison: Comparison) -> list[tuple[str, list[tuple[float, Arm]]]]:
    """Return, for each method with sources of several ages, its name and its arms by rising age.

    Arms with a source that meets the target are left out, because their savings say nothing about growth.
    """
    lines: dict[tuple[str, Any, Any], list[tuple[float, Arm]]] = {}
    for arm in comparison.arms:
        run = arm.runs[0]
        age = source_age(run)
        if age is not None and not arm.source_meets(comparison.target(arm)):
            key = (str(run.meta["arm"]), run.study.get("source"), run.study.get("source_constant") is True)
            lines.setdefault(key, []).append((age, arm))
    several = {key: line for key, line in lines.items() if len({age for age, _ in line}) > 1}
    names = [key[0] for key in several]
    return [
        (
            key[0]
            + (f" from {key[1]}" if key[1] is not None and names.count(key[0]) > 1 else "")
            + (", constant rate" if key[2] else ""),
            sorted(line, key=lambda point: point[0]),
        )
        for key, line in several.items()
    ]


def age_figure(comparison: Comparison, unit: Unit = "flops") -> Figure | None:
    """Draw saving against the source's age, one line a method: left sunk, right charged; None with one age only.

    Vertical lines are intervals. Open triangles are bounds: one that points down is an upper bound.
    """
    import matplotlib
    from matplotlib.figure import Figure

    lines = age_lines(comparison)
    if not lines:
        return None
    arms = (comparison.baseline, *comparison.arms)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
        for axes, accounting in zip(figure.subplots(1, 2, sharex=True, sharey=True), ACCOUNTINGS, strict=True):
            axes.set_title(TITLES[accounting], loc="left")
            axes.axhline(0.0, color="#777777", linewidth=0.9, linestyle=(0, (4, 3)))
            axes.set_xscale("log")
            for number, (name, line) in enumerate(lines):
                place = arms.index(line[0][1])
                _age_line(axes, name, line, place, unit, accounting, 1.04 ** (number - (len(lines) - 1) / 2))
            ages = sorted({age for _, line in lines for age, _ in line})
            axes.set_xticks(ages, [f"{age:g}" for age in ages])
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
            axes.set_xlabel("age of the source (tokens per parameter of its own)")
        figure.axes[0].set_ylabel(f"saving in {NAMES[unit]}")
        _legend(figure)
    return figure


def _age_line(
    axes: Axes, name: str, line: list[tuple[float, Arm]], place: int, unit: Unit, accounting: Accounting, dodge: float
) -> None:
    colour, marker = colour_of(place), marker_of(place)
    found = [(age * dodge, arm, arm.estimate(unit, accounting)) for age, arm in line]
    known = [(age, arm, each) for age, arm, each in found if np.isfinite(each.saving)]
    values = [np.nan if each.censored or each.upper_bound else each.saving for _, _, each in known]
    axes.plot([age for age, _, _ in known], values, color=colour, linewidth=1.4, label=plain(name))
    for age, arm, each in known:
        bound = each.censored or each.upper_bound
        mark = "v" if each.censored else "^" if each.upper_bound else marker
        if each.saving_interval and np.isfinite(each.saving_interval).all():
            axes.vlines(age, *each.saving_interval, color=colour, linewidth=0.9, alpha=0.6)
        axes.plot(age, each.saving, mark, color=colour, markerfacecolor="white" if bound else colour, markersize=4)
        if arm.lr_edge:
            axes.annotate("†", (age, each.saving), (3, 3), textcoords="offset points", fontsize=7)


def mean_ends(runs: tuple[Run, ...], accounting: Accounting) -> list[tuple[float, float]]:
    """Return (FLOPs, loss) of the decayed ends of an arm, as means over the finished runs of each budget."""
    by_budget: dict[int | None, list[tuple[float, float]]] = {}
    for run in runs:
        source = run.source_cost("flops") if accounting == "charged" else 0.0
        if np.isnan(source) and not run.meta.get("growth"):
            source = 0.0
        spent = float(run.evals["flops"][-1]) + source + run.expand_cost("flops")
        loss = float(run.evals["loss"][-1])
        if run.finished and np.isfinite((spent, loss)).all():
            by_budget.setdefault(run.budget, []).append((spent, loss))
    return [tuple(np.mean(points, axis=0).tolist()) for _, points in sorted(by_budget.items(), key=lambda i: i[0] or 0)]


def frontier_figure(comparison: Comparison) -> Figure | None:
    """Draw held-out loss against FLOPs for every decayed end: flat models with their lower envelope, and grown arms.

    The source's training is not counted on the left, and counted on the right. Returns None without flat models.
    """
    import matplotlib
    from matplotlib.figure import Figure

    frontier = frontier_of(comparison)
    if frontier is None:
        return None
    with matplotlib.rc_context(STYLE):
        rows = (len(comparison.arms) + len(frontier.sizes)) // 5 + 1
        figure = Figure(figsize=(WIDTH, 3.0 + 0.14 * rows), layout="constrained")
        for axes, accounting in zip(figure.subplots(1, 2, sharex=True, sharey=True), ACCOUNTINGS, strict=True):
            axes.set_title(TITLES[accounting], loc="left")
            axes.set_xscale("log")
            axes.grid(axis="y", color="#E4E4E4", linewidth=0.6)
            _flat_lines(axes, comparison, frontier)
            for place, arm in enumerate(comparison.arms, start=1):
                points = np.array(mean_ends(comparison.ends.get(arm.name, arm.runs), accounting))
                if len(points):
                    look: dict[str, Any] = {"color": colour_of(place), "marker": marker_of(place), "markersize": 4}
                    axes.plot(points[:, 0], points[:, 1], linewidth=1.2, label=plain(arm.label), **look)
            axes.set_xlabel("training FLOPs")
        figure.axes[0].set_ylabel("held-out loss (nats per token)")
        _legend(figure)
    return figure


def _flat_lines(axes: Axes, comparison: Comparison, frontier: FlatFrontier) -> None:
    base = comparison.baseline.name
    for number, (name, size) in enumerate(frontier.sizes.items()):
        colour = colour_of(0) if name == base else FLAT_COLOUR
        logs = np.linspace(size.fit.logs[0], size.fit.logs[-1], 40)
        axes.plot(np.exp(logs), [size.fit.read(at).loss for at in logs], color=colour, linewidth=0.8)
        label = plain(name) if name == base else "flat models" if number == bool(base in frontier.sizes) else None
        axes.plot(np.exp(size.fit.logs), size.fit.losses, ".", color=colour, markersize=5, label=label)
    hull = np.array([(x, y) for x, y, _ in frontier.hull])
    look: dict[str, Any] = {"linewidth": 2.2, "alpha": 0.45, "label": "flat frontier"}
    axes.plot(np.exp(hull[:, 0]), hull[:, 1], color="#444444", **look)


def _legend(figure: Figure) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False)
