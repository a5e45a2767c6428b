"""`Trainer`: take the steps of a run, account for them, and let callbacks act between them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from phigrow.checkpoints.run_checkpoints import Progress
from phigrow.corpus.feed import Feed, Position
from phigrow.records.writer import RecordWriter
from phigrow.training.anomalies import NonFinite, SlowRanks, Spikes, slowest
from phigrow.training.lost_ranks import RankWatch
from phigrow.training.monitors import Monitors
from phigrow.training.prefetch import Prefetcher
from phigrow.training.process import StopRequest
from phigrow.training.progress import Reporter
from phigrow.training.resolved import ResolvedRun

if TYPE_CHECKING:
    from phigrow.checkpoints.companions import Companions
    from phigrow.training.per_value_lr import PerValueLR
    from phigrow.training.step import Reading, Stepper
    from phigrow.training.teacher import Teacher, TeacherInfo


class Callback(Protocol):
    """An action that a trainer takes after some of its steps; every rank takes it after the same ones."""

    needs_progress: bool
    """Its step must have been read from the device, which makes the host wait."""
    before_first_step: bool
    """It acts before the first step of a run too."""
    when_stopped: bool
    """It acts where a run was asked to stop."""

    def is_due(self, step: int) -> bool:
        """Return true where it acts after this step; steps count from 1."""
        ...

    def __call__(self, trainer: Trainer, step: int) -> None:
        """Act after a step, or before the first one, which is step 0."""
        ...


class Trainer:
    """The steps of one run on one rank; all ranks call the same methods in the same order.

    Attributes:
        run: the settings as they take effect.
        engine: DeepSpeed's engine, filled.
        feed: the data of every step.
        progress: steps, tokens and seconds, as far as they were read from the device.
        reading: measurements of the last step that was read from the device.
        heldout_loss: of the last evaluation.
        records, monitors: where values go; on rank 0 only.
        export_files: the files beside the weights of the export; None without an export.
        watch: knows the step that this rank is in, for errors about lost ranks.
    """

    def __init__(
        self,
        run: ResolvedRun,
        engine: Any,
        feed: Feed,
        *,
        flops_per_token: float,
        has_dropout: bool,
        progress: Progress | None = None,
        first_step_of_data: int = 0,
        per_value_lr: PerValueLR | None = None,
        teacher: Teacher | None = None,
        teacher_info: TeacherInfo | None = None,
        records: RecordWriter | None = None,
        monitors: Monitors | None = None,
        losses: Sequence[float] = (),
        export_files: Companions | None = None,
    ) -> None:
        config = run.config
        self.run, self.engine, self.feed = run, engine, feed
        self.progress = progress = progress or Progress()
        self.flops_per_token, self.teacher_info = flops_per_token, teacher_info
        self.export_files = export_files
        self.reading: Reading | None = None
        self.heldout_loss: float | None = None
        self.records, self.monitors = records, monitors or Monitors({}, run.out, tokens=0)
        first = run.world.first
        self.reporter = Reporter(speaks=first, steps=config.steps, done=progress.step, every=config.log_every)
        self._first_step_of_data, self._has_dropout, self._per_value_lr = first_step_of_data, has_dropout, per_value_lr
        self._nonfinite, self._spikes = NonFinite(config.nonfinite_limit, config.dtype), Spikes(losses)
        self._slow_ranks = SlowRanks()
        self.watch = RankWatch(run.world, str(run.out))
        self._stepper: Stepper | None = None
        self._teacher = teacher

    @property
    def loss(self) -> float | None:
        """Training loss of the last step that was read."""
        return self.reading.loss if self.reading else None

    @property
    def position(self) -> Position | None:
        """Position of a stream of data after the last step taken."""
        return self._stepper.position if self._stepper else None

    def take_steps(self, callbacks: Sequence[Callback], stop_file: Path | None) -> bool:
        """Take the steps that are left, with the callbacks between them in their order.

        Args:
            callbacks: the same on every rank.
            stop_file: a file that asks the run to stop; on rank 0 only.

        Returns:
            True if the run has ended, False if it was asked to stop before its last step.
        """
        from phigrow.training.step import Stepper

        config, world = self.run.config, self.run.world
        if self.progress.step:
            self.reporter.say(f"resuming at step {self.progress.step}")
        else:
            for callback in callbacks:
                if callback.before_first_step:
                    callback(self, 0)
        stopped, done = False, self.progress.step
        # Requests to stop come first: one may arrive while the first batch is read, and must not kill the rank then.
        with (
            StopRequest(stop_file) as stop,
            contextlib.closing(Prefetcher(self.feed, done, config.steps, world, self.progress.data)) as prefetcher,
        ):
            self._stepper = stepper = Stepper(
                self.engine,
                config,
                world,
                self.feed,
                prefetcher,
                self.run.micro_batch,
                dropout=self._has_dropout,
                stop=stop,
                per_value_lr=self._per_value_lr,
                teacher=self._teacher,
            )
            self._teacher = None  # the stepper lets go of it after the last distilled step
            while done < config.steps and not stopped:
                self.watch.begin(done + 1)
                stepper(done)
                done += 1
                due = [callback.is_due(done) for callback in callbacks]
                reads = any(callback.needs_progress for callback, is_due in zip(callbacks, due, strict=True) if is_due)
                if reads or stepper.due(done):
                    stopped = self._account(stepper)
                for callback, is_due in zip(callbacks, due, strict=True):
                    if is_due or (stopped and callback.when_stopped):
                        self.watch.begin(done)
                        callback(self, done)
        self._say_notices(ended=True)
        return not stopped or self.progress.step == config.steps

    def close(self) -> None:
        """Close the progress bar, the monitors and the records."""
        self.reporter.close()
        self.monitors.close()
        if self.records:
            self.records.close()

    def spent(self) -> dict[str, Any]:
        """Return the columns of a record with the progress and the cost of the run."""
        progress = self.progress
        flops = progress.tokens * self.flops_per_token
        if self.teacher_info:
            flops += self.teacher_info.flops(progress.step, self.run.step_tokens)
        seconds = round(progress.seconds, 4)
        return {"step": progress.step, "tokens": progress.tokens, "flops": flops, "seconds": seconds}

    def _account(self, stepper: Stepper) -> bool:
        """Count, record and report the steps since the last reading; return true if a rank was asked to stop."""
        readings = stepper.read()
        config, step_tokens = self.run.config, self.run.step_tokens
        self._say_notices()
        for reading in readings:
            seconds = self.progress.seconds + reading.seconds
            blocks = (self._first_step_of_data + reading.step) * config.batch
            self.progress = Progress(reading.step, self.progress.tokens + step_tokens, seconds, blocks=blocks)
            self.reading = reading
            speed = step_tokens / reading.seconds
            flags = self._flags(reading)
            if self.records:
                values = {"loss": reading.loss, "lr": reading.lr, "grad_norm": reading.grad_norm}
                if reading.distillation_loss is not None:
                    values["distillation_loss"] = reading.distillation_loss
                rates = {"tokens_per_second": round(speed, 1), "data_wait": round(reading.waited / reading.seconds, 4)}
                own = _slowest_columns(reading)
                self.records.write("step", **self.spent(), **values, **rates, **own, **flags)
                self.monitors.step(self.progress.tokens, values | rates)
            slow = self._slow_ranks.find(reading.own_seconds, reading.seconds) if reading.own_seconds else None
            if slow is not None:
                self.reporter.say(_slow_rank(reading.step, *slow))
            left = (config.steps - reading.step) * seconds / reading.step
            self.reporter.step(reading.step, reading.loss, reading.lr, speed, left)
            if reading.skipped:
                self._nonfinite.check(reading, self.feed.rows(reading.step - 1).tolist())
        return any(reading.asked_to_stop for reading in readings)

    def _say_notices(self, *, ended: bool = False) -> None:
        for text in self.feed.notices(self.run.config.steps, ended=ended):
            self.reporter.say(text)

    def _flags(self, reading: Reading) -> dict[str, Any]:
        """Return the columns of a step's record that mark it as unusual, and report it at once."""
        if self._nonfinite.is_overflow(reading):
            return {"overflow": True}
        if reading.skipped:
            blocks = list(reading.broken) or self.feed.rows(reading.step - 1).tolist()
            name = "loss" if reading.broken else "gradient"
            place = " (blocks in the records)" if self.records else ""
            self.reporter.say(f"step {reading.step}: a {name} is not finite; no update{place}")
            return {"skipped": True, "blocks": blocks}
        if self._spikes.is_spike(reading.loss):
            self.reporter.say(f"step {reading.step}: the loss jumped to {reading.loss:.4f}")
            return {"spike": True}
        return {}


def _slowest_columns(reading: Reading) -> dict[str, float]:
    """Return the columns of a step's record on its slowest rank; empty with one rank."""
    if not reading.own_seconds:
        return {}
    rank, own, median = slowest(reading.own_seconds)
    return {"slowest_rank": rank, "slowest_seconds": round(own, 4), "median_seconds": round(median, 4)}


def _slow_rank(step: int, rank: int, ratio: float) -> str:
    return (
        f"step {step}: rank {rank} needs {ratio:.2f} times the median for its data and forward passes, and all ranks "
        "wait for it. Look on its host for other programs, a slow disk, or a throttled GPU "
        "(nvidia-smi -q -d PERFORMANCE)"
    )
