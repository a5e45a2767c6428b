"""Draw the figure of the README and a table of its study from the committed records, in seconds, without torch.

Run: python examples/reproduce_figure.py  (writes curves.pdf, curves.svg, budgets.pdf and speedup.tex here)
"""

from pathlib import Path

from phigrow.measure import budget_figure, compare, curves, findings, latex, load_runs, save

study = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "2026-11-21-study-phi-2-2xAMD-EPYC"
arms = ("scratch", "continued", "wr", "wr-fresh", "tile", "lossless")
comparison = compare(load_runs(study / "records" / arm for arm in arms))

for line in findings(comparison):
    print(line)
for name in ("curves.pdf", "curves.svg"):
    save(curves(comparison), name)
save(budget_figure(comparison), "budgets.pdf")
save(latex(comparison), "speedup.tex")
print("wrote curves.pdf, curves.svg, budgets.pdf, speedup.tex")
