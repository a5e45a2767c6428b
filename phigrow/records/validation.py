"""Check records one by one, and sort them by type."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from phigrow.errors import GrowthError
from phigrow.records.former_names import with_current_names
from phigrow.records.schema import DIAGNOSTICS, UNITS, Record

POINT = ("step", *UNITS, "loss")
STEP_ONLY = ("lr", "grad_norm", "tokens_per_second", "data_wait")
FLAGS = ("skipped", "spike")
"""Flags of a step; a missing flag is false."""

NOT_MEASURED = ("growth",)
"""Types of records that are for readers of the file. Measurements do not use them."""

Row = dict[str, float]


@dataclass
class Validated:
    """Checked records of one run, by type. Numbers are floats, nan if they are missing."""

    meta: Record
    steps: list[Row] = field(default_factory=list)
    evals: list[Row] = field(default_factory=list)
    sources: list[Row] = field(default_factory=list)
    diagnostics: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    group_losses: list[float] = field(default_factory=list)
    group_blocks: list[float] = field(default_factory=list)
    resumes: list[Record] = field(default_factory=list)


REQUIRED = object()
"""Default of a required field."""
COUNTS = {"step", *UNITS}
MAY_BE_MISSING = {"flops", "seconds"}


def validate(records: Iterable[tuple[str, Record]], path: str) -> Validated:
    """Check every record and sort them by type.

    A loss that is null or not finite is kept. ``flops`` and ``seconds`` may be missing from all steps or from all
    evaluations of a run. Records of an unknown type are skipped with a note.

    Args:
        records: each with its place in the file.
        path: of the file, for messages.

    Raises:
        GrowthError: there is no ``run`` record, or a second one; a field is missing or has the wrong type; steps do
            not increase, or costs decrease.
    """
    checked, slow = Validated({}), _SlowRanks()
    unknown: dict[str, int] = {}
    for where, record in records:
        kind = record["type"]
        if kind == "run":
            if checked.meta:
                raise GrowthError(
                    "there is a second run record",
                    where=where,
                    why="a file has the records of one run",
                    fix="give every run a folder of its own",
                )
            checked.meta = _checked_meta({key: value for key, value in record.items() if key != "type"}, where)
        elif kind == "step":
            row = _point(record, kind, where, checked.steps)
            row |= {key: _number(record, key, kind, where, None) for key in STEP_ONLY}
            row |= {key: float(record.get(key) is True) for key in FLAGS}
            checked.steps.append(row)
            slow.add(record)
        elif kind == "eval":
            checked.evals.append(_point(record, kind, where, checked.evals))
            checked.sources.append(_sources(record, where))
            checked.group_losses, checked.group_blocks = _groups(record, where)
        elif kind == "diagnostics":
            row = {"step": _number(record, "step", kind, where)}
            checked.diagnostics.append(
                row | {key: _number(record, key, kind, where) for key in DIAGNOSTICS if key in record}
            )
        elif kind == "resume":
            checked.resumes.append({key: value for key, value in record.items() if key != "type"})
        elif kind not in NOT_MEASURED:
            unknown[kind] = unknown.get(kind, 0) + 1
    if not checked.meta:
        raise GrowthError(
            "there is no run record",
            where=path,
            why="it has the arm and the seed of the run",
            fix="train the run again, or restore the first line of the file",
        )
    if checked.steps:
        spent = checked.steps[-1]["seconds"] - checked.steps[0]["seconds"]
        checked.notes += slow.notes(len(checked.steps), spent)
    checked.notes += [f"{count} records of the unknown type {kind!r} were skipped" for kind, count in unknown.items()]
    return checked


class _SlowRanks:
    """Steps in which each rank was the slowest, with its time and the median's, to name a rank that mostly was."""

    FEWEST, SHARE, FACTOR, LOSS = 100, 0.8, 1.2, 0.02

    def __init__(self) -> None:
        self._sums: dict[int, tuple[int, float, float]] = {}

    def add(self, record: Record) -> None:
        """Count the slowest rank of a step; records of other tools and of one rank have none."""
        values: tuple[Any, ...] = tuple(
            record.get(key) for key in ("slowest_rank", "slowest_seconds", "median_seconds")
        )
        rank, own, median = values
        if type(rank) is int and _is_number(own) and _is_number(median):
            steps, slow, middle = self._sums.get(rank, (0, 0.0, 0.0))
            self._sums[rank] = (steps + 1, slow + own, middle + median)

    def notes(self, steps: int, seconds: float) -> list[str]:
        """Return a note on a rank that was the slowest in most steps, much slower than the median, and cost 2 %.

        Args:
            steps: number of steps.
            seconds: that they took; NaN if the records do not have them.
        """
        return [
            f"rank {rank} was the slowest in {count} of {steps} steps and needed {slow / middle:.2f} times the median"
            for rank, (count, slow, middle) in self._sums.items()
            if count >= max(self.FEWEST, self.SHARE * steps)
            and slow > self.FACTOR * middle > 0
            and not slow - middle < self.LOSS * seconds
        ]


