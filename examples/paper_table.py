"""A paper-style table in ten lines: speedups sunk and charged, from records alone.

Run: python examples/paper_table.py [RUNS]
"""

import sys
from pathlib import Path

from phigrow.measure import compare, frame, load_runs

demo = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "2026-11-21-demo-2xAMD-EPYC"
runs = [run for run in load_runs(sys.argv[1:] or demo) if run.arm != "source"]
table = frame(compare(runs)).filter(regex="^speedup, (tokens|FLOPs), (sunk|charged)$|final").dropna()
print(table.style.format(precision=2).to_latex(hrules=True))
