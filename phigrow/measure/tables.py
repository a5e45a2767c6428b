"""A comparison as tables: pandas for further work, Markdown for a report, rich for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from phigrow.measure.estimates import (
    ACCOUNTINGS,
    Accounting,
    Arm,
    Basis,
    BudgetPoint,
    Comparison,
    Estimate,
    FrontierSaving,
)
from phigrow.measure.wording import (
    NAMES,
    amount,
    best_first,
    cost_text,
    frontier_sentences,
    frontier_text,
    is_grown,
    names_of,
    recorded_units,
    remarks,
    saving_text,
    speedup_text,
)
from phigrow.records.run import Run
from phigrow.records.schema import UNITS, Unit

if TYPE_CHECKING:
    import pandas
    from rich.table import Table

Rows = list[dict[str, str]]

BASES: dict[Basis, str] = {"curve": "mid-schedule curves", "constant": "constant-rate curves", "ends": "decayed ends"}

CELLS: tuple[tuple[str, Callable[[Estimate], str]], ...] = (
    ("cost", cost_text),
    ("speedup", speedup_text),
    ("saving", saving_text),
)


def frame(comparison: Comparison) -> pandas.DataFrame:
    """Return all numbers, one row for each arm, the baseline first; nan where a number is missing.

    For every unit and accounting there are ``cost, tokens, sunk`` (tokens, FLOPs or seconds), ``speedup, tokens,
    sunk`` (a ratio) with the ``low`` and ``high`` ends of its interval, and the same for ``saving`` (a fraction).
    Where ``censored`` is true, costs are lower bounds, and speedups and savings are upper bounds.

    >>> frame(compare(load_runs("runs")))["speedup, tokens, sunk"]["wr"]  # doctest: +SKIP
    4.17
    """
    import pandas

    rows = []
    for arm in (comparison.baseline, *comparison.arms):
        row: dict[str, Any] = {
            "arm": arm.name,
            "seeds": len(arm.seeds),
            "parameters": parameters(arm),
            **{f"held-out loss, step {step}": loss for step, loss in arm.loss_at.items()},
            "held-out loss, final": arm.final_loss,
            "censored": bool(arm.censored_seeds),
            **({"learning rate at edge": arm.lr_edge} if arm.lr_edge else {}),
        }
        for estimate in arm.estimates:
            label = f"{NAMES[estimate.unit]}, {estimate.accounting}"
            row[f"cost, {label}"] = estimate.cost
            row[f"speedup, {label}"] = estimate.speedup
            row[f"saving, {label}"] = estimate.saving
            for name, interval in (("speedup", estimate.speedup_interval), ("saving", estimate.saving_interval)):
                row[f"{name}, {label}, low"], row[f"{name}, {label}, high"] = interval or (float("nan"),) * 2
        rows.append(row)
    table = pandas.DataFrame(rows).set_index("arm")
    losses = [name for name in table.columns if name.startswith("held-out loss, step")]
    losses.sort(key=lambda name: int(name.split()[-1]))
    first = ["seeds", "parameters", *losses, "held-out loss, final", "censored"]
    return table[first + [name for name in table.columns if name not in first]]


def parameters(arm: Arm) -> int | None:
    """Return the number of parameters of an arm; None if its records have none, or differ."""
    counts = {run.meta.get("parameters") for run in arm.runs}
    count = counts.pop() if len(counts) == 1 else None
    return count if isinstance(count, int) else None


def loss_rows(comparison: Comparison) -> Rows:
    """Return one row for each arm: seeds, parameters, and held-out loss at the first steps and at the end, as text."""
    arms = (comparison.baseline, *comparison.arms)
    steps = sorted({step for arm in arms for step in arm.loss_at})
    rows = []
    for arm in arms:
        count = parameters(arm)
        row = {
            "arm": arm.label,
            "seeds": str(len(arm.seeds)),
            "parameters": "unknown" if count is None else f"{count:,}",
        }
        row |= {f"loss, step {step}": f"{arm.loss_at[step]:.3f}" if step in arm.loss_at else "" for step in steps}
        rows.append(row | {"loss, final": f"{arm.final_loss:.3f}"})
    return rows


def cost_rows(comparison: Comparison, unit: Unit) -> Rows:
    """Return one row for each arm: cost, speedup and saving in one unit, sunk and charged, as text with intervals."""
    base = comparison.baseline
    rows: Rows = []
    for arm in comparison.arms:
        row = {"arm": arm.label}
        for accounting in ACCOUNTINGS:
            estimate = arm.estimate(unit, accounting)
            row |= {f"{name}, {NAMES[unit]}, {accounting}": text(estimate) for name, text in CELLS}
        rows.append(row)
    return rows or [{"arm": f"(nothing to compare with {base.name})"}]


def caption(comparison: Comparison, unit: Unit) -> str:
    """Return the caption of a table of costs: the target, the intervals, the meaning of its signs."""
    curve = " on its fitted curve" if any(arm.basis == "ends" for arm in comparison.arms) else ""
    unit_name = NAMES[unit][0].upper() + NAMES[unit][1:]
    head = (
        f"{unit_name} until the held-out loss is {comparison.target():.3f}, "
        f"{comparison.baseline.name}'s final loss{curve}."
    )
    return " ".join([head, *interval_sentences(comparison), *remarks(comparison)])


def interval_sentences(comparison: Comparison) -> list[str]:
    """Return a sentence on the intervals for every group of arms that share it."""
    notes: dict[str, list[str]] = {}
    for arm in comparison.arms:
        notes.setdefault(arm.interval_note, []).append(arm.name)
    return [f"{names_of(names, comparison)}: {note.replace(': ', ', ')}." for note, names in notes.items()]


def headline_rows(comparison: Comparison, arms: Sequence[Arm] | None = None) -> Rows:
    """Return one row for each arm: the speedup in every unit and accounting, as text with intervals."""
    return [
        {"arm": arm.label}
        | {
            f"{NAMES[unit]}, {accounting}": speedup_text(arm.estimate(unit, accounting))
            for unit in UNITS
            for accounting in ACCOUNTINGS
        }
        for arm in (comparison.arms if arms is None else arms)
    ]


def start_in_words(arm: Arm) -> str:
    """Describe the start of an arm's runs in words, from their records."""
    run = arm.runs[0]
    teacher = run.meta.get("teacher")
    taught = f"; taught by {teacher['name']} in {teacher['steps']:,} steps" if isinstance(teacher, dict) else ""
    return _start_in_words(run) + taught


