"""Provenance: the origin of the weights in a folder, from the files beside them.

`phigrow.expand` writes ``phigrow.json``: the plan of the growth, the source, and the cost of both. A run that exports
its model writes ``training.json``: the total cost of its training. Strangers may have written either file, so both are
read strictly, and in this module only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.files.untrusted import read_json_strict

PROVENANCE_FILE = "phigrow.json"
TRAINING_FILE = "training.json"
FORMAT = 1


@dataclass(frozen=True)
class TrainingCost:
    """Tokens, FLOPs and seconds of training; None where a value is unknown."""

    tokens: float | None = None
    flops: float | None = None
    seconds: float | None = None

    def plus(self, other: TrainingCost) -> TrainingCost:
        """Return the sum. A part that is unknown in either is unknown in the sum."""
        return TrainingCost(
            *(
                None if mine is None or others is None else mine + others
                for mine, others in zip(self.values(), other.values(), strict=True)
            )
        )

    def values(self) -> tuple[float | None, float | None, float | None]:
        """Tokens, FLOPs and seconds."""
        return self.tokens, self.flops, self.seconds


@dataclass(frozen=True)
class Provenance:
    """The content of ``phigrow.json``. Parts that a file leaves out are None or empty.

    Attributes:
        plan: the resolved plan as JSON data, with its ``hash``.
        method_summary: the growth in a few words, for reports.
        source_name, source_revision: the source: its hub id, or its folder's name, and its commit where it is known.
        source_files: name -> ``bytes`` and ``sha256`` of the source's files of weights.
        source_training: the source's ``training.json``.
        copied: the grown values that are copies of a source's: ``spans``, ``fresh`` and ``blocks``, see
            `phigrow.expansion.provenance.copied_values`.
        learning: settings of the run that learned the maps, and its ``cost``.
        dtype: of the stored weights.
        command: the command that repeats the expansion.
        seconds: of the expansion.
        versions: package -> version.
    """

    plan: dict[str, Any]
    method_summary: str | None = None
    source_name: str | None = None
    source_revision: str | None = None
    source_files: dict[str, dict[str, Any]] = field(default_factory=dict)
    source_training: dict[str, Any] | None = None
    copied: dict[str, Any] | None = None
    learning: dict[str, Any] | None = None
    dtype: str | None = None
    command: str | None = None
    seconds: float | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def plan_hash(self) -> str | None:
        value = self.plan.get("hash")
        return value if isinstance(value, str) else None

    @property
    def source_cost(self) -> TrainingCost:
        """The cost of the source's training."""
        return training_cost(self.source_training)

    @property
    def learning_cost(self) -> TrainingCost:
        """The cost of learning the maps; zero where none were learned."""
        return TrainingCost(0, 0.0, 0.0) if self.learning is None else training_cost(self.learning.get("cost"))

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``phigrow.json``."""
        source: dict[str, Any] = {"name": self.source_name, "revision": self.source_revision}
        source["files"] = self.source_files
        if self.source_training is not None:
            source["training"] = self.source_training
        return {
            "format": FORMAT,
            "plan": self.plan,
            **({"method_summary": self.method_summary} if self.method_summary is not None else {}),
            "source": source,
            **({"copied": self.copied} if self.copied is not None else {}),
            **({"learning": self.learning} if self.learning else {}),
            "dtype": self.dtype,
            "command": self.command,
            "seconds": self.seconds,
            "versions": self.versions,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], path: Path) -> Provenance:
        """Read the content of ``phigrow.json``. The plan stays data: `phigrow.Plan.from_json` reads it.

        Args:
            data: the JSON object.
            path: the file, for messages.

        Raises:
            GrowthError: another format, no plan, or a part of the wrong type.
        """
        file = _Fields(data, path)
        if (format := data.get("format", FORMAT)) != FORMAT:
            raise GrowthError(
                f"{PROVENANCE_FILE} has format {format!r}",
                where=str(path),
                why=f"this phigrow reads format {FORMAT}",
                fix="install the phigrow that wrote it, or make the folder again",
            )
        plan = file.get("plan", dict)
        if plan is None:
            raise file.refuse("it has no plan")
        source = _Fields(file.get("source", dict) or {}, path, "source.")
        files = _Fields(source.get("files", dict) or {}, path, "source.files.")
        for name in files.data:
            entry = _Fields(files.get(name, dict) or {}, path, f"source.files.{name}.")
            if entry.get("bytes", int) is None or entry.get("sha256", str) is None:
                raise file.refuse(f"source.files.{name} has no bytes and sha256")
        versions = _Fields(file.get("versions", dict) or {}, path, "versions.")
        learning = file.get("learning", dict)
        training = source.get("training", dict)
        for cost in (training, (learning or {}).get("cost")):
            _check_cost(cost, file)
        return cls(
            plan=plan,
            method_summary=file.get("method_summary", str),
            source_name=source.get("name", str),
            source_revision=source.get("revision", str),
            source_files=files.data,
            source_training=training,
            copied=_check_copied(file.get("copied", dict), file),
            learning=learning,
            dtype=file.get("dtype", str),
            command=file.get("command", str),
            seconds=file.get("seconds", int | float),
            versions={name: versions.get(name, str) or "" for name in versions.data},
        )


def read_provenance(folder: Path) -> Provenance | None:
    """Read the ``phigrow.json`` of a folder; None where there is none.

    Raises:
        GrowthError: the file cannot be read, as `Provenance.from_json`.
    """
    path = folder / PROVENANCE_FILE
    if not path.is_file():
        return None
    # A run that diverged may have left NaN as its loss.
    return Provenance.from_json(read_json_strict(path, PROVENANCE_FILE, nan=True), path)


def read_training(folder: Path) -> dict[str, Any] | None:
    """Read the ``training.json`` of a folder; None where there is none.

    Raises:
        GrowthError: the file cannot be read, or its costs are no numbers.
    """
    path = folder / TRAINING_FILE
    if not path.is_file():
        return None
    content = read_json_strict(path, TRAINING_FILE, nan=True)
    _check_cost(content, _Fields(content, path))
    return content


def training_cost(content: dict[str, Any] | None) -> TrainingCost:
    """Return the cost in a ``training.json``, or in a part of ``phigrow.json`` of the same keys."""
    return TrainingCost(*((content or {}).get(key) for key in ("tokens", "flops", "seconds")))


class _Fields:
    """The keys of a JSON object, checked for their types."""

    def __init__(self, data: dict[str, Any], path: Path, prefix: str = "") -> None:
        self.data, self.path, self.prefix = data, path, prefix

    def get(self, key: str, kind: Any) -> Any:
        """Return the value of a key, None where it is null or not there."""
        value = self.data.get(key)
        if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            raise self.refuse(f"{self.prefix}{key} is {_shortened(value)}")
        return value

    def refuse(self, why: str) -> GrowthError:
        return GrowthError(
            f"{self.path.name} cannot be read",
            where=str(self.path),
            why=why,
            fix="make the folder again, or restore the file as phigrow wrote it",
        )


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _check_cost(content: Any, file: _Fields) -> None:
    if content is None:
        return
    if not isinstance(content, dict):
        raise file.refuse(f"a cost is {_shortened(content)}")
    numbers = _Fields(content, file.path, "the cost's ")
    for key in ("tokens", "flops", "seconds"):
        value = numbers.get(key, int | float)
        if value is not None and not math.isfinite(value):
            raise file.refuse(f"the cost's {key} is {value}")


def _check_copied(copied: dict[str, Any] | None, file: _Fields) -> dict[str, Any] | None:
    if copied is None:
        return None
    inner = _Fields(copied, file.path, "copied.")
    spans, fresh, blocks = inner.get("spans", dict), inner.get("fresh", list), inner.get("blocks", dict)
    if spans is None or fresh is None:
        raise file.refuse("copied has no spans and fresh")
    if not all(isinstance(name, str) for name in fresh):
        raise file.refuse("copied.fresh is not a list of names")
    if not _counts((blocks or {}).values()):
        raise file.refuse("copied.blocks does not hold whole numbers")
    for line, sides in spans.items():
        if not _lists(sides) or not all(_lists(side) and all(_range(each) for each in side) for side in sides):
            raise file.refuse(f"copied.spans.{line} is not a list of ranges")
    return copied


def _lists(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, list) for each in value)


def _range(value: list[Any]) -> bool:
    return len(value) == 2 and _counts(value) and value[0] <= value[1]


def _counts(values: Iterable[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)
