"""A progress bar on stderr."""

from __future__ import annotations

from collections.abc import Callable


class progress_bar:
    """Show a progress bar while a block runs; a context that gives the callback which advances the bar.

    Args:
        description: text before the bar.
        total: calls of the callback at the end.
        shown: False shows nothing.
    """

    def __init__(self, description: str, total: int, shown: bool) -> None:
        self.description, self.total, self.shown = description, total, shown

    def __enter__(self) -> Callable[[object], None]:
        if not self.shown:
            return lambda _: None
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))
        self._bar.start()
        task = self._bar.add_task(self.description, total=self.total)
        return lambda _: self._bar.advance(task)

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self._bar.stop()
