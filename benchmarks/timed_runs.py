"""Parts that the benchmarks of whole runs share: arms in fresh processes, the clock of a step, ratios and results."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

PHI: dict[str, Any] = {
    "partial_rotary_factor": 0.5,
    "hidden_act": "gelu_new",
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
"""Keys of a Phi configuration that both benchmarks set; without dropout."""


def prepare_data(folder: Path, *, seq_len: int, vocab_size: int) -> None:
    """Make a folder anew, with blocks of the embedded corpus in ``FOLDER/data``."""
    from phigrow import corpus

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    corpus.prepare("embedded", folder / "data", seq_len=seq_len, vocab_size=vocab_size, progress=False)


def on_every_step(before: Callable[[], None], after: Callable[[int], None]) -> None:
    """Call functions before and after every step of phigrow's training; ``after`` takes the step's number."""
    from phigrow.training import step

    take = step.Stepper.__call__

    def timed(self: Any, number: int) -> None:
        before()
        take(self, number)
        after(number)

    step.Stepper.__call__ = timed  # type: ignore[method-assign]


def step_losses(records: Sequence[dict[str, Any]]) -> list[float]:
    """Return the loss of every step in the records of a run."""
    return [record["loss"] for record in records if record["type"] == "step"]


def read_records(out: Path) -> list[dict[str, Any]]:
    """Return the records of a run."""
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


def run_process(arm: str, words: Sequence[str], *, threads: int) -> None:
    """Run a command of one arm in a fresh process, and end with its output if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{arm} failed: {done.stdout[-2000:]}{done.stderr[-3000:]}")


def median_and_range(ratios: Sequence[float]) -> str:
    """Spell ratios as ``median (lowest to highest)``."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def ratios_to(base: str, own: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]], key: str) -> list[float]:
    """Return the ratios of an arm's values to those of the arm ``base`` in the same rounds."""
    values = {record["round"]: record[key] for record in records if record["arm"] == base}
    return [record[key] / values[record["round"]] for record in own if record["round"] in values]


def loss_difference(records: Sequence[dict[str, Any]], first: str, second: str) -> float:
    """Return the largest relative difference of any step's loss between two arms; NaN if one of them has no steps."""
    one, other = (next((r["losses"] for r in records if r["arm"] == arm), []) for arm in (first, second))
    return max((abs(a - b) / b for a, b in zip(one, other, strict=bool(one and other))), default=float("nan"))


def show(record: dict[str, Any]) -> None:
    """Print a record without its losses."""
    print({key: value for key, value in record.items() if key != "losses"}, flush=True)


def write_results(out: Path, content: dict[str, Any], text: str, *packages: str) -> None:
    """Write OUT.json, with the machine and the versions of packages, and OUT.md."""
    machine = {"processor": cpu_name(), "cores": os.cpu_count()}
    versions = {name: version(name) for name in packages}
    out.with_suffix(".json").write_text(json.dumps({"machine": machine, "versions": versions, **content}, indent=1))
    out.with_suffix(".md").write_text(text)


def cpu_name() -> str:
    """Return the name of the processor, from ``/proc/cpuinfo`` where there is one."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
