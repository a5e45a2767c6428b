"""Read a plan from `phigrow plan --json`, a grown folder or its ``phigrow.json``, and describe its origin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phigrow.checkpoints.provenance import PROVENANCE_FILE, Provenance
from phigrow.errors import GrowthError
from phigrow.files.foreign import recognise
from phigrow.files.paths import user_path
from phigrow.files.untrusted import read_json_strict
from phigrow.growth.origins import named
from phigrow.growth.plan import Plan
from phigrow.inspection.tallies import by_line, totals


@dataclass(frozen=True)
class PlanFile:
    """A plan that was read, and its provenance.

    Attributes:
        path: the file.
        plan: the plan; its hash is the one in the file, where the file has one.
        provenance: the content of ``phigrow.json``; None for a plan alone.
    """

    path: Path
    plan: Plan
    provenance: Provenance | None


def read_plan_file(path: str | Path) -> PlanFile:
    """Read a plan, and check its hash against its content.

    Args:
        path: a grown folder, a ``phigrow.json``, or a file with the output of ``phigrow plan --json``.

    Raises:
        GrowthError: there is no such file, it is no plan, or the plan was altered.

    >>> read_plan_file("phi-1_5-to-phi2-tile").plan.method  # doctest: +SKIP
    'tile'
    """
    path = user_path(path)
    file = path / PROVENANCE_FILE if path.is_dir() else path
    if not file.is_file():
        foreign = recognise(path)
        raise GrowthError(
            f"there is no plan in {str(path)!r}",
            where=str(file.absolute()),
            why=f"it is {foreign.what}"
            if foreign
            else f"the folder has no {PROVENANCE_FILE}"
            if path.is_dir()
            else "there is no such file or folder",
            fix="give a folder that phigrow expand wrote, its phigrow.json, or a file of phigrow plan --json",
        )
    data = read_json_strict(file, "the plan", nan=True)
    provenance = Provenance.from_json(data, file) if "plan" in data else None
    content = provenance.plan if provenance else data
    try:
        plan = Plan.from_json(content, file.parent)
    except GrowthError as error:
        raise error.at(str(file)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GrowthError(
            "the file is not a plan",
            where=str(file),
            why=repr(error),
            fix="give a folder that phigrow expand wrote, its phigrow.json, or a file of phigrow plan --json",
        ) from error
    if content.get("hash", plan.hash if provenance is None else None) != plan.hash:
        raise GrowthError(
            "the plan was altered",
            where=str(file),
            why=f"its stored hash differs from the hash of its content, {plan.hash[:16]}",
            fix="make it again with phigrow plan --json or phigrow expand",
        )
    return PlanFile(file, plan, provenance)


def origin(read: PlanFile) -> list[tuple[str, str]]:
    """Return (label, value) rows about the origin of a grown folder; for a plan alone, those of the plan."""
    plan = read.plan
    old, new = plan.cost()
    rows = [] if read.provenance is None else _provenance_rows(read.provenance)
    return [
        # A stranger may have written the file, so control characters do not reach the terminal.
        *((label, "".join(c if c.isprintable() else "?" for c in value)) for label, value in rows),
        ("plan", f"{plan.hash} (checked against its content)"),
        ("method", ", ".join([plan.method, *(f"{key} {value}" for key, value in plan.options.items())])),
        *(
            ("method file", f"of {name}: {'none' if digest is None else f'sha256 {digest}'}")
            for name, digest in plan.method_files.items()
        ),
        ("seed", str(plan.seed) + (f", noise {plan.noise:g}" if plan.noise else "")),
        ("parameters", f"{old.parameters:,} -> {new.parameters:,} ({new.parameters / old.parameters:.2f}x)"),
        ("layers", _layers(plan)),
    ]


def _provenance_rows(made: Provenance) -> list[tuple[str, str]]:
    training, files = made.source_training, made.source_files.items()
    return [
        ("source", f"{made.source_name}, revision {made.source_revision or 'not named'}"),
        *(("file", f"{name}, {file['bytes']:,} bytes, sha256 {file['sha256']}") for name, file in files),
        ("trained", ", ".join(f"{k} {_spelled(v)}" for k, v in training.items()) if training else "at unknown cost"),
        ("command", str(made.command)),
        ("dtype", str(made.dtype)),
        ("seconds", str(made.seconds)),
        ("versions", ", ".join(f"{name} {version}" for name, version in made.versions.items())),
    ]


def _spelled(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _layers(plan: Plan) -> str:
    identity = len(plan.identity_layers)
    new = sum(source < 0 for source in plan.layers)
    repeated = len(plan.layers) - len(set(plan.layers) - {-1}) - identity - new
    counts = ((repeated, "repeated"), (identity, "identity"), (new, "new"))
    added = "".join(f", {count} {word}" for count, word in counts if count)
    return f"{plan.src_sizes['layer']} -> {len(plan.layers)} by {plan.depth}{added}"


def inspection_json(read: PlanFile) -> dict[str, Any]:
    """Return the content of `phigrow inspect --json`: the provenance without the plan's maps, and counts of values."""
    lines = by_line(read.plan)
    made = read.provenance.to_json() if read.provenance else {}
    old, new = read.plan.cost()
    return {
        **{key: value for key, value in made.items() if key != "plan"},
        "plan": {
            "hash": read.plan.hash,
            "method": read.plan.method,
            "options": read.plan.options,
            **({"method_files": dict(read.plan.method_files)} if read.plan.method_files else {}),
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
