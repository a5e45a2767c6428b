"""The report as one HTML page: a verdict, charts, tables and provenance, without network access.

Names and settings come from records that somebody else may have written. All text is escaped, and the script writes
text only. A content security policy allows only the page's own script and style.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from importlib.resources import files

from phigrow.measure.cost_curves import cost_curve
from phigrow.measure.data import ages_data, as_json, curves_data, flat_data
from phigrow.measure.estimates import Arm, Comparison
from phigrow.measure.figures import loss_range, page_range
from phigrow.measure.provenance import all_runs, common_rows, difference_rows, run_rows, version_lines
from phigrow.measure.tables import (
    Rows,
    arm_rows,
    budget_rows,
    caption,
    cost_rows,
    frontier_rows,
    headline_rows,
    loss_rows,
)
from phigrow.measure.trends import WORDS
from phigrow.measure.wording import (
    NAMES,
    all_notes,
    best_first,
    frontier_sentences,
    grouped_findings,
    interval_sentence,
    mid_schedule_sentences,
    recorded_units,
    settings_sentences,
    verdict,
)

FIRST = 5
"""Number of arms whose findings are open at first. The page draws as many curves at first."""


def page(comparison: Comparison, definitions: str) -> str:
    """Return the page.

    Args:
        comparison: from ``compare``.
        definitions: sentences that define the measured quantities, with Markdown's bold.

    >>> Path("report.html").write_text(page(compare(load_runs("runs")), ""))  # doctest: +SKIP
    """
    base = comparison.baseline.name
    arms = (comparison.baseline, *comparison.arms)
    _, high = loss_range(comparison)
    data = as_json(comparison)
    for arm in data["arms"]:
        del arm["notes"]
    shown = {key: data[key] for key in ("baseline", "arms")}
    shown |= {
        "target": comparison.target(),
        "range": list(page_range(comparison)),
        "words": WORDS,
        "curves": curves_data(comparison),
    }
    shown |= {"flat": flat_data(comparison), "ages": ages_data(comparison)}
    shown["mid_schedule"] = " ".join(mid_schedule_sentences(comparison)[:2])
    shown["intervals"] = interval_sentence(comparison)
    shown["budget_intervals"] = interval_sentence(comparison, at_budgets=True)
    shown["targets"] = [comparison.target(arm) for arm in arms]
    shown |= {"fits": [_fits(comparison, arm, high) for arm in arms], "units": recorded_units(comparison)}
    shown["order"] = [arms.index(arm) for arm in (comparison.baseline, *best_first(comparison))]
    notes = all_notes(comparison)
    style, script = (_asset(f"report.{ending}") for ending in ("css", "js"))
    slots = {
        "policy": f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:",
        "style": style,
        "script": script,
        "data": _embedded(shown),
        "title": html.escape(f"Growth against {base}"),
        "verdict": html.escape(verdict(comparison)),
        "summary": html.escape(_summary(comparison)),
        "findings": _findings(comparison) or "<p>There is nothing to compare.</p>",
        "headline": _table(headline_rows(comparison, best_first(comparison))),
        "definitions": _sentences(definitions),
        "arms": _table(arm_rows(comparison), wrap=True),
        "losses": _table(loss_rows(comparison)),
        "costs": "".join(
            f"<details{'' if place else ' open'}><summary>In {NAMES[unit]}</summary>"
            f"{_sentences(caption(comparison, unit))}{_table(cost_rows(comparison, unit))}</details>"
            for place, unit in enumerate(recorded_units(comparison))
        ),
        "budgets": _table(budget_rows(comparison, "tokens")),
        "frontier": _sentences(" ".join(frontier_sentences(comparison))) + _table(frontier_rows(comparison)),
        "notes": _section("Notes", _list(notes)) if notes else "",
        "runs": _table(run_rows(comparison)) + _list(version_lines(comparison)),
        "settings": _table(common_rows(comparison), wrap=True) or "<p>No settings were recorded.</p>",
        "differences": _table(difference_rows(comparison), wrap=True) or "<p>None.</p>",
        "records": "".join(
            _record(run.name + (f", {run.budget} steps" if run.budget else ""), run.meta)
            for run in all_runs(comparison)
        ),
    }
    # In one pass, so that the content of a slot is never taken for another slot.
    return re.sub(r"\{\{(\w+)\}\}", lambda matched: slots[matched[1]], _asset("report.html"))


def tables(comparison: Comparison) -> str:
    """Return speedups and losses as HTML tables, escaped, for a notebook."""
    matched = [
        (" ".join([_summary(comparison), *settings_sentences(comparison)]), headline_rows(comparison)),
        ("Held-out loss, nats per token", loss_rows(comparison)),
    ]
    return "".join(f"<p>{html.escape(words)}</p>{_table(rows)}" for words, rows in matched if rows) + _list(
        all_notes(comparison)
    )


def _fits(comparison: Comparison, arm: Arm, highest: float) -> dict[str, list[list[float]]]:
    """Return the curves that costs were read off, by unit, in six figures."""
    return {
        unit: [[float(f"{number:.6g}") for number in point] for point in cost_curve(comparison, arm, unit, highest)]
        for unit in recorded_units(comparison)
    }


def _findings(comparison: Comparison) -> str:
    """Return the findings of the best arms as lists, and those of the others in a closed section."""
    items = [f"<li>{html.escape(first)}{_list(others)}</li>" for first, *others in grouped_findings(comparison)]
    first, more = items[:FIRST], items[FIRST:]
    shown = f'<ul class="findings">{"".join(first)}</ul>' if first else ""
    if not more:
        return shown
    title = f"{len(more)} more {'arm' if len(more) == 1 else 'arms'}"
    return f'{shown}<details><summary>{title}</summary><ul class="findings">{"".join(more)}</ul></details>'


def _sentences(text: str) -> str:
    """Return a paragraph with Markdown's bold as a list with one sentence in each item."""
    escaped = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html.escape(text))
    parts = re.split(r"(?<=\.) +(?=[A-Z<])", escaped)
    return f'<ul class="small">{"".join(f"<li>{part}</li>" for part in parts)}</ul>' if text else ""


