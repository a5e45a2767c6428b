"""Read TensorBoard's event files, with the package ``tensorboard``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.records.readers.log_table import LogTable

PATTERN = "*.tfevents.*"
"""Names of event files."""

ELAPSED = "elapsed"
"""Column of the seconds since the log began, evaluations and all pauses included."""


def read_events(path: Path) -> LogTable:
    """Read the scalars of an event file, or of all event files in a folder.

    Raises:
        GrowthError: the package tensorboard is not installed, or there are no scalars.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise GrowthError(
            "event files need the package tensorboard",
            where=str(path),
            why=str(error),
            fix='pip install "phigrow[tensorboard]", or pip install tensorboard',
        ) from error
    # Values of a restarted run are kept, and sorted out with those of other formats.
    events = EventAccumulator(str(path), {"scalars": 0, "tensors": 0}, purge_orphaned_data=False)
    events.Reload()
    tags = events.Tags()
    rows: list[tuple[float, dict[str, float]]] = []
    for tag in tags["scalars"]:
        rows += [
            (event.wall_time, {"step": float(event.step), tag: float(event.value)}) for event in events.Scalars(tag)
        ]
    for tag in tags["tensors"]:
        if events.SummaryMetadata(tag).plugin_data.plugin_name == "scalars":
            rows += [
                (event.wall_time, {"step": float(event.step), tag: _value(event)}) for event in events.Tensors(tag)
            ]
    if not rows:
        raise GrowthError(
            "the event files have no scalars", where=str(path), fix="give the folder into which the run logged its loss"
        )
    rows.sort(key=lambda row: row[0])  # stable: events of one moment keep their order
    first = min(rows[0][0], events.FirstEventTimestamp())
    return LogTable(path, "event files", tuple({**row, ELAPSED: time - first} for time, row in rows))


def _value(event: Any) -> float:
    from tensorboard.util import tensor_util

    return float(tensor_util.make_ndarray(event.tensor_proto))
