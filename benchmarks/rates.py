"""Every main arm of the study of phi-1-small to phi-1 at the better of two learning rates, both trained to the end.

    .venv/bin/python benchmarks/rates.py

Reads the committed records. `phigrow.measure` pairs runs of different rates only where one sweep chose them; here three
full runs at each of two rates are that sweep, which is said to it.
"""

from __future__ import annotations

from pathlib import Path

from phigrow.measure import compare, findings, load_runs

RESULTS = Path(__file__).parent / "results"
STUDY = RESULTS / "2026-11-21-study-phi-1-2xAMD-EPYC" / "records"  # at 2e-3, lossless-state-copy at 4e-3
HIGHER = RESULTS / "2026-11-21-study-phi-1-rate-4e-3-2xAMD-EPYC" / "records"
BETTER = {STUDY: ("scratch", "lossless-state-copy"), HIGHER: ("wr", "lossless", "continued", "tile")}
BUDGETS = ("300", "600")


def main() -> None:
    folders = [records / arm for records, arms in BETTER.items() for arm in arms]
    runs = load_runs(end for folder in folders for end in sorted(folder.glob("seed*/*")) if end.name in BUDGETS)
    for run in runs:
        run.meta["config"]["lr_chosen_by"] = {"lr": [2e-3, 4e-3], "steps": 600, "seeds": [0, 1, 2]}
    print("\n".join(findings(compare(runs))))


if __name__ == "__main__":
    main()
