"""A tracker for accelerate that writes phigrow's records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, on_main_process

from phigrow.errors import GrowthError
from phigrow.integrations.run_recorder import RunRecorder

TRAINING, HELD_OUT = ("loss", "train_loss"), ("eval_loss", "val_loss")
"""Names of values that are recorded: the training loss of a step, and the held-out loss."""


class RecordsTracker(GeneralTracker):  # type: ignore[misc]  # accelerate has no types
    """Write ``records.jsonl`` from ``accelerator.log``, for ``phigrow report``.

    ``loss`` is recorded as the training loss and ``eval_loss`` as the held-out loss, both in nats per token. Every call
    needs ``step``, the number of updates. ``tokens``, ``seconds`` (so far), ``lr`` and ``grad_norm`` are recorded too.

    Args:
        folder: of the records.
        arm: name of the arm.
        init: ``scratch``, or the folder from which the weights were loaded.
        model: the transformers model.
        steps: updates of the whole run, after which the learning rate has decayed.
        tokens_per_step: tokens of an update, over all ranks; None if every call logs ``tokens``.
        seed, seq_len, resume_step, overwrite: as for `RunRecorder`.

    >>> tracker = RecordsTracker("runs/mine", "mine", "grown", model, steps=1000)  # doctest: +SKIP
    >>> accelerator = Accelerator(log_with=tracker)  # doctest: +SKIP
    >>> accelerator.init_trackers("mine", config={"lr": 1e-3})  # doctest: +SKIP
    >>> accelerator.log({"eval_loss": 3.2, "tokens": 4096}, step=1)  # doctest: +SKIP
    """

    name = "phigrow"
    requires_logging_directory = False

    def __init__(
        self,
        folder: str | Path,
        arm: str,
        init: str | Path,
        model: Any,
        *,
        steps: int,
        tokens_per_step: float | None = None,
        seed: int = 0,
        seq_len: int | None = None,
        resume_step: int | None = None,
        overwrite: bool = False,
    ) -> None:
        super().__init__()
        self.tokens_per_step = tokens_per_step
        self._settings: dict[str, Any] = {"steps": steps}
        self._opened: RunRecorder | None = None
        self._arguments = (folder, arm, init, model)
        self._more: dict[str, Any] = {"seed": seed, "seq_len": seq_len, "resume_step": resume_step}
        self._more["overwrite"] = overwrite

    @property
    def tracker(self) -> RunRecorder:
        """The recorder, which is opened at its first use, in the main process."""
        if self._opened is None:
            from accelerate import PartialState

            ranks = PartialState().num_processes
            self._opened = RunRecorder(*self._arguments, settings=self._settings, world_size=ranks, **self._more)
        return self._opened

    @on_main_process  # type: ignore[untyped-decorator]
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Add the ``config`` of ``init_trackers`` to the settings of the run."""
        plain = {key: value for key, value in values.items() if isinstance(value, str | int | float | bool | None)}
        self._settings = {**plain, **self._settings}

    @on_main_process  # type: ignore[untyped-decorator]
    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        """Record the losses among some values; other values are left to other trackers.

        Raises:
            GrowthError: there is no step, or no number of tokens.
        """
        if not any(key in values for key in (*TRAINING, *HELD_OUT)):
            return
        if step is None:
            raise GrowthError("a loss has no step", where="accelerator.log", fix="call accelerator.log(values, step=N)")
        tokens = values.get("tokens", None if self.tokens_per_step is None else self.tokens_per_step * step)
        if tokens is None:
            raise GrowthError(
                "a loss has no number of tokens",
                where="accelerator.log",
                why="costs are counted in tokens",
                fix="log 'tokens', read so far, or give RecordsTracker tokens_per_step",
            )
        seconds = None if "seconds" not in values else float(values["seconds"])
        more = {key: float(values[key]) for key in ("lr", "grad_norm") if key in values}
        for key in TRAINING:
            if key in values and step > 0:
                self.tracker.step(step, float(tokens), float(values[key]), seconds=seconds, **more)
        for key in HELD_OUT:
            if key in values:
                self.tracker.evaluation(step, float(tokens), float(values[key]), seconds=seconds)

    @on_main_process  # type: ignore[untyped-decorator]
    def finish(self) -> None:
        """Close the records."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None
