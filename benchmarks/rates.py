"""Main arms of both studies at the best of several learning rates, all trained to the end.

    .venv/bin/python benchmarks/rates.py

Reads records that a release carries: benchmarks/results/README.md tells how to get them. `phigrow.measure` compares
runs of different rates only where one sweep chose both. Here full runs of three seeds at each rate are that sweep, so
the script writes it into the settings of each run.
"""

from __future__ import annotations

from pathlib import Path

from phigrow.measure import compare, findings, load_runs

RESULTS = Path(__file__).parent / "results"
BUDGETS = ("300", "600")
STUDIES = {
    "phi-1-small to phi-1": (
        [2e-3, 4e-3],
        {"phi-1": ("scratch", "lossless-state-copy"), "phi-1-rate-4e-3": ("wr", "lossless", "continued", "tile")},
    ),
    "phi-1.5 to phi-2": (
        [1e-3, 2e-3, 4e-3],
        {"phi-2-rate-2e-3": ("scratch", "wr-fresh", "lossless", "lossless-fresh"), "phi-2-rate-4e-3": ("wr",)},
    ),
}
"""Study -> the rates that were trained to the end, and which arm's records are those of its better rate."""


def records_of(better: dict[str, tuple[str, ...]]) -> list[Path]:
    """Return the folders of the arms, which have to be there.

    Raises:
        SystemExit: the records of a study are not unpacked.
    """
    folders = [
        RESULTS / f"2026-11-21-study-{name}-2xAMD-EPYC" / "records" / arm
        for name, arms in better.items()
        for arm in arms
    ]
    for folder in folders:
        if not folder.is_dir():
            raise SystemExit(
                f"error: {folder} is missing. Unpack the archive of records first: see benchmarks/results/README.md"
            )
    return folders


def main() -> None:
    folders = {study: records_of(better) for study, (_, better) in STUDIES.items()}
    for study, (rates, _) in STUDIES.items():
        print(f"{study}, each arm at the better of {', '.join(f'{rate:g}' for rate in rates)}:")
        ends = (end for folder in folders[study] for end in sorted(folder.glob("seed*/*")))
        runs = load_runs(end for end in ends if end.name in BUDGETS)
        for run in runs:
            run.meta["config"]["lr_chosen_by"] = {"lr": rates, "steps": 600, "seeds": [0, 1, 2]}
        print("\n".join(findings(compare(runs))))


if __name__ == "__main__":
    main()
