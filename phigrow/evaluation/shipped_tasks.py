"""Tasks that phigrow ships. They need no network, and their texts are short enough for small models.

A document has a prompt and choices that continue it. The metrics are ``acc`` (the right choice has the highest
probability), ``acc_norm`` (the highest log probability per byte), and ``bits_per_byte`` of the right choice.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np

from phigrow.errors import GrowthError
from phigrow.files.fingerprint import json_fingerprint
from phigrow.records.evaluations import Metric, mean_and_error

SHIPPED = {
    "phigrow_answers": "bits a byte of reference answers to questions about Python",
    "phigrow_cloze": "the last word of a sentence of a textbook, out of four",
    "phigrow_arithmetic": "sums, differences and products of small numbers, out of four",
    "phigrow_code": "the expression that a short function returns, out of four",
}
"""Task -> description."""


@dataclass(frozen=True)
class Document:
    """A prompt, the choices that continue it, and the place of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@cache
def documents_of(task: str) -> tuple[Document, ...]:
    """Return the documents of a shipped task.

    >>> documents_of("phigrow_arithmetic")[0].prompt.endswith(" =")
    True
    """
    name = task.removeprefix("phigrow_")
    text = (files("phigrow.evaluation") / "tasks" / f"{name}.jsonl").read_text(encoding="utf-8")
    read = (json.loads(line) for line in text.splitlines())
    return tuple(Document(each["prompt"], tuple(each["choices"]), each["answer"]) for each in read)


def fingerprint_of(documents: Sequence[Document]) -> str:
    """Return the fingerprint of documents."""
    return json_fingerprint([[each.prompt, list(each.choices), each.answer] for each in documents])


def metrics_of(documents: Sequence[Document], logprobs: Sequence[Sequence[float]]) -> dict[str, Metric]:
    """Compute the metrics of documents from the log probabilities of their choices.

    Args:
        documents: of one task.
        logprobs: for each document, the sum of the log probabilities (nats) of the tokens of each choice.

    Raises:
        GrowthError: a log probability is not finite.

    >>> two = [Document("1 +", (" 2", " 12"), 0)]
    >>> metrics_of(two, [[-3.0, -4.0]])["acc"].value, metrics_of(two, [[-3.0, -4.0]])["acc_norm"].value
    (1.0, 0.0)
    """
    values: dict[str, list[float]] = {}
    for each, scores in zip(documents, logprobs, strict=True):
        if not np.isfinite(scores).all():
            raise GrowthError(
                "the model gives a log probability that is not finite",
                where=repr(each.prompt),
                why=f"the log probabilities of its choices are {', '.join(f'{score:g}' for score in scores)}",
                fix="choose --dtype float32; if it stays, the weights hold NaN or infinity",
            )
        sizes = [len(choice.encode()) for choice in each.choices]
        if len(each.choices) > 1:
            values.setdefault("acc", []).append(float(np.argmax(scores) == each.answer))
            per_byte = np.asarray(scores) / sizes
            values.setdefault("acc_norm", []).append(float(np.argmax(per_byte) == each.answer))
        bits = -scores[each.answer] / float(np.log(2)) / sizes[each.answer]
        values.setdefault("bits_per_byte", []).append(float(bits))
    return {
        name: Metric(*mean_and_error(each), higher_is_better=name != "bits_per_byte", per_document=tuple(each))
        for name, each in values.items()
    }
