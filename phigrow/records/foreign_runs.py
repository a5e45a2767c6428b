"""Turn a log of another trainer into the records of a run: choose columns, order steps, and count tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from phigrow.errors import GrowthError
from phigrow.records.readers.log_table import LogTable, shown
from phigrow.records.schema import Record

KNOWN: dict[str, tuple[str, ...]] = {
    "step": ("train/global_step", "trainer/global_step", "global_step", "step", "Step", "_step", "iteration", "iter"),
    "loss": (
        "eval_loss", "eval/loss", "val_loss", "val/loss", "valid_loss", "valid/loss", "validation_loss",
        "validation/loss", "heldout_loss", "test_loss", "test/loss",
    ),
    "train_loss": ("loss", "train/loss", "train_loss", "training_loss"),
    "tokens": (
        "num_input_tokens_seen", "train/num_input_tokens_seen", "num_tokens", "train/num_tokens", "tokens",
        "tokens_seen", "train/tokens", "train/tokens_seen", "total_tokens",
    ),
    "seconds": (),
    "lr": ("learning_rate", "train/learning_rate", "lr", "train/lr"),
    "grad_norm": ("grad_norm", "train/grad_norm"),
}  # fmt: skip
"""Value of a record -> names of columns that can hold it, the best first.

Clocks of logs count evaluations, saved checkpoints and pauses, so seconds are read only from a column that is named.
"""

Point = tuple[int, float, Mapping[str, float]]
"""Step, loss, and the row that they are from."""


@dataclass(frozen=True)
class LogColumns:
    """Columns that a user named: what a record needs -> name of the column; and tokens of a step without such a column.

    Attributes:
        names: by key of ``KNOWN``.
        tokens_per_step: tokens of one update, over all ranks and accumulated batches.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    tokens_per_step: float | None = None


@dataclass(frozen=True)
class ForeignRecords:
    """``step`` and ``eval`` records of a log, and notes about anything unusual in it."""

    records: tuple[tuple[str, Record], ...]
    notes: tuple[str, ...]


def foreign_records(table: LogTable, columns: LogColumns, flops_per_token: float | None) -> ForeignRecords:
    """Return the records of a log.

    A run that was restarted from a checkpoint goes back in steps. The values from before the restart are then left out
    up to there. Tokens between two rows that have them are interpolated.

    Args:
        table: the log.
        columns: those that the user named.
        flops_per_token: of training; None leaves FLOPs out.

    Raises:
        GrowthError: a column is missing; there are no losses, steps or tokens; steps are not whole; the log has two
            runs; tokens or seconds fall.
    """
    names = {key: _column(table, key, columns.names) for key in KNOWN}
    step, loss = names["step"], names["loss"]
    if step is None:
        raise GrowthError(
            "the log has no column of steps",
            where=str(table.path),
            why=f"its columns are {shown(table.columns)}",
            fix="name it in the YAML file: columns: {step: NAME}",
        )
    if loss is None:
        raise _no_loss(table)
    notes = []
    if loss == names["train_loss"] or loss in KNOWN["train_loss"]:
        names["train_loss"] = None
        notes.append(
            f"its loss is the column {loss!r}, named like a training loss: it is noisy, and on text that was "
            "read before it is too low"
        )
    if step in table.own_steps:
        notes.append(
            f"its steps are W&B's own count ({step!r}), which grows with every call of its logger; they are updates "
            "only if the run logged once an update"
        )
    evals, restarts = _in_order(_points(table, step, loss, _others(names, loss)), table, loss)
    notes += restarts
    train: list[Point] = []
    if (name := names["train_loss"]) is not None:
        train, restarts = _in_order(_points(table, step, name, [loss]), table, name)
        notes += restarts
    if not evals:
        raise _no_loss(table)
    tokens = _tokens(table, step, names["tokens"], columns.tokens_per_step)
    seconds = None
    if names["seconds"] is not None:
        if any(_went_back(each) for each in ([p[0] for p in _points(table, step, loss, [])],)):
            notes.append("its seconds are left out, because the run was restarted")
        else:
            seconds = _Count.of(table, step, names["seconds"], "seconds")
            notes.append(f"its seconds are the column {names['seconds']!r}, with all that the log's clock counted")
    records: list[tuple[str, Record]] = []
    for kind, points in (("step", train), ("eval", evals)):
        for number, value, row in points:
            if kind == "step" and number == 0:
                continue
            record: Record = {"type": kind, "step": number, "tokens": tokens.at(number), "loss": value}
            if flops_per_token is not None:
                record["flops"] = record["tokens"] * flops_per_token
            if seconds is not None:
                record["seconds"] = seconds.at(number)
            if kind == "step":
                record |= {key: row[own] for key in ("lr", "grad_norm") if (own := names[key]) and own in row}
            records.append((f"{table.path}, step {number}", record))
    return ForeignRecords(tuple(records), tuple(notes))