def _asset(name: str) -> str:
    return (files("phigrow.measure") / "assets" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embedded(data: object) -> str:
    """Return JSON without the characters ``<``, ``>`` and ``&``, which could end its script element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _summary(comparison: Comparison) -> str:
    arms, seeds = len(comparison.arms), len(comparison.baseline.seeds)
    several = len({point.budget for arm in comparison.arms for point in arm.budgets if point.basis == "ends"})
    parts = [f"{arms} {'arm' if arms == 1 else 'arms'} against {comparison.baseline.name}"]
    parts.append(f"{seeds} {'seed' if seeds == 1 else 'seeds'}")
    if several > 1:
        parts.append(f"{several} budgets")
    return ", ".join(parts) + f". Target: a held-out loss of {comparison.target():.3f} nats per token."


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def _list(lines: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _table(rows: Rows, *, wrap: bool = False) -> str:
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in rows[0])
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{html.escape(cell)}</th>'
            if place == 0
            else f'<td data-head="{html.escape(name)}">{_value(cell)}</td>'
            for place, (name, cell) in enumerate(row.items())
        )
        + "</tr>"
        for row in rows
    )
    kind = ' class="wrap"' if wrap else ""
    table = f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _value(cell: str) -> str:
    """Return a cell as HTML; an interval at its end gets a line of its own."""
    return re.sub(r" (\[[^\[\]]*\])$", r" <small>\1</small>", html.escape(cell))


def _record(name: str, meta: object) -> str:
    text = json.dumps(meta, indent=1, ensure_ascii=False)
    return f"<details><summary>{html.escape(name)}</summary><pre>{html.escape(text)}</pre></details>"
