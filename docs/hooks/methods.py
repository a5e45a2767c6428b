"""One page for each growth method: its summary, docstring, options, claims and measured cost."""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import phigrow
from phigrow.errors import GrowthError
from phigrow.growth.method import Method
from phigrow.growth.methods import depth
from phigrow.growth.registry import all_methods
from phigrow.models.families import all_families

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
REFUSED = "refused"

SOURCE = {"vocab": 256, "hidden": 64, "kv": 4, "group": 1, "q": 16, "rotary": 16, "mlp": 192, "layer": 3}
"""Sizes of a small model on which the plan of each method is made, the one of ``benchmarks/methods.py``."""

GROWTHS = {
    "twice the width": {"hidden": 128, "kv": 8, "mlp": 384},
    "uneven width": {"hidden": 96, "kv": 6, "mlp": 250},
    "larger heads": {"hidden": 96, "q": 24},
    "more layers": {"layer": 5},
}


def pages() -> dict[str, str]:
    """Path -> Markdown, of the table of all methods, of each width method, and of the depth methods."""
    rows = _measured()
    out = {"methods/index.md": _index(rows), "methods/depth.md": _depth(rows)}
    for method in all_methods().values():
        out[f"methods/{method.name}.md"] = _width(method, rows)
    return out


def _measured() -> list[dict[str, Any]]:
    """Rows of the newest measurement of ``benchmarks/methods.py``."""
    files = sorted(RESULTS.glob("*-methods-*.json"))
    if not files:
        raise SystemExit(f"{RESULTS} has no *-methods-*.json: run benchmarks/methods.py")
    rows: list[dict[str, Any]] = json.loads(files[-1].read_text(encoding="utf-8"))["rows"]
    return rows


def _index(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Methods",
        "",
        "A *width method* decides where the values of a larger axis come from. A *depth method* decides which source "
        "layer each destination layer starts from. `wr` is the default: it saved most in [our studies](../findings.md) "
        "of the methods that take every growth. `lossless` computes the same function as the source, at any sizes.",
        "",
        "A method can carry its options (`--method tile:scale=preserve`). Each axis can have its own method: "
        "`--method lossless,mlp=tile` grows the mlp by `tile` and everything else by `lossless`. The parts are "
        "`hidden`, `head`, `heads`, `mlp` and `vocab`.",
        "",
        "| width method | in short | at twice the width | at uneven width |",
        "|---|---|---|---|",
    ]
    for method in all_methods().values():
        cells = [_span(rows, method.name, sizes) for sizes in ("2x width", "uneven")]
        lines.append(f"| [`{method.name}`]({method.name}.md) | {method.summary} | {' | '.join(cells)} |")
    lines += ["", "| depth method | from 3 to 5 layers |", "|---|---|"]
    lines += [f"| [`{name}`](depth.md) | {_span(rows, name, 'depth')} |" for name in depth.DEPTHS]
    return "\n".join([*lines, "", _ABOUT_COST, ""])


_ABOUT_COST = (
    "**exact** means that the grown model computes the same function as its source, to rounding. Elsewhere the table "
    "gives the held-out loss of the grown model above its source's, before any training, in nats a byte: lowest to "
    "highest of small trained models of the four families (`benchmarks/methods.py`). A low start says little about how "
    "well a grown model then learns."
)


def _width(method: Method, rows: list[dict[str, Any]]) -> str:
    module = sys.modules[method.axis_maps.__module__]
    summary, text = _docstring(module)
    summary = summary.removeprefix(f"{method.name}: ")
    summary = summary[0].upper() + summary[1:]
    learned = f"{method.name}, learned"
    names = [row["method"] for row in rows if row["method"].split(":")[0] in (method.name, learned)]
    parts = [
        f"# {method.name}",
        summary,
        "```sh\nphigrow expand --src phi-1_5 --dst-config phi2.json "
        f"--method {method.name}{' --maps maps' if method.learns else ''}\n```",
        "## How it works",
        text,
        "## Options",
        _options(method),
        "## What a plan claims",
        _claims(method),
        "## Cost at the start",
        _cost(rows, list(dict.fromkeys(names)), ("2x width", "uneven")),
    ]
    return "\n\n".join(parts) + "\n"


