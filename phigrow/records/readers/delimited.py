"""Read tables of text: plain CSV, and the CSV export of a chart of Weights & Biases."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

from phigrow.errors import GrowthError
from phigrow.records.readers.log_table import LogTable, chosen_run, no_run, several_runs

DELIMITERS = (",", ";", "\t")
MISSING = ("", "null", "none", "na", "n/a", "-")
WORDS = {"nan": math.nan, "inf": math.inf, "+inf": math.inf, "-inf": -math.inf, "infinity": math.inf}
BOUND = re.compile(r"__(MIN|MAX)$")
"""End of the columns that W&B adds to a chart for the range of grouped or sampled values."""

CHART_STEPS = ("Step", "_step")
"""Columns of W&B that count calls of its logger, which are not updates in general."""

_DIGITS, _EXPONENT = r"[-+]?\d+", r"(?:[eE][-+]?\d+)?"
_GROUPS = r"[-+]?\d{1,3}(?:%s\d{3})+"
_COMMA = re.compile(rf"{_DIGITS},\d+{_EXPONENT}|{_GROUPS % r'[.]'},\d+")
_COMMA_GROUPS, _DOT_GROUPS = re.compile(_GROUPS % ","), re.compile(_GROUPS % r"[.]")
_SURELY_DECIMAL = re.compile(
    rf"[-+]?(?:0|\d{{4,}}),\d+{_EXPONENT}|{_DIGITS},(?!\d{{3}}$)\d+{_EXPONENT}|[-+\d.]+\.\d{{3}},\d+"
)
_SURELY_GROUPS = re.compile(r"[-+]?\d{1,3}(?:,\d{3}){2,}(?:\.\d+)?|[-+]?\d{1,3}(?:,\d{3})+\.\d+")


def read_delimited(path: Path, run: str | None = None, decimal: str | None = None) -> LogTable:
    """Read a CSV file with a header.

    The separator is a comma, a semicolon or a tab. Decimal commas are recognised where they cannot be separators of
    thousands. An empty cell is a missing value. In the export of a W&B chart, columns are called ``RUN - METRIC``: the
    columns of one run are read, without their ``__MIN`` and ``__MAX``.

    Args:
        path: of the file.
        run: the run to read, where the file has several.
        decimal: ``.`` or ``,``, where numbers could be read in two ways.

    Raises:
        GrowthError: the file cannot be read, has no header or no rows; a row has another number of cells; the file has
            several runs, or numbers that can be read in two ways.
    """
    lines = _lines(path)
    header, rows = lines[0][1], lines[1:]
    if not rows or all(_is_number(cell) for cell in header):
        raise GrowthError(
            "the table has no rows" if not rows else "the table has no header",
            where=str(path),
            why=f"its first line is {', '.join(header)[:200]}",
            fix="write the names of the columns into the first line, and the numbers below them",
        )
    for number, cells in rows:
        if len(cells) != len(header):
            raise GrowthError(
                f"the row has {len(cells)} cells, and the header has {len(header)}",
                where=f"{path}, line {number}",
                why="a decimal comma without quotes splits a number in two",
                fix="export the table with a semicolon between cells, or with decimal points",
            )
    names, chart = _chart_columns(header, run, path)
    kept = [{names[k]: cells[k].strip() for k in names} for _, cells in rows]
    texts = kept if chart else chosen_run(kept, run, path)
    mark = decimal or _decimal_mark([cell for row in texts for cell in row.values()], path)
    numbers = [
        {name: value for name, cell in row.items() if (value := _number(str(cell), mark)) is not None} for row in texts
    ]
    own = tuple(name for name in CHART_STEPS if name in names.values()) if chart else ()
    return LogTable(path, "chart of W&B" if chart else "CSV", tuple(numbers), empty_is_nan=True, own_steps=own)


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """Return the lines that are not empty as cells, each with its number."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise GrowthError(
            "the table cannot be read", where=str(path), why=str(error), fix="save it as UTF-8 text"
        ) from error
    first = next((line for line in text.splitlines() if line.strip()), "")
    # Names of columns may hold a comma; the separator is then the one that every line has.
    delimiter = max(DELIMITERS, key=lambda mark: (first.count(mark) > 0, mark != ",", first.count(mark)))
    reader = csv.reader(text.splitlines(), delimiter=delimiter)
    try:
        lines = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise GrowthError("the table cannot be read", where=str(path), why=str(error), fix="export it again") from error
    if not lines:
        raise GrowthError("the table is empty", where=str(path), fix="export it again")
    return [(number, [cell.strip() for cell in cells]) for number, cells in lines]


def _chart_columns(header: list[str], run: str | None, path: Path) -> tuple[dict[int, str], bool]:
    """Return place -> name of the columns to read, and true for a chart of W&B.

    >>> _chart_columns(["Step", "mine - eval/loss", "mine - eval/loss__MIN"], None, Path("chart.csv"))
    ({0: 'Step', 1: 'eval/loss'}, True)
    """
    parts = {k: name.rpartition(" - ") for k, name in enumerate(header) if " - " in name}
    runs = list(dict.fromkeys(each[0] for each in parts.values()))
    if not runs:
        return dict(enumerate(header)), False
    if run is None and len(runs) > 1:
        raise several_runs(runs, path)
    if run is not None and run not in runs:
        raise no_run(run, runs, path)
    wanted = runs[0] if run is None else run
    names = {k: name for k, name in enumerate(header) if k not in parts}
    names |= {
        k: metric
        for k, (owner, _, metric) in parts.items()
        if owner == wanted and not BOUND.search(metric) and metric not in names.values()
    }
    return dict(sorted(names.items())), True


def _decimal_mark(cells: list[str], path: Path) -> str:
    commas = [cell for cell in cells if _COMMA.fullmatch(cell) or _COMMA_GROUPS.fullmatch(cell)]
    decimals = [cell for cell in commas if _SURELY_DECIMAL.fullmatch(cell)]
    groups = [cell for cell in cells if _SURELY_GROUPS.fullmatch(cell)]
    if (commas and not decimals and not groups) or (decimals and groups):
        cell = (decimals or commas)[0]
        raise GrowthError(
            f"the number {cell} can be read in two ways",
            where=str(path),
            why="the comma may be a decimal comma, or separate thousands",
            fix="set decimal: ',' or decimal: '.' in the YAML file",
        )
    return "," if decimals else "."


def _number(text: str, mark: str) -> float | None:
    """Return a number, or None if a cell is empty or holds a word.

    >>> _number("1.234,5", ","), _number("1,234.5", "."), _number("nan", "."), _number("", ".")
    (1234.5, 1234.5, nan, None)
    """
    if text.lower() in MISSING:
        return None
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    whole, _, part = text.partition(mark)
    if (_DOT_GROUPS if mark == "," else _COMMA_GROUPS).fullmatch(whole):
        whole = whole.replace("." if mark == "," else ",", "")
    if "." in whole or "," in whole or "," in part or "_" in text:
        return None
    try:
        return float(f"{whole}.{part}" if part else whole)
    except ValueError:
        return None


def _is_number(text: str) -> bool:
    return _number(text, ".") is not None
