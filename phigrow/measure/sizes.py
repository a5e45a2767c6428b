"""Checks of models: sources among the runs, arms with two models, and baselines of another size than a grown arm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from phigrow.errors import GrowthError
from phigrow.records.run import Run, Seeds
from phigrow.records.schema import UNITS

SHAPE = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads",
)  # fmt: skip
"""Keys of a record's ``model`` that tell two models apart, even if they have as many parameters."""

SECONDS = 0.005
"""Tolerance between two records of the same seconds: each part of the sum was rounded to a thousandth."""


def without_sources(runs: Iterable[Run]) -> tuple[list[Run], dict[str, str]]:
    """Leave out the sources of grown runs, which are not arms.

    Records do not name the folder of the source, but they have the cost of its training. A run of another size with
    this cost is taken for the source. The costs before it are included, and tokens, FLOPs and seconds must agree as far
    as both have them, which must be two of the three at least.

    Returns:
        The other runs; for each folder that is left out, the arms that were grown from it, in words.
    """
    runs = list(runs)
    grown = [run for run in runs if run.meta.get("growth") and run.source_cost("tokens") > 0]
    kept, sources = [], {}
    for run in runs:
        arms = list(dict.fromkeys(other.arm for other in grown if _is_source(run, other)))
        if arms:
            others = f" and {len(arms) - 1} other arm{'s' * (len(arms) > 2)}" if len(arms) > 1 else ""
            sources[str(run.folder)] = arms[0] + others
        elif run.is_source_of_study:
            sources[str(run.folder)] = "arms that have no run here"
        else:
            kept.append(run)
    return kept, sources


def _is_source(run: Run, grown: Run) -> bool:
    sizes = run.meta.get("parameters"), grown.meta.get("parameters")
    if (
        run is grown
        or run.is_trunk
        or run.is_flat
        or not len(run.evals["step"])
        or None in sizes
        or sizes[0] == sizes[1]
    ):
        return False
    costs = {unit: (float(run.evals[unit][-1]) + _before(run, unit), grown.source_cost(unit)) for unit in UNITS}
    known = {unit: pair for unit, pair in costs.items() if np.isfinite(pair).all()}
    return len(known) > 1 and all(
        np.isclose(*pair, rtol=1e-9, atol=SECONDS if unit == "seconds" else 0.5) for unit, pair in known.items()
    )


def _before(run: Run, unit: str) -> float:
    cost = run.source_cost(unit) + run.expand_cost(unit)
    return 0.0 if math.isnan(cost) and not run.meta.get("growth") else cost


def check_one_model(runs: Sequence[Run]) -> None:
    """Refuse an arm with two models.

    Raises:
        GrowthError: two runs of one arm recorded different ``parameters`` or a different value of a key in ``SHAPE``.
    """
    models: dict[str, Run] = {}
    for run in runs:
        first = models.setdefault(run.arm, run)
        pairs = [(key.replace("_", " "), _model(first).get(key), _model(run).get(key)) for key in SHAPE]
        pairs.insert(0, ("parameters", first.meta.get("parameters"), run.meta.get("parameters")))
        _refuse(run, first, f"the runs of {run.arm} train two different models", pairs)


def _refuse(run: Run, first: Run, what: str, pairs: Iterable[tuple[str, Any, Any]]) -> None:
    for key, one, other in pairs:
        if one is not None and other is not None and one != other:
            raise GrowthError(
                f"{what}: {key} {_shown(one)} against {_shown(other)}",
                where=f"{first.folder} and {run.folder}",
                why="the runs of an arm are seeds and budgets of one training",
                fix="give them different arm names (train the smaller one with --arm source), or leave one of them out",
            )


def check_sizes(arms: Mapping[str, Seeds], baseline: str) -> None:
    """Refuse a baseline of another size than a grown arm.

    An arm that was not grown may be smaller, such as the source trained further.

    Raises:
        GrowthError: ``parameters`` of a grown run and of the baseline differ.
    """
    base = next(run for by_budget in arms[baseline].values() for run in by_budget.values())
    for seeds in arms.values():
        for run in (run for by_budget in seeds.values() for run in by_budget.values()):
            mine, theirs = run.meta.get("parameters"), base.meta.get("parameters")
            if run.meta.get("growth") and None not in (mine, theirs) and mine != theirs:
                raise GrowthError(
                    f"{run.arm} was grown to {_shown(mine)} parameters, but the baseline {baseline} "
                    f"has {_shown(theirs)}",
                    where=f"{run.folder} and {base.folder}",
                    why="a grown model is compared with the same model trained from scratch",
                    fix="use runs of the grown model from scratch as the baseline, or leave one of these runs out",
                )


def _model(run: Run) -> dict[str, Any]:
    model = run.meta.get("model")
    return model if isinstance(model, dict) else {}


def _shown(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value[:12] if isinstance(value, str) else repr(value)
