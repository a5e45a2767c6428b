"""Reproduce the demo's figure and table from its committed records: no torch, no training, seconds.

Run: python examples/reproduce_figure.py  (writes curves.pdf, budgets.pdf and speedup.tex into the current folder)
"""

from pathlib import Path

from phigrow.measure import budget_figure, compare, curves, findings, latex, load_runs, save

records = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "2026-11-21-demo-2xAMD-EPYC"
comparison = compare(load_runs(records / arm for arm in ("scratch", "wr", "tile", "lossless")))

for line in findings(comparison):
    print(line)
save(curves(comparison), "curves.pdf")
save(budget_figure(comparison), "budgets.pdf")
Path("speedup.tex").write_text(latex(comparison), encoding="utf-8")
print("wrote curves.pdf, budgets.pdf, speedup.tex")
