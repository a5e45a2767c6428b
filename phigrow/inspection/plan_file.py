"""Read a plan back, from `phigrow plan --json`, a grown folder or its ``phigrow.json``, and say where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.files.untrusted import read_json_strict
from phigrow.growth.origins import named
from phigrow.growth.plan import Plan
from phigrow.inspection.tallies import by_line, totals


@dataclass(frozen=True)
class PlanFile:
    """A plan that was read, and what was written beside it.

    Attributes:
        path: the file.
        plan: the plan; its hash is the one in the file, where the file has one.
        record: the rest of ``phigrow.json`` (source, command, versions); None for a plan alone.
    """

    path: Path
    plan: Plan
    record: dict[str, Any] | None


def read_plan_file(path: str | Path) -> PlanFile:
    """Read a plan and hold its hash against its content.

    Args:
        path: a grown folder, a ``phigrow.json``, or a file that holds what ``phigrow plan --json`` printed.

    Raises:
        GrowthError: nothing there, a file that is no plan, or a plan that was altered.

    >>> read_plan_file("phi-1_5-to-phi2-tile").plan.method  # doctest: +SKIP
    'tile'
    """
    path = Path(path)
    file = path / "phigrow.json" if path.is_dir() else path
    if not file.is_file():
        raise GrowthError(
            f"no plan {str(path)!r}",
            where=str(file.absolute()),
            why="the folder has no phigrow.json" if path.is_dir() else "there is no such file or folder",
            fix="give a folder that phigrow expand wrote, its phigrow.json, or a file of phigrow plan --json",
        )
    data = read_json_strict(file, "a plan")
    try:
        record = data if "plan" in data else None
        content = data["plan"] if record else data
        plan = Plan.from_json(content, file.parent)
        said = content.get("hash")
    except GrowthError as error:
        raise error.at(str(file)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GrowthError("a file that is no plan", where=str(file), why=repr(error)) from error
    if said is not None and said != plan.hash:
        raise GrowthError(
            "a plan that was altered",
            where=str(file),
            why=f"its hash is not that of its content, {plan.hash[:16]}",
            fix="make it again with phigrow plan --json or phigrow expand",
        )
    return PlanFile(file, plan, record)


def origin(read: PlanFile) -> list[tuple[str, str]]:
    """(what, value) of where a grown folder came from; of a plan alone, what the plan says.

    Raises:
        GrowthError: a record in which something is not what phigrow writes there.
    """
    plan, record = read.plan, read.record
    old, new = plan.cost()
    try:
        facts = [] if record is None else _recorded(record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise GrowthError("a record that phigrow did not write", where=str(read.path), why=repr(error)) from error
    return [
        # A stranger may have written the record: nothing in it may steer the terminal.
        *((what, "".join(c if c.isprintable() else "?" for c in value)) for what, value in facts),
        ("plan", f"{plan.hash} (checked against its content)"),
        ("method", ", ".join([plan.method, *(f"{key} {value}" for key, value in plan.options.items())])),
        ("seed", str(plan.seed) + (f", noise {plan.noise:g}" if plan.noise else "")),
        ("parameters", f"{old.parameters:,} -> {new.parameters:,} ({new.parameters / old.parameters:.2f}x)"),
        ("layers", _layers(plan)),
    ]


def _recorded(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    source = record.get("source", {})
    training = source.get("training")
    return [
        ("source", f"{source.get('name')}, revision {source.get('revision') or 'not named'}"),
        *(("file", f"{name}, {file['bytes']:,} bytes, sha256 {file['sha256']}") for name, file in _files(source)),
        ("trained", ", ".join(f"{k} {_figure(v)}" for k, v in training.items()) if training else "at unknown cost"),
        ("command", str(record.get("command"))),
        ("dtype", str(record.get("dtype"))),
        ("seconds", str(record.get("seconds"))),
        ("versions", ", ".join(f"{name} {found}" for name, found in record.get("versions", {}).items())),
    ]


def _files(source: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return list(source.get("files", {}).items())


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _layers(plan: Plan) -> str:
    identity = len(plan.identity_layers)
    repeated = len(plan.layers) - len(set(plan.layers)) - identity
    said = "".join(f", {count} {word}" for count, word in ((repeated, "repeated"), (identity, "identity")) if count)
    return f"{plan.src_sizes['layer']} -> {len(plan.layers)} by {plan.depth}{said}"


def inspection_json(read: PlanFile) -> dict[str, Any]:
    """What `phigrow inspect` says, as JSON: the record without the plan's maps, and counts of values."""
    lines = by_line(read.plan)
    old, new = read.plan.cost()
    return {
        **{key: value for key, value in (read.record or {}).items() if key != "plan"},
        "plan": {
            "hash": read.plan.hash,
            "method": read.plan.method,
            "options": read.plan.options,
            "depth": read.plan.depth,
            "seed": read.plan.seed,
            "noise": read.plan.noise,
            "exact": read.plan.exact,
            "approximations": list(read.plan.approximations),
        },
        "parameters": {"source": old.parameters, "destination": new.parameters},
        "values": {line: named(counts) for line, counts in lines.items()},
        "all": named(totals(lines)),
    }
