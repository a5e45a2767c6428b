"""The committed records of the study of growth in Phi's regime: they make a report, as far as the study has run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phigrow.measure import Comparison, compare, load_runs

STUDY = Path(__file__).parents[2] / "benchmarks" / "results" / "2026-11-27-study-phi-regime-s-2xAMD-EPYC"


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(load_runs(STUDY / "records"))


def test_every_arm_is_read_from_decayed_ends(comparison):
    """The first arms were stack, wr, tile and lossless; others join them as runs finish."""
    arms = {str(arm.runs[0].meta["arm"]) for arm in comparison.arms}
    assert {"stack", "wr", "tile", "lossless"} <= arms
    assert {arm.basis for arm in comparison.arms} == {"ends"}
    assert {run.budget for run in comparison.ends[comparison.baseline.name]} >= {90, 179, 446, 892, 1784}


def test_runs_follow_the_protocol(comparison):
    sweeps = json.loads((STUDY / "sweep.json").read_text())
    assert sweeps["seeds"] == [90]
    for arm in (comparison.baseline, *comparison.arms):
        assert not set(arm.seeds) & set(sweeps["seeds"])  # seeds for choosing are not reported
        for run in arm.runs:
            assert run.group_blocks.sum() >= 2000
            config = run.meta["config"]
            assert (config["dtype"], config["batch"], config["warmup"], config["optimizer"]) == (
                "fp32",
                32,
                20,
                "adamw",
            )
            assert config["eval_part"] == [1, 4, 4]
            if arm.runs[0].study.get("same_text") is not True:
                assert config["data_part"] == [4, 10, 10]


def test_no_rate_lies_at_the_edge_of_its_grid(comparison):
    marked = {arm.name for arm in (comparison.baseline, *comparison.arms) if arm.lr_edge}
    sweeps = json.loads((STUDY / "sweep.json").read_text())["arms"]
    assert marked == {name for name, sweep in sweeps.items() if sweep["at_edge"]} & marked
    assert not marked & {"scratch", "stack", "wr", "tile", "lossless"}
