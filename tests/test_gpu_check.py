"""The script for a GPU: every step runs here at toy size, and a step that fails does not stop the rest."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_check.py"


@pytest.fixture
def gpu_check(monkeypatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_step_runs_at_toy_size(tmp_path):
    from launching import environment

    out = tmp_path / "lines.jsonl"
    command = [sys.executable, str(SCRIPT), "--size", "toy", "--together", "--out", str(out)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)
    lines = {line["step"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert {name: line.get("error", line) for name, line in lines.items() if not line["ok"]} == {}
    assert done.returncode == 0
    assert len(lines) == 12
    assert lines["documents"]["sdpa"]["crossing_gradient"] == 0 < lines["documents"]["sdpa"]["own_gradient"]
    assert [row["stage"] for row in lines["stages"]["rows"]] == [0, 1, 1, 2, 2, 3, 3]
    assert lines["resume"]["deterministic"]["difference"] == 0


def test_a_step_that_fails_does_not_stop_the_rest(gpu_check, monkeypatch, tmp_path, capsys):
    def broken(place: object) -> dict[str, object]:
        raise RuntimeError("no kernel image is available")

    steps = {"first": broken, "second": lambda place: {"ok": True, "value": 3}, "third": lambda place: {"ok": False}}
    monkeypatch.setattr(gpu_check, "STEPS", steps)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--together", "--out", str(tmp_path / "lines.jsonl")])
    assert gpu_check.main() == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["step"], line["ok"]) for line in lines] == [
        ("first", False), ("second", True), ("third", False), ("summary", False),
    ]  # fmt: skip
    assert lines[0]["error"] == "RuntimeError: no kernel image is available"
    assert (lines[1]["value"], lines[-1]["failed"]) == (3, ["first", "third"])
    assert (tmp_path / "lines.jsonl").read_text().splitlines() == [json.dumps(line) for line in lines]
    monkeypatch.setattr(gpu_check, "STEPS", {"second": steps["second"]})
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--together"])
    assert gpu_check.main() == 0
