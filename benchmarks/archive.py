"""Archive a study: its file, its sweeps, and the compressed records of its source and its decayed ends.

    .venv/bin/python benchmarks/archive.py STUDY.yaml OUT benchmarks/results/DATE-NAME-MACHINE

``OUT`` is the folder in which `phigrow compare` ran. Trunks are left out, because each end repeats the records of its
trunk. Paths of the machine are written as they would be below ``runs/``. Reports are not archived: make one with
`phigrow report benchmarks/results/DATE-NAME-MACHINE/records`. `benchmarks/release_records.py` packs records of studies.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
from pathlib import Path

from phigrow.study import jobs_of, load_study, progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("archive", type=Path)
    given = parser.parse_args()
    study = load_study(given.study, out=given.out)
    given.archive.mkdir(parents=True)
    shutil.copy(given.study, given.archive / "study.yaml")
    if (given.out / "sweep.json").is_file():
        shutil.copy(given.out / "sweep.json", given.archive)
    for job in jobs_of(study):
        if job.kind not in ("source", "end") or progress.done(job) is None:
            continue
        folder = given.archive / "records" / job.name
        folder.mkdir(parents=True)
        text = (job.folder / "records.jsonl").read_text(encoding="utf-8").replace(str(given.out), f"runs/{study.name}")
        (folder / "records.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main()
