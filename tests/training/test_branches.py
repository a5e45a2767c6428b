"""A branch of a trunk has the losses that it would have had alone, to the bit."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import losses, records
from scenarios import TINY

from phigrow.checkpoints.run_checkpoints import RUN_FILE
from phigrow.errors import GrowthError
from phigrow.measure import compare, load_runs
from phigrow.training import RunConfig, load_run_config
from phigrow.training.branches import branch as make_branch

pytestmark = pytest.mark.slow

WSD = {"schedule": "wsd", "zero": 1, "dtype": "bf16", "eval_every": 2, "model": TINY | {"resid_pdrop": 0.1}}
ALONE = WSD | {"steps": 9, "decay": 3}


def scenarios(folder: Path, ranks: int) -> list[dict[str, Any]]:
    if ranks != 2:
        return []
    trunk = {**WSD, "out": "trunk", "arm": "scratch", "trunk": "t", "decay": 0, "save_at": [4, 6], "save_every": 5}
    grown = {"arm": "scratch", "trunk": "t", "branch_from": str(folder / "trunk"), "save_every": 1, "keep": 1}
    return [
        ALONE | {"out": "alone", "eval_at": [1]},
        trunk | {"steps": 5, "keep": 1, "eval_at": [1]},
        trunk | {"steps": 6, "keep": 1, "eval_at": [1]},  # a trunk is made longer
        ALONE | grown | {"out": "branch"},
        WSD | grown | {"out": "short", "steps": 6, "decay": 2},
        ALONE | grown | {"out": "cut", "stop_at": 1, "log_every": 1},
        ALONE | grown | {"out": "cut"},
        ALONE | grown | {"out": "other", "lr": 2e-2},
        ALONE | grown | {"out": "nothing-there", "decay": 7},
        ALONE | grown | {"out": "late", "branch_from": str(folder / "branch"), "decay": 2},
        ALONE | grown | {"out": "no-run", "branch_from": str(folder / "nowhere")},
    ]


@pytest.fixture(scope="module")
def runs(launches) -> Path:
    return launches(__name__)


@pytest.mark.parametrize("branch", ["branch", "cut"])
def test_a_branch_is_the_run_that_it_would_have_been_alone(runs, branch):
    for key in ("loss", "lr", "grad_norm", "tokens", "step"):
        found = [[record[key] for record in records(runs / name, "step")] for name in (branch, "alone")]
        assert found[0] == found[1], key
    evals = {record["step"]: record["loss"] for record in records(runs / branch, "eval")}
    assert list(evals) == [0, 1, 2, 4, 5, 6, 8, 9]  # at step 5 the trunk ended at first
    del evals[5]
    assert {record["step"]: record["loss"] for record in records(runs / "alone", "eval")} == evals
    (meta,) = records(runs / branch, "run")
    assert (meta["trunk"], meta["budget"], meta["config"]["steps"]) == ("t", 9, 9)
    assert len(records(runs / branch, "resume")) == (branch == "cut")


def test_the_comparison_would_see_another_decay(runs):
    # Negative control: the same trunk, two steps of decay from step 4 on.
    ours, theirs = losses(runs / "short"), losses(runs / "alone")[:6]
    assert ours[:4] == theirs[:4]
    rates = [[record["lr"] for record in records(runs / name, "step")][5] for name in ("short", "alone")]
    assert rates == pytest.approx([0.0055, 0.01])
    assert np.isfinite(ours).all()


def test_a_trunk_keeps_what_branches_start_from_and_links_instead_of_copying(runs):
    kept = sorted(path.name for path in (runs / "trunk" / "checkpoints").glob("step-*"))
    assert kept == ["step-4", "step-5", "step-6"]
    (meta,) = records(runs / "trunk", "run")
    assert (meta["trunk"], meta["budget"]) == ("t", None)
    weights = next((runs / "trunk" / "checkpoints" / "step-6").glob("*model_states.pt"))
    assert os.stat(weights).st_nlink == 1  # the branches have moved on, and deleted their links alone
    assert sorted(path.name for path in (runs / "branch" / "checkpoints").glob("step-*")) == ["step-9"]


def test_measuring_reads_branches_as_a_study_of_budgets(runs):
    loaded = load_runs([runs / name for name in ("trunk", "branch", "short")])
    comparison = compare(loaded)
    assert comparison.baseline.name == "scratch"
    assert [run.is_trunk for run in loaded] == [True, False, False]
    assert [run.budget for run in loaded[1:]] == [9, 6]
    tokens = loaded[1].steps["tokens"]
    assert tokens[-1] == 9 * 8 * 16
    assert (np.diff(loaded[1].steps["seconds"]) > 0).all()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            "other",
            "the trunk has other settings than the branch\n.*\n  why: these keys differ: lr \\(0.01, now 0.02\\)",
        ),
        (
            "nothing-there",
            "the trunk has no checkpoint of step 2\n.*\n  why: it has checkpoints of these steps: 4, 5, 6",
        ),
        ("late", "the branch starts at step 7, but the trunk's learning rate has decayed since step 6"),
        ("no-run", "there is no run to branch from"),
    ],
)
def test_what_is_no_trunk_of_a_run_is_refused(runs, run, message):
    assert re.match(message, (runs / run / "error-1.txt").read_text())
    assert not (runs / run / "checkpoints").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"branch_from": "x"}, "branch_from requires schedule wsd and a decay .got cosine"),
        (
            {"branch_from": "x", "schedule": "wsd", "decay": 0},
            "branch_from requires schedule wsd and a decay .got wsd and 0",
        ),
        ({"eval_at": [0]}, "eval_at has 0"),
        ({"save_at": [3, -1]}, "save_at has -1"),
    ],
)
def test_keys_of_branches_that_make_no_sense_are_refused(keys, message):
    with pytest.raises(GrowthError, match=message):
        RunConfig(**keys)


def test_lists_of_steps_are_read_from_words_and_yaml(tmp_path):
    assert load_run_config(options=["--eval-at", "1,10,100"]).eval_at == [1, 10, 100]
    (tmp_path / "run.yaml").write_text("eval_at: [1, 10]\nsave_at: 7\nlr: 1e-3\n")
    config = load_run_config(tmp_path / "run.yaml")
    assert (config.eval_at, config.save_at, config.lr) == ([1, 10], [7], 0.001)
    with pytest.raises(GrowthError, match=r"save_at is '1,x'\n.*\n  what to do: give whole numbers or none"):
        load_run_config(options=["--save-at", "1,x"])


def test_a_trunk_that_ends_before_the_branch_has_not_decayed(tmp_path):
    branch = RunConfig(schedule="wsd", steps=100, decay=20, branch_from=str(tmp_path))
    for decay, message in ((0, "the trunk has no checkpoint of step 80"), (5, "has decayed since step 35")):
        trunk = RunConfig(schedule="wsd", steps=40, decay=decay)
        (tmp_path / RUN_FILE).write_text(json.dumps(trunk.reproducibility_keys()))
        with pytest.raises(GrowthError, match=message):
            make_branch(branch, branch.reproducibility_keys(), tmp_path / "branch")
