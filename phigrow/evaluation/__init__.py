"""Evaluate checkpoints on the shipped benchmark tasks, and compare them document by document.

The package is light to import: torch and transformers are loaded when a model is evaluated.
"""

from phigrow.evaluation.run import evaluate
from phigrow.evaluation.shipped_tasks import SHIPPED
from phigrow.records.evaluations import Evaluation, Metric, difference, read_evaluations

__all__ = ["SHIPPED", "Evaluation", "Metric", "difference", "evaluate", "read_evaluations"]
