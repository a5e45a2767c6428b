"""The records of one real run, frozen: their types, keys and values, and what the reader makes of them.

``PHIGROW_WRITE_GOLDEN=1 pytest tests/training/test_golden_records.py -m launch`` writes the file anew. Do that only
for a change of the records that is meant, and say in the commit which keys changed.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_cases import FOLDER
from scenarios import SEQ_LEN, TINY

from phigrow.models.cost import count_cost
from phigrow.records import load_run

GOLDEN = FOLDER / "records.jsonl"
MEASURED = {"seconds", "tokens_per_second", "data_wait"}
"""Keys whose values a clock gives."""
SURROUNDINGS = {"versions", "device", "commit"}
"""Keys of the machine, the packages and the checkout: present in every run record, with any value."""
TOLERANCE = 1e-4
"""Largest relative difference of a number: another processor rounds losses and norms differently."""


def scenarios(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """List the run that is frozen."""
    return [{"out": "fp32", "zero": 0, "export": "export"}] if ranks == 1 else []


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file, with the name of the run's folder instead of its path."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for record in records:
        if record["type"] == "run":
            record["config"]["out"] = Path(record["config"]["out"]).name
    return records


def differences(found: Any, frozen: Any, where: str = "records") -> list[str]:
    """List where two JSON values differ in keys, their order, types or values; numbers may differ by `TOLERANCE`."""
    if type(found) is not type(frozen):
        return [f"{where}: {type(found).__name__}, not {type(frozen).__name__}"]
    if isinstance(frozen, dict):
        if list(found) != list(frozen):
            return [f"{where}: keys {list(found)}, not {list(frozen)}"]
        lines = []
        for key, value in frozen.items():
            if key in MEASURED:
                lines += differences(type(found[key]).__name__, type(value).__name__, f"{where}.{key}")
            elif key not in SURROUNDINGS:
                lines += differences(found[key], value, f"{where}.{key}")
        return lines
    if isinstance(frozen, list):
        if len(found) != len(frozen):
            return [f"{where}: {len(found)} entries, not {len(frozen)}"]
        pairs = enumerate(zip(found, frozen, strict=True))
        return [line for number, pair in pairs for line in differences(*pair, f"{where}[{number}]")]
    same = found == pytest.approx(frozen, rel=TOLERANCE) if isinstance(frozen, float) else found == frozen
    return [] if same else [f"{where}: {found!r}, not {frozen!r}"]


@pytest.mark.launch
def test_a_run_records_what_it_recorded_before(launches):
    path = launches(__name__) / "fp32" / "records.jsonl"
    if os.environ.get("PHIGROW_WRITE_GOLDEN"):
        written = [record | ({"commit": None} if record["type"] == "run" else {}) for record in read(path)]
        GOLDEN.write_text("".join(json.dumps(record) + "\n" for record in written), encoding="utf-8")
    assert differences(read(path), read(GOLDEN)) == []


def changed(number: int, **values: Any) -> list[dict[str, Any]]:
    """The frozen records, some values of one of them replaced."""
    records = copy.deepcopy(read(GOLDEN))
    records[number].update(values)
    return records


@pytest.mark.parametrize(
    ("number", "values", "expected"),
    [
        (0, {"commit": "f00", "versions": {}, "device": "another"}, []),
        (2, {"seconds": 7.0, "tokens_per_second": 1.0, "data_wait": 0.5}, []),
        (2, {"loss": 4.5893}, []),
        (2, {"loss": 4.6}, ["records[2].loss: 4.6, not 4.589285850524902"]),
        (2, {"seconds": 7}, ["records[2].seconds: 'int', not 'float'"]),
        (2, {"step": "1"}, ["records[2].step: str, not int"]),
        (0, {"model": {}}, ["records[0].model: keys [], not [" + ", ".join(map(repr, [*TINY, "eos_token_id"])) + "]"]),
    ],
)
def test_what_counts_as_a_difference(number, values, expected):
    assert differences(changed(number, **values), read(GOLDEN)) == expected


def test_a_missing_record_is_a_difference():
    assert differences(read(GOLDEN)[:-1], read(GOLDEN)) == ["records: 9 entries, not 10"]


def test_a_missing_and_a_new_key_are_differences():
    records = changed(1, other=1)
    del records[2]["lr"]
    extra, missing = differences(records, read(GOLDEN))
    assert extra.startswith("records[1]: keys ['type', 'step', 'tokens', 'flops', 'seconds', 'loss', 'other'], not [")
    assert missing.startswith("records[2]: keys ['type', 'step', 'tokens', 'flops', 'seconds', 'loss', 'grad_norm',")


def test_the_reader_reads_the_frozen_records():
    run = load_run(FOLDER)
    assert (run.arm, run.seed, run.budget, run.schedule, run.trunk) == ("scratch", 0, 6, "cosine", None)
    assert (run.finished, run.diverged_at, run.notes) == (True, None, ())
    assert (run.meta["parameters"], run.meta["world_size"], run.meta["growth"]) == (23264, 1, None)
    assert [run.source_cost(unit) for unit in ("tokens", "flops", "seconds")] == [0.0, 0.0, 0.0]
    assert run.steps["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert run.evals["step"].tolist() == [0, 3, 6]
    for columns in (run.steps, run.evals):
        np.testing.assert_array_equal(columns["tokens"], columns["step"] * 8 * SEQ_LEN)
        np.testing.assert_allclose(columns["flops"], columns["tokens"] * count_cost(TINY, SEQ_LEN).training_flops)
        assert (np.diff(columns["seconds"]) > 0).all()
    np.testing.assert_allclose(run.evals["loss"], [4.585331, 4.328622, 4.097059], rtol=TOLERANCE)
    np.testing.assert_allclose(
        run.steps["loss"], [4.589286, 4.585047, 4.443565, 4.30809, 4.263083, 4.134251], rtol=TOLERANCE
    )
    np.testing.assert_allclose(run.steps["lr"], [0, 0.005, 0.01, 0.00868198, 0.0055, 0.00231802], rtol=1e-5)
    np.testing.assert_allclose(
        run.steps["grad_norm"], [1.380327, 1.278964, 1.557786, 1.437398, 1.130837, 1.059249], rtol=TOLERANCE
    )
    assert set(run.steps) >= {"tokens_per_second", "data_wait", "skipped", "spike"}
    assert not run.steps["skipped"].any()
    assert run.held_out(6) == run.evals["loss"][-1]
