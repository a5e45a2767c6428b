"""One run of several: the records of stages end to end, at what each of them cost, as one that a report reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phigrow.files.atomic import atomic_write

Record = dict[str, Any]

FILE = "records.jsonl"
COSTS = ("step", "tokens", "flops", "seconds")
OF_THE_MODEL = ("model", "parameters", "non_embedding_parameters", "flops_per_token")


def joined(runs: Sequence[Sequence[Record]], arm: str, steps: int) -> list[Record]:
    """Join the records of runs that go on from one another.

    Steps, tokens, FLOPs and seconds count on; every stage's FLOPs are those of its own model, and the seconds between
    two are what growing weights and state took. What came before the first run stays its source's cost. The evaluation
    that a grown model begins with is in a ``growth`` record, beside that of the model that it was grown from.

    Args:
        runs: the records of each stage, its ``run`` record first.
        arm: the name of all of it.
        steps: of all stages, run or not.

    Returns:
        ``run``, then ``step``, ``eval``, ``diagnostics`` and ``growth`` records in order.
    """
    metas = [run[0] for run in runs]
    config = metas[0].get("config", {}) | {"steps": steps, "schedule_steps": None, "arm": arm}
    grown = [meta.get("growth") or {} for meta in metas[1:]]
    methods = "+".join(str(growth.get("method")) for growth in grown) or None
    run = {**metas[0], "arm": arm, "config": config, "budget": steps, "growth": {"method": methods, "stages": grown}}
    run |= {key: metas[-1][key] for key in OF_THE_MODEL if key in metas[-1]}
    out: list[Record] = [run]
    spent: Record = dict.fromkeys(COSTS, 0)
    last_eval: Record = {}
    by_source: Record = {}
    for number, (meta, records) in enumerate(zip(metas, runs, strict=True)):
        before, read = dict(spent), dict(by_source)
        if number:
            took = float(meta.get("expand_seconds") or 0.0)
            before["seconds"] = round(before["seconds"] + took, 4)
            start = next((r for r in records if r["type"] == "eval" and r["step"] == 0), {})
            said = {key: (meta.get("growth") or {}).get(key) for key in ("method", "depth", "state", "plan_hash")}
            losses = {"loss_before": last_eval.get("loss"), "loss_after": start.get("loss")}
            sizes = {"parameters": meta.get("parameters")}
            out.append({"type": "growth", **before, "grow_seconds": took, **said, **losses, **sizes})
        for record in records[1:]:
            kind = record["type"]
            if kind not in ("step", "eval", "diagnostics") or (number and kind == "eval" and record["step"] == 0):
                continue
            moved = record | {key: _sum(before[key], record[key]) for key in COSTS if key in record}
            if "tokens_by_source" in record:
                counted = {name: read.get(name, 0) + n for name, n in record["tokens_by_source"].items()}
                moved["tokens_by_source"] = by_source = counted
            if kind == "step":
                spent = {key: moved[key] for key in COSTS}
            if kind == "eval":
                last_eval = moved
            out.append(moved)
    return out


def _sum(before: float, own: float) -> float:
    return round(before + own, 4) if isinstance(own, float) else before + own


def write_joined(folders: Sequence[Path], out: Path, arm: str, steps: int) -> None:
    """Write ``records.jsonl`` of the stages that have begun, whole or not at all."""
    runs = [found for folder in folders if (found := read_records(folder))]
    if not runs:
        return
    text = "".join(json.dumps(record) + "\n" for record in joined(runs, arm, steps))
    atomic_write(out / FILE, text)


def read_records(folder: Path) -> list[Record]:
    """The records of a run, as far as they were written; empty where there are none."""
    path, found = folder / FILE, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # the line that is being written
    return found if found and found[0].get("type") == "run" else []
