"""Results of evaluations on benchmarks: one JSON file for each checkpoint and task, and their paired differences."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from phigrow.errors import GrowthError
from phigrow.files.atomic import atomic_json
from phigrow.files.untrusted import read_json_strict

FOLDER = "evaluations"
"""Folder of the results of a run's checkpoints, in the run's folder; below it one folder for each checkpoint."""

FORMAT = 1


@dataclass(frozen=True)
class Metric:
    """One measured quantity of a task.

    Attributes:
        value: over all documents, usually their mean.
        stderr: its standard error over documents; None where it is not known.
        higher_is_better: True for an accuracy, False for a loss.
        per_document: the value of every document, in the order of the task; None where the metric has no such values.
    """

    value: float
    stderr: float | None
    higher_is_better: bool
    per_document: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Evaluation:
    """The result of one checkpoint on one task.

    Attributes:
        task: its name.
        scored_by: ``phigrow`` for a shipped task, ``lm_eval`` for a task of lm-evaluation-harness.
        checkpoint: ``name``, ``folder``, ``fingerprint``, ``tokenizer`` (its fingerprint) and ``parameters`` of the
            checkpoint, and, for one that a run or a growth made, ``arm``, ``seed``, ``step`` and ``method``.
        settings: choices that can change the values, such as ``dtype``, ``device``, ``limit`` and ``num_fewshot``.
        documents: fingerprint of the documents.
        metrics: name -> metric.
        versions: of phigrow, torch and transformers, which can change the values too.
        seconds: of the evaluation.
    """

    task: str
    scored_by: str
    checkpoint: dict[str, Any]
    settings: dict[str, Any]
    documents: str
    metrics: dict[str, Metric]
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """Name of the checkpoint."""
        return str(self.checkpoint["name"])


@dataclass(frozen=True)
class Difference:
    """A metric of one evaluation minus that of another.

    Attributes:
        value: the difference.
        stderr: standard error of the mean difference over documents, each document paired with itself; None where the
            two evaluations cannot be paired.
    """

    value: float
    stderr: float | None


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean of the values of documents, and its standard error; None for fewer than two values.

    >>> mean_and_error([0.0, 1.0, 1.0, 1.0])
    (0.75, 0.25)
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def difference(one: Evaluation, other: Evaluation, metric: str) -> Difference:
    """Return a metric of ``one`` minus that of ``other``, paired by document where both scored the same documents."""
    first, second = one.metrics[metric], other.metrics[metric]
    value = first.value - second.value
    if first.per_document is None or second.per_document is None or not same_documents(one, other):
        return Difference(value, None)
    pairs = zip(first.per_document, second.per_document, strict=True)
    return Difference(value, mean_and_error([a - b for a, b in pairs])[1])


def same_documents(one: Evaluation, other: Evaluation) -> bool:
    """Return True if two evaluations scored the same documents of the same task with the same settings."""
    return all(getattr(one, key) == getattr(other, key) for key in ("task", "scored_by", "settings", "documents"))


def evaluation_path(folder: Path, task: str) -> Path:
    """Return the file of a task in the folder of a checkpoint's results."""
    return folder / f"{quote(task, safe=' ,=+')}.json"


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write one result, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    atomic_json(evaluation_path(folder, evaluation.task), {"format": FORMAT, **dataclasses.asdict(evaluation)})


def read_evaluation(path: Path) -> Evaluation:
    """Read one result.

    Raises:
        GrowthError: the file cannot be read, or is not a result of an evaluation.
    """
    content = read_json_strict(path, "the evaluation", nan=True)
    try:
        if content.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        metrics = {name: _metric(metric) for name, metric in content.pop("metrics").items()}
        evaluation = Evaluation(metrics=metrics, **content)
        if not isinstance(evaluation.checkpoint["name"], str) or not isinstance(evaluation.task, str):
            raise ValueError("it names no checkpoint and no task")
        if not isinstance(evaluation.settings, dict) or not isinstance(evaluation.documents, str):
            raise ValueError("it has no settings")
        if len({len(m.per_document) for m in metrics.values() if m.per_document is not None}) > 1:
            raise ValueError("its metrics have different numbers of documents")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise GrowthError(
            "the file is not a result of phigrow evaluate",
            where=str(path),
            why=str(error),
            fix="delete it, and run phigrow evaluate again",
        ) from error
    return evaluation


def _metric(content: dict[str, Any]) -> Metric:
    per_document = content["per_document"]
    return Metric(
        float(content["value"]),
        None if content["stderr"] is None else float(content["stderr"]),
        bool(content["higher_is_better"]),
        None if per_document is None else tuple(map(float, per_document)),
    )


def read_evaluations(folder: Path) -> list[Evaluation]:
    """Read every result in a folder and in the folders below it, in the order of their paths.

    Raises:
        GrowthError: as `read_evaluation`.
    """
    return [read_evaluation(path) for path in sorted(folder.rglob("*.json")) if path.name[0] != "."]


def as_data(evaluation: Evaluation) -> dict[str, Any]:
    """Return a result as JSON-ready data without the values of documents; null for numbers that are not finite."""
    data = dataclasses.asdict(evaluation)
    for metric in data["metrics"].values():
        del metric["per_document"]
    content: dict[str, Any] = json.loads(json.dumps(data), parse_constant=lambda _: None)
    return content
