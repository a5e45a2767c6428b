"""The figure of a comparison: held-out loss against cost, sunk and charged, with the target and the arms' costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phigrow.files.atomic import atomic_write
from phigrow.files.output import writing
from phigrow.files.paths import user_path
from phigrow.files.picture import check_picture, write_picture
from phigrow.measure.cost_curves import cost_curve
from phigrow.measure.estimates import Accounting, Arm, Comparison
from phigrow.measure.wording import SCALES, times
from phigrow.records.run import Run
from phigrow.records.schema import Unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINE_COLOUR = "#222222"
# Okabe and Ito's palette without black (the baseline) and yellow (too light on white). Then those colours of Paul Tol's
# muted palette that differ from it, with brown and grey.
COLOURS = (
    "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00",
    "#882255", "#332288", "#999933", "#8C564B", "#44AA99", "#7F7F7F",
)  # fmt: skip
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "p", "*", "h")
"""One marker for each colour, so that arms can be distinguished in grey too."""
LINES: tuple[Any, ...] = ("-", (0, (5, 1.2)), (0, (1, 1)))
"""Line styles of the first, second and third group of arms that share the colours."""

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.edgecolor": "#444444",
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "pdf.fonttype": 42,  # TrueType: publishers refuse matplotlib's default, Type 3
    "svg.hashsalt": "phigrow",
}
TITLES: dict[Accounting, str] = {
    "sunk": "source's training not counted (sunk)",
    "charged": "source's training counted (charged)",
}
WIDTH = 6.75
"""Inches: the width of the text of a paper in two columns, where fonts then have the sizes above."""

LONGEST = 28
"""Most letters of an arm's name in a legend."""

CROWD = 6
"""Most arms with a legend inside the panels. With more, the legend is below, where it hides no curves."""

LATE = 0.35
"""The page shows losses up to the baseline's loss after this share of its budget, or an arm's, if higher."""

ZOOM = 0.08
"""The figure shows losses up to the baseline's loss after this share of its budget."""