def _others(names: Mapping[str, str | None], loss: str) -> list[str]:
    other = names["train_loss"]
    return [other] if other is not None and other != loss else []


def _column(table: LogTable, key: str, named: Mapping[str, str]) -> str | None:
    """Return the column for a key: the one that was named, else the only known name that the log has."""
    if key in named:
        if named[key] not in table.columns:
            raise GrowthError(
                f"the log has no column {named[key]!r}",
                where=str(table.path),
                why=f"its columns are {shown(table.columns)}",
                fix=f"correct columns.{key} in the YAML file",
            )
        return named[key]
    there = [name for name in KNOWN[key] if name in table.columns]
    if key == "loss" and len(there) > 1:
        raise GrowthError(
            f"the log has several held-out losses: {', '.join(there)}",
            where=str(table.path),
            fix="name one in the YAML file: columns: {loss: NAME}",
        )
    return there[0] if there else None


def _no_loss(table: LogTable) -> GrowthError:
    losses = [name for name in table.columns if "loss" in name.lower()]
    example = losses[0] if losses else "NAME"
    return GrowthError(
        "the log has no held-out loss",
        where=str(table.path),
        why=f"its columns are {shown(table.columns) or 'empty'}; arms are compared by their held-out loss",
        fix=f"evaluate while you train, or name the column in the YAML file: columns: {{loss: {example}}}",
    )


def _points(table: LogTable, step: str, name: str, others: Iterable[str]) -> list[Point]:
    """Return step and loss of the rows that have both.

    Where a format writes NaN for missing values, a NaN counts as a loss only if no finite loss follows, and the row has
    no other loss.
    """
    rows = [row for row in table.rows if name in row and step in row]
    for row in rows:
        if not math.isfinite(row[step]) or row[step] != int(row[step]) or row[step] < 0:
            raise GrowthError(
                f"the step {row[step]:g} is not a whole number",
                where=f"{table.path}, column {step}",
                why="a step is one update",
                fix="name the column of updates in the YAML file: columns: {step: NAME}",
            )
    points: list[Point] = [(int(row[step]), row[name], row) for row in rows]
    if not table.empty_is_nan:
        return points
    finite = [place for place, point in enumerate(points) if math.isfinite(point[1])]
    last = finite[-1] if finite else len(points)
    return [
        point
        for place, point in enumerate(points)
        if not math.isnan(point[1])
        or (place > last and not any(math.isfinite(point[2].get(other, math.nan)) for other in others))
    ]


def _went_back(steps: list[int]) -> bool:
    return any(later < earlier for earlier, later in pairwise(steps))


