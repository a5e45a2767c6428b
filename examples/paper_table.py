"""Print a LaTeX table of speedups without (sunk) and with (charged) the source's training, from records alone.

Run: python examples/paper_table.py [RUNS]
"""

import sys
from pathlib import Path

from phigrow.measure import compare, frame, load_runs

results = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
runs = load_runs(sys.argv[1:] or results / "2026-11-21-study-phi-2-2xAMD-EPYC" / "records")
arms = compare([run for run in runs if run.arm != "source"])
table = frame(arms).filter(regex="^speedup, (tokens|FLOPs), (sunk|charged)$|final").dropna()
print(table.style.format(precision=2).to_latex(hrules=True))
