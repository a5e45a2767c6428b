"""Learn the maps of an arm before it grows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from phigrow.errors import GrowthError
from phigrow.study.job import Job
from phigrow.study.launch import end_with_parent, environment, last_words
from phigrow.study.settings import Study


def learned_maps(study: Study, job: Job, source: Path, data: Path) -> Path:
    """Learn the maps of an arm on one rank, in a process of its own, and return their folder; existing maps are kept.

    Raises:
        GrowthError: learning failed; the reason has the last lines of its log.
    """
    assert job.arm is not None
    assert job.arm.learn is not None
    out = job.folder.with_name(job.folder.name + "-maps")
    if out.is_dir():
        return out
    target, log = out.with_suffix(".json"), out.with_suffix(".log")
    target.write_text(json.dumps(study.dst), encoding="utf-8")
    growth = dict(job.arm.growth)
    method = ":".join([job.arm.method, *(f"start={growth[key]}" for key in ("start",) if key in growth)])
    words = ["learn-growth", "--src", source, "--dst-config", target, "--out", out, "--data", data, "--method", method]
    words += ["--seed", job.seed]
    words += [word for key in ("depth", "rounding") if key in growth for word in (f"--{key}", growth[key])]
    words += [word for key, value in job.arm.learn.items() for word in (f"--{key}", value)]
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, "-m", "phigrow.cli", *map(str, words)],
            env=environment(), stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False,
            preexec_fn=end_with_parent(),
        )  # fmt: skip
    if done.returncode:
        raise GrowthError(
            f"learning the maps ended with code {done.returncode}",
            where=str(out),
            why=last_words(log),
            fix=f"read {log}, then run the same command again: it learns the maps anew",
        )
    return out
