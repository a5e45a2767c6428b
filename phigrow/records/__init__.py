"""Records of training runs: their fields, a writer, and readers that return columns."""

from phigrow.records.loading import load_run, load_runs
from phigrow.records.run import Run
from phigrow.records.schema import DiagnosticsRecord, EvalRecord, GrowthRecord, RunRecord, StepRecord
from phigrow.records.writer import RecordWriter

__all__ = [
    "DiagnosticsRecord",
    "EvalRecord",
    "GrowthRecord",
    "RecordWriter",
    "Run",
    "RunRecord",
    "StepRecord",
    "load_run",
    "load_runs",
]
