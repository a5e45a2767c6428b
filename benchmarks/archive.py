"""Archive a study: its file, its sweeps, and the compressed records of its sources and its decayed ends.

    .venv/bin/python benchmarks/archive.py STUDY.yaml OUT benchmarks/results/DATE-NAME-MACHINE [--every 20]

``OUT`` is the folder in which `phigrow compare` ran. The study may still be running: run the command again, and what
has ended since is added. Trunks are left out, because each end repeats the records of its trunk. With ``--every``, only
every so many records of single steps are kept; evaluations are always kept. Paths of the machine are written as they
would be below ``runs/``. Reports are not archived: make one with
`phigrow report benchmarks/results/DATE-NAME-MACHINE/records`. `benchmarks/release_records.py` packs records of studies.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
from pathlib import Path

from phigrow.files.atomic import atomic_json
from phigrow.files.shipped import find_shipped
from phigrow.study import jobs_of, load_study, progress
from phigrow.study.results import sweep_results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--every", type=int, default=1, help="keep the records of every so many steps")
    given = parser.parse_args()
    study = load_study(given.study, out=given.out)
    given.archive.mkdir(parents=True, exist_ok=True)
    shutil.copy(find_shipped(str(given.study), "study"), given.archive / "study.yaml")
    jobs, current = jobs_of(study), set()
    if (sweeps := sweep_results(study, jobs)) is not None:
        atomic_json(given.archive / "sweep.json", sweeps)
    for job in jobs:
        if job.kind not in ("source", "end") or progress.done(job) is None:
            continue
        folder = given.archive / "records" / job.name
        current.add(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = (job.folder / "records.jsonl").read_text(encoding="utf-8").replace(str(given.out), f"runs/{study.name}")
        kept = [line for line in text.splitlines(keepends=True) if _kept(line, given.every)]
        (folder / "records.jsonl.gz").write_bytes(gzip.compress("".join(kept).encode(), mtime=0))
    for file in (given.archive / "records").rglob("records.jsonl.gz"):
        if file.parent not in current:  # of a run that a better learning rate replaced
            print(f"removed {file.parent}: the study has no such run any more")
            shutil.rmtree(file.parent)
    print(f"{len(current)} runs in {given.archive}")


def _kept(line: str, every: int) -> bool:
    record = json.loads(line)
    return record["type"] != "step" or record["step"] % every == 0 or record["step"] == 1


if __name__ == "__main__":
    main()
