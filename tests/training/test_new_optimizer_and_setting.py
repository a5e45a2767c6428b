"""A new optimizer is one file, a new setting one declaration and its use: CONTRIBUTING's diffs, applied to a copy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import phigrow

ROOT = Path(__file__).parents[2]


def diff_of(section: str) -> str:
    """The diff of a section of CONTRIBUTING.md."""
    page = ROOT / "CONTRIBUTING.md"
    if not page.is_file():
        pytest.skip("CONTRIBUTING.md is not beside the tests")
    match = re.search(r"```diff\n(.*?)```", page.read_text(encoding="utf-8").split(f"## {section}\n")[1], re.DOTALL)
    assert match is not None
    return match[1]


def applied(diff: str, folder: Path) -> list[str]:
    """Apply a diff whose hunks have no line numbers; returns the files that it touches."""
    leave_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(phigrow.__file__).parent, folder / "phigrow", ignore=leave_out)
    touched = []
    for former, path, hunks in re.findall(r"--- (\S+)\n\+\+\+ b/(\S+)\n((?:@@\n(?:(?!--- )[ +-].*\n)+)+)", diff):
        file = folder / path
        text = "" if former == "/dev/null" else file.read_text(encoding="utf-8")
        for hunk in hunks.split("@@\n")[1:]:
            lines = hunk.splitlines(keepends=True)
            old = "".join(line[1:] for line in lines if line[0] in " -")
            new = "".join(line[1:] for line in lines if line[0] in " +")
            assert (former == "/dev/null" and not file.exists()) or text.count(old) == 1, old
            text = text.replace(old, new) if old else new
        file.write_text(text, encoding="utf-8")
        touched.append(path)
    return touched


def run(folder: Path, script: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script],
        capture_output=True, text=True, check=False, cwd=folder, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_new_optimizer_is_one_file(tmp_path):
    assert applied(diff_of("Add an optimizer"), tmp_path) == ["phigrow/training/optimizers/sgd.py"]
    script = """
import torch
from phigrow.training import RunConfig
from phigrow.training.optimizer_spec import find_optimizer
from phigrow.training.options import settings_page, usage

config = RunConfig(optimizer="sgd", weight_decay=0.0)
assert "--optimizer <adamw|muon|sgd> [adamw]" in usage()
assert "adamw or muon or sgd" in settings_page()
spec = find_optimizer("sgd")
weight = torch.nn.Linear(2, 1)
optimizer = spec.build(spec.groups(weight, config), config, False)
for group in optimizer.param_groups:
    group["lr"] = 0.5
before = weight.weight.detach().clone()
weight(torch.ones(1, 2)).sum().backward()
optimizer.step()
assert torch.equal(weight.weight, before - 0.5)
states = {name for entry in optimizer.state.values() for name in entry}
assert states == set(spec.states), states
print("ok")
"""
    assert run(tmp_path, script) == "ok\n"


def test_a_new_setting_is_one_declaration_and_its_use(tmp_path):
    touched = applied(diff_of("Add a setting"), tmp_path)
    assert touched == ["phigrow/training/settings.py", "phigrow/training/schedule.py"]
    script = """
import json
from pathlib import Path
import torch
from phigrow.errors import GrowthError
from phigrow.study.job_builder import result_keys
from phigrow.training import RunConfig, load_run_config
from phigrow.training.checkpoints import claim
from phigrow.training.configuration import comparison_keys
from phigrow.training.options import settings_page, usage
from phigrow.training.schedule import learning_rate_schedule

keys = {"steps": 10, "warmup": 0, "schedule": "wsd", "decay": 8, "min_lr": 0.0}
assert "--decay-shape <linear|cosine|1-sqrt> [linear]" in usage()
assert "`decay_shape`" in settings_page()
assert "decay_shape" in comparison_keys()["named"]
changed = load_run_config(options=["--decay-shape", "1-sqrt"], **keys)
former = RunConfig(**keys)
# A run folder from before the setting goes on at its default, and at no other value.
older = {key: value for key, value in former.reproducibility_keys().items() if key != "decay_shape"}
Path("run").mkdir()
Path("run/run.json").write_text(json.dumps(older))
Path("run/records.jsonl").write_text("{}")
assert claim(Path("run"), former.reproducibility_keys(), resume=True)
Path("run/run.json").write_text(json.dumps(older))
try:
    claim(Path("run"), changed.reproducibility_keys(), resume=True)
except GrowthError as error:
    assert "decay_shape ('linear', now '1-sqrt')" in str(error)
else:
    raise AssertionError("another shape was taken for the same run")
# Finished jobs of a study keep their hashes: what is not set is not hashed.
assert result_keys({"warmup": 2}) == {"warmup": 2}
assert result_keys({"warmup": 2, "decay_shape": "cosine"}) == {"warmup": 2, "decay_shape": "cosine"}
rates = []
for config in (former, changed):
    schedule = learning_rate_schedule(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), config)
    rates.append([rate(5) for rate in schedule.lr_lambdas])
assert rates[0] != rates[1], rates
print("ok")
"""
    assert run(tmp_path, script) == "ok\n"