def _start_in_words(run: Run) -> str:
    growth = run.meta.get("growth")
    if isinstance(growth, dict) and growth.get("method"):
        method = str(growth["method"])
        if growth.get("stages"):
            return f"trained in stages, grown by {method.replace('+', ', ')}"
        return str(growth.get("summary") or f"grown by {method}")  # older records have no summary
    config = run.meta.get("config")
    init = config.get("init", "scratch") if isinstance(config, dict) else "scratch"
    return "random weights" if init == "scratch" else "the weights of a trained model"


def arm_rows(comparison: Comparison) -> Rows:
    """Return one row for each arm: its start, the method of its new layers, and settings unlike the baseline's."""
    base = comparison.baseline
    rows = []
    for arm in (base, *best_first(comparison)):
        growth = arm.runs[0].meta.get("growth")
        depth = growth.get("depth") if isinstance(growth, dict) else None
        method = depth.get("method") if isinstance(depth, dict) else depth
        rows.append(
            {
                "arm": arm.label,
                "starts from": start_in_words(arm),
                "new layers": str(method or "none"),
                "other settings": ", ".join(arm.settings) or "none",
            }
        )
    return rows


def frontier_rows(comparison: Comparison) -> Rows:
    """Return one row for each arm: its loss, its FLOPs, those of the flat frontier at this loss, and both savings."""
    rows: Rows = []
    for arm in comparison.arms:
        if not arm.frontier:
            continue
        sunk, charged = arm.frontier
        rows.append(
            {
                "arm": arm.label,
                "loss at its end": f"{sunk.loss:.3f}",
                "FLOPs, sunk": amount(sunk.cost, "flops"),
                "FLOPs, charged": amount(charged.cost, "flops"),
                "FLOPs of the best flat model": f"{_bound(sunk)}{amount(sunk.flat_cost, 'flops')}",
                "frontier saving, sunk": frontier_text(sunk),
                "frontier saving, charged": frontier_text(charged),
            }
        )
    return rows


def _bound(saving: FrontierSaving) -> str:
    return {"at least": "> ", "at most": "< "}.get(saving.bound, "")


def budget_text(arm: Arm, point: BudgetPoint, unit: Unit, accounting: Accounting) -> str:
    """Return the speedup at a budget, or ``source is below`` if the source meets the target there."""
    if is_grown(arm) and arm.source_meets(point.target):
        return "source is below"
    return speedup_text(point.estimate(unit, accounting))


def budget_rows(comparison: Comparison, unit: Unit) -> Rows:
    """Return one row for each arm and budget: speedup in one unit, sunk and charged, as text with intervals."""
    return [
        {
            "arm": arm.label,
            f"{comparison.baseline.name}'s budget, tokens": amount(point.budget, "tokens"),
            f"{comparison.baseline.name}'s held-out loss": f"{point.target:.3f}",
            **{
                f"speedup, {NAMES[unit]}, {accounting}": budget_text(arm, point, unit, accounting)
                for accounting in ACCOUNTINGS
            },
            "costs read from": BASES[point.basis],
        }
        for arm in comparison.arms
        for point in arm.budgets
    ]


def markdown(comparison: Comparison) -> str:
    """Return the losses and, for tokens, FLOPs and seconds, the costs as GitHub Markdown tables."""
    parts = ["Held-out loss, nats per token.", markdown_table(loss_rows(comparison))]
    for unit in recorded_units(comparison):
        parts += [caption(comparison, unit), markdown_table(cost_rows(comparison, unit))]
    parts += frontier_sentences(comparison)
    if rows := frontier_rows(comparison):
        parts.append(markdown_table(rows))
    return "\n\n".join(parts) + "\n"


def markdown_table(rows: Rows) -> str:
    """Return rows as a Markdown table; the first column is left-aligned, the others right-aligned."""
    names = list(rows[0])
    lines = [names, [":--", *["--:"] * (len(names) - 1)], *([row[name] for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def terminal(comparison: Comparison, unit: Unit = "tokens") -> Table:
    """Return the costs in one unit as a rich table, to be printed with ``rich.print`` or a ``Console``."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    rows = cost_rows(comparison, unit)
    table = Table(
        caption=Text(caption(comparison, unit)), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left"
    )
    for name in rows[0]:
        # One word a line, so that the columns of both accountings fit into 80 characters.
        table.add_column(name.replace(", ", ",\n"), justify="left" if name == "arm" else "right", overflow="fold")
    for row in rows:
        # Text, not markup: an interval in square brackets would be read as a style and vanish.
        table.add_row(*(Text(cell.replace(" [", "\n[")) for cell in row.values()))
    return table