def _depth(rows: list[dict[str, Any]]) -> str:
    summary, text = _docstring(depth)
    example = "```sh\nphigrow expand --src phi-1_5 --dst-config phi2.json --depth stack\n```"
    cost = _cost(rows, list(depth.DEPTHS), ("depth",))
    return "\n\n".join(["# Depth methods", summary, example, text, "## Cost at the start", cost]) + "\n"


def _docstring(module: Any) -> tuple[str, str]:
    """The first line of a module's docstring, and the rest, as Markdown."""
    summary, _, rest = inspect.cleandoc(module.__doc__).partition("\n\n")
    text = re.sub(r"``([^`]+)``", r"`\1`", rest)
    text = re.sub(r"\b(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", text)
    return summary.replace("\n", " "), re.sub(r"(?<=[^\n])\n(?=(?:[-*] |1\. ))", "\n\n", text)


def _options(method: Method) -> str:
    lines = [
        f"| `{name}` | {option.allowed} | `{option.spell(option.default)}` | {option.help} |"
        for name, option in method.options.items()
    ]
    if method.takes_noise:
        lines.append("| `--noise` | a number, 0 or more | `0` | symmetry-breaking noise that copies cancel |")
    own = f"The default depth method is [`{method.depth}`](depth.md)."
    if not lines:
        return f"None. {own}"
    return "\n".join(["| option | values | default | meaning |", "|---|---|---|---|", *lines, "", own])


def _claims(method: Method) -> str:
    """The claim of a plan of each growth in each family, made now; the contract tests hold each claim."""
    families = all_families()
    lines = [f"| growth | {' | '.join(families)} |", "|---|" + "---|" * len(families)]
    reasons: dict[str, None] = {}
    for growth, sizes in GROWTHS.items():
        cells = []
        for family in families.values():
            old, new = (family.config_of({**SOURCE, **more}) for more in ({}, sizes))
            try:
                plan = phigrow.plan(old, new, method.name)
            except GrowthError as error:
                cells.append(REFUSED)
                reasons[str(error).splitlines()[0]] = None
                continue
            cells.append("exact" if plan.exact else "approximate")
            reasons |= dict.fromkeys(plan.approximations)
        lines.append(f"| {growth} | {' | '.join(cells)} |")
    text = "\n".join(lines)
    if reasons:
        text += "\n\nReasons that plans give:\n\n" + "\n".join(f"- {reason}" for reason in reasons)
    return text


def _cost(rows: list[dict[str, Any]], names: list[str], growths: tuple[str, ...]) -> str:
    families = list(dict.fromkeys(row["family"] for row in rows))
    lines = [f"| method | growth | {' | '.join(families)} |", "|---|---|" + "--:|" * len(families)]
    for name in names:
        for growth in growths:
            cells = [_cell(row) for row in rows if (row["depth"] or row["method"], row["sizes"]) == (name, growth)]
            cells = cells or ["not measured"] * len(families)
            lines.append(f"| `{name}` | {growth} | {' | '.join(cells)} |")
    about = (
        "Held-out loss of the grown model above its source's, before any training, in nats a byte, for small trained "
        "models. Where the growth is exact: the largest difference of any logit in float64."
    )
    return f"{about}\n\n" + "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    if REFUSED in row:
        return REFUSED
    return f"exact, {row['max_abs_dlogit']:.0e}" if row["exact"] else f"{row['loss_above_source']:+.3f}"


def _span(rows: list[dict[str, Any]], name: str, growth: str) -> str:
    """The cost of a method over the families, in one cell."""
    found = [row for row in rows if (row["depth"] or row["method"], row["sizes"]) == (name, growth)]
    if any(REFUSED in row for row in found):
        return REFUSED
    if not found:
        return "not measured"
    losses = [row["loss_above_source"] for row in found if not row["exact"]]
    if not losses:
        return "exact"
    span = f"{min(losses):+.3f} to {max(losses):+.3f}" if max(map(abs, losses)) >= 0.0005 else "less than 0.001"
    return span if len(losses) == len(found) else f"exact in some families, else {span}"
