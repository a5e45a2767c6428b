"""Read the records of training runs: one folder, one ``records.jsonl``, one ``Run``."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phigrow.errors import GrowthError

Columns = Mapping[str, NDArray[Any]]
"""One array a key, all of one length; ``step`` is int64, everything else float64."""

FILE = "records.jsonl"
PACKED = "records.jsonl.gz"
"""The same, compressed, as many runs are archived; read where the other is not there."""

COSTS = ("tokens", "flops", "seconds")
"""Cumulative costs that every step and eval record carries; ``seconds`` leaves evaluations out."""

WHAT_TO_GIVE = "give the folders that runs were trained into (their --out), or a folder that holds them"

REQUIRED = ("step", *COSTS, "loss")
OPTIONAL = {"step": ("lr", "grad_norm", "tokens_per_second", "data_wait"), "eval": ()}
FLAGS = ("skipped", "spike")
"""Of a step: its update was not made; its loss was an outlier. 1 where it was so, 0 where nothing is said."""

DIAGNOSTICS = ("copy_cosine", "copy_cosine_min", "copy_cosine_max", "effective_rank", "fresh_update_share")
"""Columns of the ``diagnostics`` records, each optional: see docs/measuring.md."""


@dataclass(frozen=True)
class Run:
    """One training run as it was recorded.

    ``meta`` is the ``run`` record without its type. ``steps`` and ``evals`` have the columns ``step``, ``tokens``,
    ``flops``, ``seconds`` and ``loss`` (nats a token); ``steps`` has ``lr``, ``grad_norm``, ``tokens_per_second`` and
    ``data_wait`` (the share of the step spent waiting for data) too, nan where they were not recorded, and 0 or 1 for
    ``skipped`` and ``spike``. ``sources`` has the held-out loss of each named source, one value an evaluation, nan
    where it is missing; ``diagnostics`` has ``step`` and what the run recorded of ``DIAGNOSTICS``. ``notes`` are
    sentences about what was unusual in the file.
    """

    folder: Path
    arm: str
    seed: int
    meta: dict[str, Any]
    steps: Columns
    evals: Columns
    notes: tuple[str, ...] = ()
    sources: Columns = field(default_factory=dict)
    diagnostics: Columns = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Arm and seed in words, for messages."""
        return f"{self.arm}, seed {self.seed}"

    @property
    def trunk(self) -> str | None:
        """What a trunk and the runs that branch off it have in common; None for a run that stands alone."""
        return self.meta.get("trunk")

    @property
    def is_trunk(self) -> bool:
        """Whether this is a trunk, whose own schedule never decays: its record says ``"budget": null``."""
        return self.trunk is not None and "budget" in self.meta and self.meta["budget"] is None

    @property
    def budget(self) -> int | None:
        """Steps after which the schedule has decayed: ``budget``, else ``config.steps``; None where nothing says it."""
        config = self.meta.get("config")
        for value in (self.meta.get("budget"), config.get("steps") if isinstance(config, dict) else None):
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return None

    @property
    def schedule(self) -> str | None:
        """The name of the learning-rate schedule, where the run says it."""
        config = self.meta.get("config")
        return config.get("schedule") if isinstance(config, dict) else None

    @property
    def finished(self) -> bool:
        """Whether the last evaluation stands at the end of the schedule, as far as the run says how long that is."""
        return self.budget is None or int(self.evals["step"][-1]) >= self.budget

    @property
    def diverged_at(self) -> int | None:
        """The first step whose training or held-out loss is not finite; None when there is none.

        A step that was skipped does not count: it changed nothing.
        """
        broken = [c["step"][~np.isfinite(c["loss"]) & (c.get("skipped", 0.0) == 0)] for c in (self.steps, self.evals)]
        return min((int(steps[0]) for steps in broken if len(steps)), default=None)

    def held_out(self, step: int) -> float | None:
        """The held-out loss recorded after exactly ``step`` updates (0: before the first one), or None."""
        (hits,) = np.nonzero(self.evals["step"] == step)
        return float(self.evals["loss"][hits[0]]) if len(hits) else None

    def source_cost(self, unit: str) -> float:
        """What training the source had cost (``source_tokens``, ...); nan where it was not recorded."""
        return self._meta_number(f"source_{unit}", math.nan)

    def expand_cost(self, unit: str) -> float:
        """What the expansion itself had cost, learning its maps included (``expand_seconds``, ...); 0 where it was not
        recorded."""
        return self._meta_number(f"expand_{unit}", 0.0)

    def _meta_number(self, key: str, otherwise: float) -> float:
        value = self.meta.get(key)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else otherwise


