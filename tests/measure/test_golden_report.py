"""Every number of a report over made-up runs, frozen; its words may change.

``PHIGROW_WRITE_GOLDEN=1 pytest tests/measure/test_golden_report.py`` writes the numbers anew, after a change that is
meant.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from phigrow.measure import compare, load_runs
from phigrow.measure.data import as_json, curves_data

GOLDEN = Path(__file__).parents[1] / "golden" / "report.json"
WORDS = {"findings", "notes", "basis", "versions"}


def numbers(data: Any) -> Any:
    """The data without sentences, numbers to ten figures: the last ones depend on the processor."""
    if isinstance(data, dict):
        return {key: numbers(value) for key, value in sorted(data.items()) if key not in WORDS}
    if isinstance(data, list):
        return [numbers(value) for value in data]
    return float(f"{data:.10g}") if isinstance(data, float) and math.isfinite(data) else data


def measured(folder: Path) -> dict[str, Any]:
    comparison = compare(load_runs(folder))
    return numbers({"report": as_json(comparison), "curves": curves_data(comparison)})


def test_the_numbers_of_a_report_are_those_of_the_first_release(experiment):
    found = measured(experiment(seeds=(0, 1, 2), noise=0.01))
    if os.environ.get("PHIGROW_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, sort_keys=True) + "\n", encoding="utf-8")
    assert found == json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_another_noise_gives_other_numbers(experiment):
    # Negative control.
    assert measured(experiment(seeds=(0, 1, 2), noise=0.011)) != json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.mark.parametrize("value", [1.0, 1e-9, math.nan, None, "text", 3])
def test_what_is_left_of_a_value(value):
    kept = numbers({"value": value, "findings": ["words"]})
    assert kept == {"value": value} or math.isnan(value)