def _in_order(points: list[Point], table: LogTable, name: str) -> tuple[list[Point], list[str]]:
    """Return points whose steps increase, and notes about those that are left out.

    Raises:
        GrowthError: the steps begin again, or half of them occur twice with different values: the log has two runs.
    """
    kept: list[Point] = []
    twice = different = 0
    notes: list[str] = []
    for point in points:
        if kept and point[0] < kept[-1][0]:
            if point[0] <= kept[0][0]:
                raise _two_runs(table, name, f"its steps begin again at {point[0]} after step {kept[-1][0]}")
            notes.append(
                f"its run went back from step {kept[-1][0]} to {point[0]}, as after a restart, so the first values "
                f"of {name!r} from there on are left out"
            )
            kept = [each for each in kept if each[0] < point[0]]
        elif kept and point[0] == kept[-1][0]:
            twice += 1
            different += kept[-1][1] != point[1] and not (math.isnan(kept[-1][1]) and math.isnan(point[1]))
            kept.pop()
        kept.append(point)
    if different >= 2 and 2 * different >= len(kept):
        raise _two_runs(table, name, f"{different} of its {len(kept)} steps have two values of {name!r}")
    if different:
        notes.append(f"{different} of its steps have two values of {name!r}, of which the later is read")
    return kept, notes


def _two_runs(table: LogTable, name: str, why: str) -> GrowthError:
    return GrowthError(
        f"the log has two runs: {why}",
        where=f"{table.path}, column {name}",
        why="each log of an arm is one run",
        fix="give each run a log of its own",
    )


@dataclass(frozen=True)
class _Count:
    """A cumulative cost by step: a number for each step, or recorded values between which it is interpolated."""

    path: str
    name: str
    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    each: float | None = None

    @staticmethod
    def of(table: LogTable, step: str, name: str, unit: str) -> _Count:
        """Return the values of a column, without those from before a restart.

        Raises:
            GrowthError: the column has no values, or falls, or stays the same.
        """
        kept: list[tuple[int, float]] = []
        for row in table.rows:
            if name in row and step in row and math.isfinite(row[name]):
                while kept and kept[-1][0] >= row[step]:
                    kept.pop()
                kept.append((int(row[step]), row[name]))
        values = [value for _, value in kept]
        falls = any(later < earlier for earlier, later in pairwise(values))
        if not kept or min(values) < 0 or falls or (len(kept) > 1 and values[0] == values[-1]):
            raise GrowthError(
                f"the column {name!r} does not count {unit} up from the start of the run",
                where=str(table.path),
                why="it is empty" if not kept else "it falls" if falls else "it stays the same",
                fix="name another column in the YAML file: "
                + f"columns: {{{unit}: NAME}}"
                + (", or write tokens_per_step: NUMBER" if unit == "tokens" else ", or leave seconds out"),
            )
        return _Count(str(table.path), name, tuple(s for s, _ in kept), tuple(values))

    def at(self, step: int) -> float:
        """Return the cost up to a step.

        Raises:
            GrowthError: the step lies after the last value.
        """
        if step == 0:
            return 0.0
        if self.each is not None:
            return step * self.each
        if step > self.steps[-1]:
            raise GrowthError(
                f"the column {self.name!r} ends at step {self.steps[-1]}, and a loss is from step {step}",
                where=self.path,
                why="the cost of that loss is then not known",
                fix="write tokens_per_step: NUMBER in the YAML file, or log the column at the last step too",
            )
        # The count begins at 0 tokens before the first step.
        begin = ([0], [0.0]) if self.steps[0] > 0 else ([], [])
        return float(np.interp(step, [*begin[0], *self.steps], [*begin[1], *self.values]))


def _tokens(table: LogTable, step: str, name: str | None, each: float | None) -> _Count:
    if each is not None:
        return _Count(str(table.path), "tokens", each=each)
    if name is None:
        raise GrowthError(
            "the log has no column of tokens",
            where=str(table.path),
            why=f"its columns are {shown(table.columns)}; costs are counted in tokens",
            fix="write tokens_per_step: NUMBER in the YAML file (sequences of an update, over all ranks, times their "
            "length), or name the column: columns: {tokens: NAME}",
        )
    return _Count.of(table, step, name, "tokens")