Seeds = dict[int, dict[int | None, Run]]
"""The runs of one arm: by seed, then by budget (steps after which the schedule has decayed), both in order."""


def load_run(folder: str | Path) -> Run:
    """Read ``folder/records.jsonl``, or ``records.jsonl.gz``, checking every line.

    A last line that was cut off in the middle, because the run is still being written or was killed, is left out with
    a note; anything else that is wrong is refused. A loss that is not finite (``NaN``, ``Infinity`` or ``null``) is
    kept, and the run is reported as diverged. Records of a type unknown here are passed over with a note.

    Raises:
        GrowthError: no such file; a line that is not JSON, lacks a key or has a value of the wrong kind; steps that
            do not increase or costs that decrease; no ``run`` record, or two.

    >>> load_run("runs/wr-seed0").evals["loss"][-1]  # doctest: +SKIP
    np.float64(3.61)
    """
    path, content = _read(Path(folder))
    notes: list[str] = []
    meta: dict[str, Any] | None = None
    rows: dict[str, list[dict[str, float]]] = {"step": [], "eval": []}
    sources: list[dict[str, float]] = []
    diagnostics: list[dict[str, float]] = []
    unknown: dict[str, int] = {}
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError as error:
            # Only the text after the last newline can be a record that was still being written.
            if number == len(lines):
                notes.append(f"line {number} is cut off and was left out")
                continue
            raise GrowthError("a record that is not JSON", where=where, why=str(error)) from error
        if not isinstance(record, dict) or not isinstance(record.get("type"), str):
            raise GrowthError(
                "a record without a type", where=where, fix='write {"type": "run" | "step" | "eval", ...}'
            )
        kind = record.pop("type")
        if kind == "run":
            if meta is not None:
                raise GrowthError("a second run record", where=where, fix="give every run a folder of its own")
            meta = _checked_meta(record, where)
        elif kind in rows:
            row = {key: _number(record, key, kind, where) for key in REQUIRED}
            row |= {key: _number({key: None} | record, key, kind, where) for key in OPTIONAL[kind]}
            _check_order(rows[kind], row, kind, where)
            rows[kind].append(row)
            if kind == "step":
                row |= {key: float(record.get(key) is True) for key in FLAGS}
            else:
                sources.append(_sources(record, where))
        elif kind == "diagnostics":
            row = {"step": _number(record, "step", kind, where)}
            row |= {key: _number(record, key, kind, where) for key in DIAGNOSTICS if key in record}
            diagnostics.append(row)
        elif kind not in ("resume", "growth"):  # where a run went on after a stop, or was grown: for people
            unknown[kind] = unknown.get(kind, 0) + 1
    if meta is None:
        raise GrowthError("no run record", where=str(path), why="arm and seed are unknown without it")
    notes += [f"{count} records of the unknown type {kind!r} were passed over" for kind, count in unknown.items()]
    steps, evals = _columns(rows["step"], (*REQUIRED, *OPTIONAL["step"], *FLAGS)), _columns(rows["eval"], REQUIRED)
    named = dict.fromkeys(name for row in sources for name in row)
    measured = [key for key in DIAGNOSTICS if any(key in row for row in diagnostics)]
    run = Run(
        Path(folder),
        meta["arm"],
        meta["seed"],
        meta,
        steps,
        evals,
        sources={name: np.array([row.get(name, math.nan) for row in sources]) for name in named},
        diagnostics=_columns([dict.fromkeys(measured, math.nan) | row for row in diagnostics], ("step", *measured)),
    )
    for flag, said in (("skipped", "skipped: no update was made"), ("spike", "spikes of the loss")):
        if count := int(steps[flag].sum()):
            notes.append(f"{said} in {count} of {len(steps['step'])} steps")
    if run.diverged_at is not None:
        notes.append(f"diverged: the loss is not finite at step {run.diverged_at}")
    return replace(run, notes=tuple(notes))