def _checked_meta(record: Record, where: str) -> Record:
    for key, kind in (("arm", str), ("seed", int)):
        if key not in record:
            raise GrowthError(f"the run record has no {key!r}", where=where, fix=f"add {key!r} to it")
        if not isinstance(record[key], kind) or isinstance(record[key], bool):
            named = "text" if kind is str else "a whole number"
            raise GrowthError(f"{key!r} of the run record is {record[key]!r}", where=where, fix=f"write {named}")
    _check_study(record.get("study"), where)
    config = record.get("config")
    return record | {"config": with_current_names(config)} if isinstance(config, dict) else record


STUDY_KEYS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "source": ("text", lambda value: isinstance(value, str)),
    "source_seed": ("a whole number", lambda value: type(value) is int),
    "source_age": ("a positive number", lambda value: _is_number(value) and value > 0),
    "source_loss": ("a number", lambda value: _is_number(value)),
    "side_by_side": ("a whole number from 1", lambda value: type(value) is int and value >= 1),
    **{
        key: ("true or false", lambda value: isinstance(value, bool))
        for key in ("source_constant", "flat", "same_text", "refined")
    },
}
"""Key of ``study`` -> description of its values, and a check. Null counts as missing."""


def _check_study(study: Any, where: str) -> None:
    if study is None:
        return
    if not isinstance(study, dict):
        raise GrowthError(f"'study' of the run record is {study!r}", where=where, fix='write {"source_seed": 0, ...}')
    for key, (words, right) in STUDY_KEYS.items():
        if (value := study.get(key)) is not None and not right(value):
            raise GrowthError(f"{key!r} of 'study' is {value!r}", where=where, fix=f"write {words}, or leave it out")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _point(values: Mapping[str, Any], kind: str, where: str, before: list[Row]) -> Row:
    """Return step, costs and loss of a record, checked against the record before it."""
    row = {key: _number(values, key, kind, where, None if key in MAY_BE_MISSING else REQUIRED) for key in POINT}
    if not before:
        return row
    last = before[-1]
    if row["step"] <= last["step"]:
        raise GrowthError(
            f"the {kind} records are out of order: step {row['step']:.0f} comes after step {last['step']:.0f}",
            where=where,
            fix="give a run that was started again a folder of its own",
        )
    for key in UNITS:
        if row[key] < last[key]:
            raise GrowthError(
                f"{key!r} falls from {last[key]:g} to {row[key]:g}",
                where=where,
                why="costs are cumulative",
                fix="give a run that was started again a folder of its own",
            )
        if math.isnan(row[key]) != math.isnan(last[key]):
            raise GrowthError(
                f"{key!r} is in some {kind} records and missing from others", where=where,
                fix="record it in all of them or in none",
            )  # fmt: skip
    return row


def _number(record: Mapping[str, Any], key: str, kind: str, where: str, default: object = REQUIRED) -> float:
    value = record.get(key, default)
    counts_up = key in COUNTS
    if type(value) is float and (not counts_up or (key != "step" and 0 <= value < math.inf)):
        return value  # a short path for nearly all values, since a report reads millions
    if value is REQUIRED:
        raise GrowthError(f"the {kind} record has no {key!r}", where=where, fix=f"write {key!r} in every {kind} record")
    if value is None and key not in ("step", "tokens"):
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise GrowthError(f"{key!r} is {value!r}, but must be a number", where=where, fix="write a number")
    if counts_up and (not math.isfinite(value) or value < 0 or (key == "step" and value != int(value))):
        raise GrowthError(
            f"{key!r} is {value!r}",
            where=where,
            why="steps and costs are counted up from 0",
            fix=f"write a {'whole ' if key == 'step' else ''}number of at least 0",
        )
    return float(value)


def _sources(values: Mapping[str, Any], where: str) -> Row:
    losses = values.get("sources") or {}
    if not isinstance(losses, dict):
        raise GrowthError(
            f"'sources' is {losses!r}, but must be an object", where=where, fix='write {"name": loss, ...}'
        )
    return {name: _number(losses, name, "eval", where) for name in losses}


def _groups(values: Mapping[str, Any], where: str) -> tuple[list[float], list[float]]:
    """Return the losses of groups of held-out blocks and their numbers of blocks; empty if they were not recorded."""
    losses, blocks = values.get("group_losses") or [], values.get("group_blocks") or []
    if not isinstance(losses, list) or not isinstance(blocks, list) or len(losses) != len(blocks):
        raise GrowthError(
            "'group_losses' and 'group_blocks' do not match", where=where,
            why="every group has a loss and a number of blocks", fix="write two lists of the same length",
        )  # fmt: skip
    if not all(_is_number(count) and count > 0 for count in blocks):
        raise GrowthError(
            f"'group_blocks' is {blocks!r}",
            where=where,
            why="every group has at least one block",
            fix="write positive numbers",
        )
    numbers = [_number({"group_losses": loss}, "group_losses", "eval", where) for loss in losses]
    return numbers, [float(count) for count in blocks]