def curves(comparison: Comparison, unit: Unit = "tokens") -> Figure:
    """Draw held-out loss against cost for every arm: left with the source's training sunk, right with it charged.

    Thin lines are seeds. Thick lines are means over seeds that were evaluated at the same steps. The grey dashed line
    is the target, and a marker on it is the cost of an arm. Dashed lines in the colour of an arm are the fitted curves
    from which costs were read. An arm with an unknown source cost is missing on the right. The loss before training
    (about 11 for random weights) is cut off, so that the rest can be seen.

    Args:
        comparison: from ``compare``.
        unit: of the horizontal axis.

    >>> save(curves(comparison), "curves.svg")  # doctest: +SKIP
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        rows = (len(comparison.arms) + 3) // 2  # of the legend: with scratch and the target, in two columns
        height = 2.8 + 0.125 * (rows - 1) if _crowded(comparison) else 2.8
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        scale, label = axis(comparison, unit)
        for axes, accounting in ((left, "sunk"), (right, "charged")):
            _panel(axes, comparison, unit, accounting, scale)  # type: ignore[arg-type]
            axes.set_xlabel(label)
        left.set_ylabel("held-out loss (nats per token)")
        left.set_ylim(*loss_range(comparison))
    return figure


def save(drawn: Figure | str, path: str | Path) -> Path:
    """Write a figure as SVG, PDF or PNG (200 dots an inch), by the ending of ``path``; the same bytes every time.

    A text is written as it is, such as the tables of `latex`. The file is written whole or not at all.

    Raises:
        GrowthError: as `write_picture`. A file that phigrow did not write is not replaced.
    """
    path = user_path(path)
    if not isinstance(drawn, str):
        return write_picture(drawn, path, STYLE)
    check_picture(path)
    with writing(path):
        atomic_write(path, drawn)
    return path


def colour_of(place: int) -> str:
    """Return the colour of the arm at a place. The baseline is at place 0."""
    return BASELINE_COLOUR if place == 0 else COLOURS[(place - 1) % len(COLOURS)]


def marker_of(place: int) -> str:
    """Return the marker of the arm at a place. No two arms share both colour and marker."""
    return MARKERS[(place - 1 + 5 * ((place - 1) // len(COLOURS))) % len(MARKERS)]


def line_of(place: int) -> Any:
    """Return the line style of the arm at a place."""
    return LINES[(place - 1) // len(COLOURS) % len(LINES)] if place else LINES[0]


def _panel(axes: Axes, comparison: Comparison, unit: Unit, accounting: Accounting, scale: float) -> None:
    base, target = comparison.baseline, comparison.target()
    axes.set_title(TITLES[accounting], loc="left")
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.axhline(target, color="#777777", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1.5)
    for place, arm in enumerate((base, *comparison.arms)):
        is_base = arm is base
        colour = colour_of(place)
        shifts = [0.0 if accounting == "sunk" else run.source_cost(unit) for run in arm.runs]
        if is_base:
            shifts = [0.0 if np.isnan(shift) else shift for shift in shifts]
        label, crossing = _label(arm, unit, accounting, is_base)
        if not np.isfinite(shifts).all():
            axes.plot([], [], color=colour, linewidth=1.6, linestyle=line_of(place), label=label)
            continue
        _lines(axes, arm, unit, scale, shifts, place)
        # An empty line makes the legend entry, with a marker only if the arm met the target.
        mark: dict[str, Any] = {"color": colour, "markerfacecolor": "white"}
        if crossing is not None:
            mark["marker"] = marker_of(place)
            shift = float(np.mean(shifts))
            read = np.array(cost_curve(comparison, arm, unit, loss_range(comparison)[1]))
            if len(read):
                look: dict[str, Any] = {"color": colour, "linewidth": 1.0, "linestyle": (0, (2, 1)), "alpha": 0.8}
                axes.plot((read[:, 0] + shift) / scale, read[:, 1], zorder=2.5, **look)
            axes.plot(
                [crossing / scale],
                [comparison.target(arm)],
                linestyle="none",
                markersize=6,
                markeredgewidth=1.4,
                zorder=4,
                clip_on=False,
                **mark,
            )
        axes.plot([], [], linewidth=1.6, linestyle=line_of(place), markersize=5, label=label, **mark)
    axes.set_xlim(left=0)
    axes.plot([], [], color="#777777", linewidth=0.9, linestyle=(0, (4, 3)), label=f"target, {target:.2f}")
    box: dict[str, Any] = {"edgecolor": "none", "handlelength": 1.8, "labelspacing": 0.35, "borderaxespad": 0.2}
    if _crowded(comparison):
        handles, labels = axes.get_legend_handles_labels()
        labels = [label.removesuffix(" speedup") for label in labels]  # two columns leave no room for the word
        below: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (-0.02, -0.2), "ncols": 2}
        axes.legend(handles, labels, title="speedup", columnspacing=0.8, fontsize=6, title_fontsize=6, **below, **box)
    else:
        axes.legend(loc="upper right", framealpha=0.85, **box)


def _crowded(comparison: Comparison) -> bool:
    return len(comparison.arms) > CROWD


def _lines(axes: Axes, arm: Arm, unit: Unit, scale: float, shifts: list[float], place: int) -> None:
    several = len(arm.runs) > 1
    look: dict[str, Any] = {"color": colour_of(place), "linestyle": line_of(place)}
    for run, shift in zip(arm.runs, shifts, strict=True):
        width, alpha = (0.7, 0.35) if several else (1.6, 1.0)
        axes.plot((run.evals[unit] + shift) / scale, run.evals["loss"], linewidth=width, alpha=alpha, **look)
    if several and all(np.array_equal(run.evals["step"], arm.runs[0].evals["step"]) for run in arm.runs):
        costs = np.mean([run.evals[unit] + shift for run, shift in zip(arm.runs, shifts, strict=True)], axis=0)
        axes.plot(costs / scale, np.mean([run.evals["loss"] for run in arm.runs], axis=0), linewidth=1.6, **look)


def plain(name: str) -> str:
    """Escape a name for matplotlib, which reads text between dollars as mathematics and hides labels that begin with _.

    Long names are cut, because they would leave no room for the curves.
    """
    name = name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def _label(arm: Arm, unit: Unit, accounting: Accounting, is_base: bool) -> tuple[str, float | None]:
    name = plain(arm.label)
    if is_base:
        return name, None
    estimate = arm.estimate(unit, accounting)
    if not np.isfinite(estimate.cost):
        return f"{name}, source unknown", None
    if estimate.censored:
        return f"{name}, not reached", None
    if estimate.upper_bound:
        return f"{name}, over {times(estimate.speedup)} speedup", estimate.cost
    return f"{name}, {times(estimate.speedup)} speedup", estimate.cost


def axis(comparison: Comparison, unit: Unit) -> tuple[float, str]:
    """Return the divisor of costs on an axis, and the label of the axis."""
    most = max(float(run.evals[unit][-1]) for arm in (comparison.baseline, *comparison.arms) for run in arm.runs)
    if unit == "seconds":
        return (3600.0, "training time (hours)") if most >= 7200 else (1.0, "training time (seconds)")
    if unit == "flops":
        exponent = int(np.floor(np.log10(max(most, 1.0))))
        return 10.0**exponent, f"training FLOPs ($10^{{{exponent}}}$)"
    scale, letter = next((s for s in SCALES if most >= s[0]), SCALES[-1])
    words = {"T": " (trillions)", "B": " (billions)", "M": " (millions)", "k": " (thousands)"}
    return scale, f"training tokens{words.get(letter, '')}"


def loss_range(comparison: Comparison) -> tuple[float, float]:
    """Return the range of losses in the figure."""
    arms = (comparison.baseline, *comparison.arms)
    runs = [run for arm in arms for run in arm.runs]
    finite = [run.evals["loss"][np.isfinite(run.evals["loss"])] for run in runs]
    low = min(float(losses.min()) for losses in finite if losses.size)
    early = max(_loss_after(run, ZOOM) for run in comparison.baseline.runs)
    high = max(early, low + 1e-3)
    # The legend is in the upper right. Leave room for it above the curves there, but not for a run that diverged.
    legend = 0.0 if _crowded(comparison) else 0.12 + 0.06 * len(arms)
    slow = min(max(_loss_after(run, 0.45) for run in runs), low + 2 * (high - low))
    high = max(high, low + (slow - low) / max(1 - legend, 0.4))
    return low - 0.07 * (high - low), high


def page_range(comparison: Comparison) -> tuple[float, float]:
    """Return the range of losses on the page, where legends take no room: all arms, and the end of the baseline."""
    low, high = loss_range(comparison)
    late = max(_loss_after(run, LATE) for run in comparison.baseline.runs)
    arms = max((_loss_after(run, ZOOM) for arm in comparison.arms for run in arm.runs), default=late)
    return low, min(high, max(late, arms) + 0.05 * (high - low))


def _loss_after(run: Run, share: float) -> float:
    """Return the highest finite held-out loss after this share of a run's steps; -inf if all are not finite."""
    steps, losses = run.evals["step"], run.evals["loss"]
    late = losses[np.isfinite(losses) & (steps >= share * steps[-1])]
    return float(late.max()) if late.size else -np.inf
