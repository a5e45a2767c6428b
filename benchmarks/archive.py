"""Archive a study: its file, the records of its source and decayed ends, compressed, the sweeps, and the report.

    .venv/bin/python benchmarks/archive.py STUDY.yaml OUT benchmarks/results/DATE-NAME-MACHINE

``OUT`` is the folder in which `phigrow compare` ran. Trunks are left out: every end repeats its trunk's records. Paths
of the machine are written as they would be below ``runs/``. The report is made anew from what was archived, so it shows
what anybody can make of it with `phigrow report`; where only other arms than the baseline ran, there is none.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
from pathlib import Path

from phigrow.measure import report
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
    ends = [folder for folder in (given.archive / "records").iterdir() if folder.name != "source"]
    if study.baseline in {folder.name for folder in ends}:
        report(ends, given.archive / "report", study.baseline)
    for picture in (given.archive / "report").glob("*.p*"):  # SVG shows as much, and differs in text
        picture.unlink()


if __name__ == "__main__":
    main()
