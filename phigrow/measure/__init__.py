"""Measure the savings of growth: from records of runs to costs at a target loss, intervals, tables and figures.

The package needs neither torch nor the training code. scipy, pandas, matplotlib and rich are loaded on first use.
"""

from phigrow.measure.comparison import compare
from phigrow.measure.crossing import Crossing, cost_to_loss, monotone
from phigrow.measure.estimates import Arm, BudgetPoint, Comparison, Estimate
from phigrow.measure.figures import curves, save
from phigrow.measure.latex_tables import latex
from phigrow.measure.report_files import report
from phigrow.measure.tables import frame, markdown, terminal
from phigrow.measure.trends import budget_figure, diagnostics_figure
from phigrow.measure.wording import findings
from phigrow.records import Run, load_run, load_runs

__all__ = [
    "Arm",
    "BudgetPoint",
    "Comparison",
    "Crossing",
    "Estimate",
    "Run",
    "budget_figure",
    "compare",
    "cost_to_loss",
    "curves",
    "diagnostics_figure",
    "findings",
    "frame",
    "latex",
    "load_run",
    "load_runs",
    "markdown",
    "monotone",
    "report",
    "save",
    "terminal",
]
