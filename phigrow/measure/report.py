"""Write everything that a comparison shows into one folder: Markdown, JSON and the figure."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from phigrow.measure.compare import compare
from phigrow.measure.estimates import CONFIDENCE, Comparison, Estimate
from phigrow.measure.figures import curves, save
from phigrow.measure.records import Run, load_runs
from phigrow.measure.tables import markdown, markdown_table
from phigrow.measure.wording import amount, findings

DEFINITIONS = (
    "The target is the held-out loss that {baseline} ends at; an arm's cost C is what it spent until a monotone fit of "
    "its evaluations gets there, and **speedup** is C_{baseline} / C_arm, **saving** 1 - C_arm / C_{baseline}. "
    "**Sunk** leaves the training of the source model out of C_arm, **charged** counts it."
)


def report(folders: str | Path | Iterable[str | Path], out: str | Path, baseline: str = "scratch") -> Comparison:
    """Compare the runs in ``folders`` and write ``report.md``, ``report.json``, ``curves.png`` and ``curves.svg``.

    Every file is written under a temporary name and then put in place, so that a reader never sees half of one.

    Args:
        folders: run folders or parents of them, as for ``load_runs``.
        out: a folder, made if it is missing; files of an earlier report are replaced.
        baseline: the arm that sets the target.

    Returns:
        The comparison that was written.

    Raises:
        GrowthError: as ``load_runs`` and ``compare``; then nothing is written.

    >>> report("runs", "report").arms[0].name  # doctest: +SKIP
    'wr'
    """
    comparison = compare(load_runs(folders), baseline)
    figure = curves(comparison)
    texts = {
        "report.md": markdown_report(comparison),
        "report.json": json.dumps(as_json(comparison), indent=1, allow_nan=False) + "\n",
    }
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("curves.png", "curves.svg"):
        _put(folder / name, lambda path: save(figure, path))
    for name, text in texts.items():
        _put(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))  # type: ignore[misc]
    return comparison


def markdown_report(comparison: Comparison) -> str:
    """The text of ``report.md``: findings, figure, definitions, tables, notes, facts about the runs."""
    base = comparison.baseline
    arms = (base, *comparison.arms)
    notes = dict.fromkeys(note for arm in arms for note in arm.notes)
    parts = [
        f"# Growth against {base.name}",
        "\n".join(f"- {finding}" for finding in findings(comparison)) or "There is nothing to compare.",
        f"![Held-out loss against tokens, {', '.join(arm.name for arm in arms)}](curves.svg)",
        "## Definitions",
        DEFINITIONS.format(baseline=base.name),
        "## Costs at the target",
        markdown(comparison).rstrip(),
        *(["## Notes", "\n".join(f"- {note}" for note in notes)] if notes else []),
        "## Runs",
        markdown_table([_facts(run) for arm in arms for run in arm.runs]),
        "\n".join(f"- {line}" for line in _versions(comparison)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON-ready data, at full precision; null where a number is unknown or infinite."""
    return {
        "baseline": comparison.baseline.name,
        "targets": {str(seed): target for seed, target in comparison.targets.items()},
        "confidence": CONFIDENCE,
        "findings": findings(comparison),
        "arms": [
            {
                "arm": arm.name,
                "seeds": list(arm.seeds),
                "final_loss": _finite(arm.final_loss),
                "final_loss_by_seed": {str(run.seed): _finite(float(run.evals["loss"][-1])) for run in arm.runs},
                "loss_at_step": {str(step): _finite(loss) for step, loss in arm.loss_at.items()},
                "censored_seeds": list(arm.censored_seeds),
                "diverged_at_step": {str(run.seed): run.diverged_at for run in arm.runs if run.diverged_at is not None},
                "estimates": [_estimate(estimate) for estimate in arm.estimates],
                "notes": list(arm.notes),
            }
            for arm in (comparison.baseline, *comparison.arms)
        ],
        "runs": [_plain(run.meta) for arm in (comparison.baseline, *comparison.arms) for run in arm.runs],
    }


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {
        "unit": estimate.unit,
        "accounting": estimate.accounting,
        "cost": _finite(estimate.cost),
        "baseline_cost": _finite(estimate.baseline_cost),
        "speedup": _finite(estimate.speedup),
        "speedup_interval": [_finite(end) for end in estimate.speedup_interval or ()] or None,
        "saving": _finite(estimate.saving),
        "saving_interval": [_finite(end) for end in estimate.saving_interval or ()] or None,
        "censored": estimate.censored,
        "at_target_from_the_start": estimate.cost == 0,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """Data from a record with null for what JSON has no number for (its reader accepts NaN, the standard does not)."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return _finite(value) if isinstance(value, float) else value


def _facts(run: Run) -> dict[str, str]:
    meta, evals = run.meta, run.evals
    source = meta.get("source_tokens")
    count = meta.get("parameters")
    return {
        "arm": run.arm,
        "seed": str(run.seed),
        "parameters": f"{count:,}" if isinstance(count, int) else "unknown",
        "steps": str(evals["step"][-1]),
        "tokens": amount(float(evals["tokens"][-1]), "tokens"),
        "FLOPs": amount(float(evals["flops"][-1]), "flops"),
        "seconds": amount(float(evals["seconds"][-1]), "seconds"),
        "source's tokens": amount(float(source), "tokens") if isinstance(source, int | float) else "not recorded",
        "evaluations": str(len(evals["step"])),
        "commit": str(meta.get("commit") or "unknown")[:12],
    }


def _versions(comparison: Comparison) -> list[str]:
    """The versions that the runs were made with, one line for every different set."""
    groups: dict[str, list[str]] = {}
    for arm in (comparison.baseline, *comparison.arms):
        for run in arm.runs:
            versions = run.meta.get("versions")
            if isinstance(versions, dict) and versions:
                text = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
                groups.setdefault(text, []).append(f"{run.arm} seed {run.seed}")
    if len(groups) == 1:
        return [f"All runs: {text}." for text in groups]
    return [f"{', '.join(names)}: {text}." for text, names in groups.items()]


def _put(path: Path, write: Callable[[Path], object]) -> None:
    # The ending stays last: it is what tells matplotlib the format.
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
