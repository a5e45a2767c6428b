"""Results of evaluations as a table: one row for each task and metric, one column for each checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from phigrow.measure.tables import Rows
from phigrow.records.evaluations import Evaluation, difference

ERRORS = "± is the standard error over documents."
PAIRED = (
    "A difference is that of its checkpoint from the first one, with the standard error of the differences of single "
    "documents."
)
UNPAIRED = "A difference without ± is of other documents or settings, and has no paired error."


def evaluation_rows(evaluations: Sequence[Evaluation]) -> Rows:
    """Return the table of several checkpoints; the first one is the reference of the differences.

    Args:
        evaluations: one for each checkpoint and task.
    """
    names = list(dict.fromkeys(each.name for each in evaluations))
    table: dict[tuple[str, str], dict[str, Evaluation]] = {}
    for each in evaluations:
        for metric in each.metrics:
            table.setdefault((each.task, metric), {})[each.name] = each
    rows = []
    for (task, metric), by_name in table.items():
        row = {"task": task, "metric": metric}
        for place, name in enumerate(names):
            found = by_name.get(name)
            row[name] = "" if found is None else _number(found.metrics[metric].value, found.metrics[metric].stderr)
            if place:
                first = by_name.get(names[0])
                gap = None if found is None or first is None else difference(found, first, metric)
                row[f"{name} - {names[0]}"] = "" if gap is None else _number(gap.value, gap.stderr, sign="+")
        rows.append(row)
    return rows


def _number(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")
