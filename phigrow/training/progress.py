"""Progress of a run: a live bar on a terminal, plain lines elsewhere; rank 0 only."""

from __future__ import annotations

import sys
from typing import Any


class Reporter:
    """Shows loss, learning rate, tokens a second and the time that is left."""

    def __init__(self, *, speaks: bool, steps: int, done: int, every: int) -> None:
        self.speaks, self.steps, self.every = speaks, steps, every
        self._bar: Any = None
        self._task: Any = None
        if speaks and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
            )
            self._task = self._bar.add_task("train", total=steps, completed=done, text="")
            self._bar.start()

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self.speaks:
            self._bar.console.print(text, markup=False, highlight=False) if self._bar else print(text, flush=True)

    def step(self, step: int, loss: float, lr: float, tokens_per_second: float, seconds_left: float) -> None:
        """Report one finished step."""
        text = f"loss {loss:.4f}  lr {lr:.2e}  {tokens_per_second:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        elif step % self.every == 0 or step == self.steps:
            self.say(f"step {step}/{self.steps}  {text}  ETA {clock(seconds_left)}")

    def close(self) -> None:
        """Take the bar down."""
        if self._bar:
            self._bar.stop()


def clock(seconds: float) -> str:
    """Seconds as ``h:mm:ss``, or ``m:ss`` below an hour.

    >>> clock(3725), clock(61)
    ('1:02:05', '1:01')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