def load_runs(folders: str | Path | Iterable[str | Path], *, notes: list[str] | None = None) -> list[Run]:
    """Read several runs: run folders, or parents of run folders at any depth.

    Args:
        folders: one, or several.
        notes: where given, a folder without records is passed over while others have some, and a sentence about it
            is added here.

    Returns:
        The runs, parents searched in the order of their paths.

    Raises:
        GrowthError: no such folder; a folder without any records below it; everything that ``load_run`` raises.
    """
    roots = [folders] if isinstance(folders, str | Path) else list(folders)
    found: dict[Path, Path] = {}  # resolved -> as given, so that a folder named twice is read once
    empty: list[Path] = []
    for root in map(Path, roots):
        here = [root]
        if not any((root / name).is_file() for name in (FILE, PACKED)):
            here = sorted({path.parent for name in (FILE, PACKED) for path in root.rglob(name)})
        if not here:
            if not root.exists():
                raise GrowthError("no such folder", where=str(root), fix=WHAT_TO_GIVE)
            empty.append(root)
        for folder in here:
            found.setdefault(folder.resolve(), folder)
    if not found or (empty and notes is None):
        where = ", ".join(map(str, empty)) or None
        raise GrowthError("no runs", where=where, why=f"there is no {FILE} in it or below it", fix=WHAT_TO_GIVE)
    if notes is not None:
        notes += [f"{root} is left out: there is no {FILE} in it or below it" for root in empty]
    return [load_run(folder) for folder in found.values()]


def _read(folder: Path) -> tuple[Path, bytes]:
    path, packed = folder / FILE, folder / PACKED
    if path.is_file():
        return path, path.read_bytes()
    if not packed.is_file():
        raise GrowthError(
            "no records of a run", where=str(path), why="the file does not exist", fix="give the folder of a run"
        )
    try:
        return packed, gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise GrowthError("records that cannot be unpacked", where=str(packed), why=str(error)) from error


def _checked_meta(record: dict[str, Any], where: str) -> dict[str, Any]:
    for key, kind in (("arm", str), ("seed", int)):
        if key not in record:
            raise GrowthError(f"a run record without {key!r}", where=where)
        if not isinstance(record[key], kind) or isinstance(record[key], bool):
            raise GrowthError(f"a run record whose {key!r} is {record[key]!r}", where=where, fix=f"write a {kind}")
    return record


def _number(record: Mapping[str, Any], key: str, kind: str, where: str) -> float:
    if key not in record:
        raise GrowthError(f"{'an' if kind == 'eval' else 'a'} {kind} record without {key!r}", where=where)
    value = record[key]
    may_be_missing = key not in ("step", *COSTS)
    if value is None and may_be_missing:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise GrowthError(f"{key!r} is {value!r}", where=where, why="it is not a number")
    if not may_be_missing and (not math.isfinite(value) or value < 0 or (key == "step" and value != int(value))):
        raise GrowthError(f"{key!r} is {value!r}", where=where, why="steps and costs count up from 0")
    return float(value)


def _sources(record: Mapping[str, Any], where: str) -> dict[str, float]:
    found = record.get("sources") or {}
    if not isinstance(found, dict):
        raise GrowthError(f"'sources' is {found!r}", where=where, fix='write {"name": loss, ...}')
    return {name: _number(found, name, "eval", where) for name in found}


def _check_order(rows: list[dict[str, float]], row: dict[str, float], kind: str, where: str) -> None:
    if not rows:
        return
    last = rows[-1]
    if row["step"] <= last["step"]:
        raise GrowthError(
            f"{kind} records out of order: step {row['step']:.0f} after step {last['step']:.0f}",
            where=where,
            fix="give a run that was started again a folder of its own",
        )
    for key in COSTS:
        if row[key] < last[key]:
            raise GrowthError(f"{key!r} falls from {last[key]:g} to {row[key]:g}", where=where, why="it is cumulative")


def _columns(rows: list[dict[str, float]], keys: Iterable[str]) -> Columns:
    return {key: np.array([row[key] for row in rows], dtype=np.int64 if key == "step" else np.float64) for key in keys}
