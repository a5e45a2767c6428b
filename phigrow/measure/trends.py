"""Figures of trends: speedup against budget, and symmetry diagnostics against the step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from phigrow.measure.estimates import ACCOUNTINGS, Accounting, Arm, Comparison
from phigrow.measure.figures import STYLE, TITLES, WIDTH, colour_of, line_of, marker_of, plain
from phigrow.measure.wording import NAMES, amount, is_grown
from phigrow.records.schema import DIAGNOSTICS, Unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WORDS = {
    "copy_cosine": "cosine between copies",
    "effective_rank": "effective rank of the residual",
    "fresh_update_share": "fresh share of the update",
}
"""Columns of ``DIAGNOSTICS`` that are drawn, and their titles."""


DODGE = 1.03
"""Ratio of the positions of two neighbouring arms on the axis of budgets."""


def budget_figure(comparison: Comparison, unit: Unit = "tokens") -> Figure | None:
    """Draw speedup against the baseline's budget: left without the source's training (sunk), right with it (charged).

    Vertical lines are intervals. Solid lines join decayed ends. Dashed lines join points that were read before the
    learning rate decayed. Open triangles are bounds: one that points down is an upper bound. Marks on the line ∞ are
    arms that were below the target before their first update. At every budget, the arms are drawn side by side.

    Args:
        comparison: from ``compare``.
        unit: of the speedup. The budget is in tokens.

    Returns:
        The figure; None without arms.
    """
    import matplotlib
    from matplotlib.figure import Figure

    if not any(arm.budgets for arm in comparison.arms):
        return None
    every = [estimate for arm in comparison.arms for point in arm.budgets for estimate in point.estimates]
    infinite = any(estimate.cost == 0 and estimate.unit == unit for estimate in every)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.5), layout="constrained")
        for axes, accounting in zip(figure.subplots(1, 2, sharex=True, sharey=True), ACCOUNTINGS, strict=True):
            axes.set_title(TITLES[accounting], loc="left")
            axes.axhline(1.0, color="#777777", linewidth=0.9, linestyle=(0, (4, 3)))
            axes.set_xscale("log")
            axes.set_yscale("log")
            for place, arm in enumerate(comparison.arms, start=1):
                _trend(axes, arm, place, unit, accounting, DODGE ** (place - (len(comparison.arms) + 1) / 2))
            _plain_ticks(axes, comparison)
            if infinite:
                axes.text(-0.02, 1.06, "∞", transform=axes.transAxes, ha="right", va="center")
                axes.set_title(TITLES[accounting], loc="left", pad=14)
            axes.set_xlabel(f"{plain(comparison.baseline.name)}'s budget (tokens)")
        figure.axes[0].set_ylabel(f"speedup in {NAMES[unit]}")
        _legend(figure)
    return figure


def diagnostics_figure(comparison: Comparison) -> Figure | None:
    """Draw the symmetry diagnostics against the step, one panel each; None if no run recorded any."""
    import matplotlib
    from matplotlib.figure import Figure

    arms = (comparison.baseline, *comparison.arms)
    there = [key for key in DIAGNOSTICS if key in WORDS and any(key in r.diagnostics for a in arms for r in a.runs)]
    if not there:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.3), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(there)))
        for axes, key in zip(panels, there, strict=True):
            axes.set_title(WORDS[key], loc="left")
            axes.set_xlabel("step")
            axes.grid(axis="y", color="#E4E4E4", linewidth=0.6)
            for place, arm in enumerate(arms):
                shown = [run for run in arm.runs if key in run.diagnostics]
                for number, run in enumerate(shown):
                    label = plain(arm.label) if number == 0 else None
                    wide = 1.6 if len(shown) == 1 else 0.9
                    at, values = run.diagnostics["step"], run.diagnostics[key]
                    look = {"color": colour_of(place), "linestyle": line_of(place)}
                    axes.plot(at, values, linewidth=wide, label=label, **look)
        _legend(figure)
    return figure


def _legend(figure: Figure) -> None:
    """Add one legend below all panels, where it hides nothing."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=min(len(handles), 5), frameon=False
    )


def _trend(axes: Axes, arm: Arm, place: int, unit: Unit, accounting: Accounting, dodge: float) -> None:
    points = [
        (p, p.estimate(unit, accounting)) for p in arm.budgets if not (is_grown(arm) and arm.source_meets(p.target))
    ]
    known = [(point, each) for point, each in points if np.isfinite(each.speedup) and each.speedup > 0]
    colour, marker = colour_of(place), marker_of(place)
    for point, each in points:
        if each.cost == 0:
            axes.plot(
                point.budget * dodge, 1.06, marker, transform=axes.get_xaxis_transform(), color=colour, markersize=4,
                clip_on=False,
            )  # fmt: skip
    dashed = any(point.basis == "curve" for point, _ in known)
    style: Any = (0, (3, 1.5)) if dashed else "-"
    # Bounds are not joined, because a line between a bound and a value has no meaning.
    line = [np.nan if each.censored or each.upper_bound else each.speedup for _, each in known]
    budgets = [point.budget * dodge for point, _ in known]
    axes.plot(budgets, line, color=colour, linewidth=1.4, linestyle=style, label=plain(arm.label))
    for point, each in known:
        mark = "v" if each.censored else "^" if each.upper_bound else marker
        bound = each.censored or each.upper_bound
        face = "white" if bound or point.basis == "curve" else colour
        if each.speedup_interval:
            axes.vlines(point.budget * dodge, *each.speedup_interval, color=colour, linewidth=0.9, alpha=0.6)
        axes.plot(point.budget * dodge, each.speedup, mark, color=colour, markerfacecolor=face, markersize=4)


def _plain_ticks(axes: Axes, comparison: Comparison) -> None:
    """Write a few ticks as 100k and 2x. matplotlib would write powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value, "tokens")))
    low, high = axes.get_ylim()
    subs = (1.0, 2.0, 5.0) if high / low > 8 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    for each in (axes.xaxis, axes.yaxis):
        each.set_minor_locator(NullLocator())
