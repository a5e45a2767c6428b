"""Concatenate the records of several stages into the records of one run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from phigrow.records.readers.phigrow import first_record, written_so_far
from phigrow.records.schema import UNITS, Record
from phigrow.records.writer import write_records

COUNTED = ("step", *UNITS)
"""Fields whose count continues from stage to stage."""

OF_THE_MODEL = ("model", "parameters", "non_embedding_parameters", "flops_per_token")
"""Fields of the run record that describe the last model."""

OF_THE_GROWTH = ("method", "depth", "state", "plan_hash")

PLACE_OF_A_STAGE = ("steps", "schedule_start", "schedule_steps", "data_start", "init", "init_optimizer", "model", "out")
"""Settings of the beginning and the end of a stage. They differ in every stage."""


def concatenate_stages(runs: Sequence[Sequence[Record]], arm: str, steps: int) -> list[Record]:
    """Concatenate the records of runs that each continue the one before.

    The counts of steps, tokens, FLOPs and seconds continue from stage to stage. The FLOPs of a stage are those of its
    own model. The seconds between two stages are those of growing weights and state. The cost of the first run's source
    is kept. A ``growth`` record has the first loss of a grown model and the last loss of its source.

    Args:
        runs: the records of each stage, its ``run`` record first.
        arm: the name of the run.
        steps: of all stages, including those that have not begun.

    Returns:
        ``run``, then ``step``, ``eval``, ``diagnostics`` and ``growth`` records in order.
    """
    metas = [run[0] for run in runs]
    out: list[Record] = [_run_record(metas, arm, steps)]
    spent: Record = dict.fromkeys(COUNTED, 0)
    last_eval: Record = {}
    read_by_source: Record = {}
    for number, (meta, records) in enumerate(zip(metas, runs, strict=True)):
        before, read_before = dict(spent), dict(read_by_source)
        if number:
            before["seconds"] = round(before["seconds"] + _seconds_of_growth(meta), 4)
            out.append(_growth_record(meta, records, before, last_eval))
        for record in records[1:]:
            kind = record["type"]
            if kind not in ("step", "eval", "diagnostics") or (number and kind == "eval" and record["step"] == 0):
                continue
            shifted = record | {key: _sum(before[key], record[key]) for key in COUNTED if key in record}
            if "tokens_by_source" in record:
                counted = {name: read_before.get(name, 0) + n for name, n in record["tokens_by_source"].items()}
                shifted["tokens_by_source"] = read_by_source = counted
            if kind == "step":
                spent = {key: shifted[key] for key in COUNTED}
            if kind == "eval":
                last_eval = shifted
            out.append(shifted)
    return out


def is_concatenated(path: Path) -> bool:
    """Return True if a file has the records of stages, and not those of one run."""
    run = first_record(path.parent) or {}
    return "stage_settings" in run or "stages" in (run.get("growth") or {})


def write_concatenated(folders: Sequence[Path], out: Path, arm: str, steps: int) -> None:
    """Write ``records.jsonl`` of the stages that have begun, atomically."""
    runs = [records for folder in folders if (records := written_so_far(folder))]
    if runs:
        write_records(out, concatenate_stages(runs, arm, steps))


def _run_record(metas: Sequence[Record], arm: str, steps: int) -> Record:
    config = metas[0].get("config", {}) | {"steps": steps, "schedule_steps": None, "arm": arm}
    growths = [meta.get("growth") or {} for meta in metas[1:]]
    methods = "+".join(str(growth.get("method")) for growth in growths) or None
    run = {**metas[0], "arm": arm, "config": config, "budget": steps, "growth": {"method": methods, "stages": growths}}
    run["stage_settings"] = [_changed(metas[0], meta) for meta in metas[1:]]
    return run | {key: metas[-1][key] for key in OF_THE_MODEL if key in metas[-1]}


def _changed(first: Record, later: Record) -> Record:
    """Return the settings of a later stage that differ from those of the first."""
    before = first.get("config") or {}
    return {
        key: value
        for key, value in (later.get("config") or {}).items()
        if key not in PLACE_OF_A_STAGE and (key not in before or before[key] != value)
    }


def _growth_record(meta: Record, records: Sequence[Record], before: Record, last_eval: Record) -> Record:
    start = next((r for r in records if r["type"] == "eval" and r["step"] == 0), {})
    growth = {key: (meta.get("growth") or {}).get(key) for key in OF_THE_GROWTH}
    losses = {"loss_before": last_eval.get("loss"), "loss_after": start.get("loss")}
    sizes = {"parameters": meta.get("parameters")}
    return {"type": "growth", **before, "grow_seconds": _seconds_of_growth(meta), **growth, **losses, **sizes}


def _seconds_of_growth(meta: Record) -> float:
    return float(meta.get("expand_seconds") or 0.0)


def _sum(before: float, own: float) -> float:
    return round(before + own, 4) if isinstance(own, float) else before + own
