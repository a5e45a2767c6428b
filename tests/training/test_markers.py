"""Tests that start DeepSpeed carry a mark, so that they do not run in the default suite."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from jobs import end, finish, launcher, start
from launching import ROOT, launch, run_scenarios


@pytest.mark.parametrize(
    "starting",
    [
        lambda folder: launch(2, ROOT / "recipes" / "pretrain.py"),
        lambda folder: run_scenarios(1, folder, []),
        lambda folder: run_scenarios(2, folder, []),
        lambda folder: end(start(launcher(1))),
    ],
    ids=["launch", "one-rank", "two-ranks", "job"],
)
def test_an_unmarked_test_cannot_start_deepspeed(starting, tmp_path):
    with pytest.raises(pytest.fail.Exception, match=r"starts DeepSpeed \(.*\): mark it with pytest\.mark\.launch"):
        starting(tmp_path)


@pytest.mark.parametrize("mark", ["launch", "slow", "long"])
def test_a_marked_test_can(request, mark):
    request.applymarker(mark)
    assert finish(start(["echo", "deepspeed.launcher"])) == (0, "deepspeed.launcher\n")


def test_other_processes_are_no_concern_of_the_rule():
    assert subprocess.run([sys.executable, "-c", "import deepspeed_ as d"], capture_output=True).returncode == 1


def test_tests_that_train_under_deepspeed_are_marked(pytestconfig):
    given: dict[str, list[str]] = {"shared": [], "here": [], "own": []}
    items = [
        SimpleNamespace(fixturenames=names, add_marker=lambda mark, to=given[key]: to.append(mark.name))
        for key, names in (("shared", ["runs", "launches"]), ("here", ["alone"]), ("own", ["tmp_path"]))
    ]
    hooks = pytestconfig.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))
    hooks.pytest_collection_modifyitems(items)
    assert given == {"shared": ["launch"], "here": ["launch"], "own": []}
