"""Start DeepSpeed's launcher on the scenarios of these tests, and read what the runs recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def environment() -> dict[str, str]:
    """The environment of a launch: the tools of this Python's folder first, this checkout importable."""
    keep = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return keep | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def launch(
    ranks: int, script: Path, *words: str, cwd: Path | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run a script under DeepSpeed's launcher with ``ranks`` processes."""
    port = 20000 + os.getpid() % 20000
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(port)]
    return subprocess.run(
        [*runner, str(script), *words],
        env=environment() | environ,
        capture_output=True,
        text=True,
        timeout=900,
        cwd=cwd,
    )


def run_scenarios(ranks: int, folder: Path, scenarios: list[dict[str, Any]]) -> str:
    """Run scenarios in one launch, each in ``folder/<name>``, and return the output; one rank needs no launcher."""
    path = folder / f"scenarios-{ranks}.json"
    path.write_text(json.dumps([{**s, "out": str(folder / s["out"])} for s in scenarios]))
    script = HERE / "scenarios.py"
    if ranks == 1:
        words = [sys.executable, str(script), str(path)]
        done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=900)
    else:
        done = launch(ranks, script, str(path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    return done.stdout


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one type of a run."""
    lines = (folder / "records.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["type"] == kind]


def losses(folder: Path, kind: str = "step") -> list[float]:
    """The losses of a run, in order."""
    return [record["loss"] for record in records(folder, kind)]


def assert_continued(cut: Path, whole: Path) -> None:
    """That a run that was stopped repeats, to the bit, what one that was not did."""
    for kind in ("step", "eval"):
        assert [r["step"] for r in records(cut, kind)] == [r["step"] for r in records(whole, kind)]
        # Gloo sums two ranks in one order: a resumed run repeats every bit.
        assert losses(cut, kind) == losses(whole, kind)
    assert [r["lr"] for r in records(cut, "step")] == [r["lr"] for r in records(whole, "step")]
    assert len(records(cut, "run")) == 1
    seconds = [r["seconds"] for r in records(cut, "step")]
    assert seconds == sorted(seconds)
    first, second = load_file(whole / "export" / "model.safetensors"), load_file(cut / "export" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
