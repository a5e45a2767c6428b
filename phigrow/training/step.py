"""One optimizer step, and its measurements, which stay on the device until logging asks for them.

Reading a value from a GPU makes the host wait until the GPU has computed it, and the GPU then wait for the host. So the
loss, the norm and a request to stop are written into a buffer on the device, and all steps since the last reading are
read at once. DeepSpeed itself reads the gradient norm where it clips and decides whether to skip, once or twice a step.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from phigrow.training.configuration import RunConfig
from phigrow.training.device_copy import to_device

if TYPE_CHECKING:
    from phigrow.corpus.feed import Feed, Position
    from phigrow.training.per_value_lr import PerValueLR
    from phigrow.training.prefetch import Prefetcher
    from phigrow.training.process import StopRequest, World
    from phigrow.training.teacher import Teacher

READ_SECONDS = 10.0
"""Longest time between two readings of slow steps. At a reading the loop sees a request to stop."""

LARGEST_WINDOW = 1000
"""Largest number of steps in the buffer."""

_LOSS, _STOP, _SECONDS, _WAITED, _DISTILLATION, _BROKEN = range(6)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of the dropout of a step on a rank. It is below 2^64, because torch takes no larger one.

    >>> dropout_seed(0, 1, 2), dropout_seed(10**30, 0, 0) < 2**64
    (4098, True)
    """
    return ((seed * 1_000_003 + step) * 4096 + rank) % 2**64


@dataclass(frozen=True)
class Reading:
    """Measurements of one step.

    Attributes:
        step: steps done, this one included.
        seconds: that it took.
        waited: seconds of them that ranks waited for data, on average.
        loss: cross entropy in nats per token, over the whole batch.
        distillation_loss: divergence from the teacher in nats per token; None in a step without one.
        lr: learning rate of its update.
        grad_norm: global 2-norm of the gradients, before clipping.
        asked_to_stop: whether any rank was, by then.
        broken: blocks of the micro-batches whose loss was not finite.
        own_seconds: seconds of each rank for its data and forward passes, see `OwnTime`; empty with one rank.
    """

    step: int
    seconds: float
    waited: float
    loss: float
    lr: float
    grad_norm: float
    asked_to_stop: bool
    broken: tuple[int, ...]
    distillation_loss: float | None = None
    own_seconds: tuple[float, ...] = ()

    @property
    def skipped(self) -> bool:
        """The update was left out, on every rank, because a gradient was not finite."""
        return not math.isfinite(self.grad_norm)


class OwnTime:
    """Seconds that this rank needs for its share of each step, before it waits for another rank.

    The own time of a step is the wait for data plus the forward passes. At ZeRO 0 to 2 no collective runs in them, so a
    slow device, host or disk shows. At stage 3 forward passes gather weights from all ranks, so only the wait for data
    counts. GPUs are timed by events, which are read where the loop reads the device anyway.
    """

    def __init__(self, world: World, stage: int) -> None:
        self.times_passes = world.size > 1 and stage < 3
        self._events = world.device.type == "cuda"
        self._passes: list[tuple[Any, Any]] = []
        self._steps: list[tuple[float, list[tuple[Any, Any]]]] = []

    def begin(self) -> Any:
        """Note that a forward pass begins, and return this moment."""
        return self._now() if self.times_passes else None

    def end(self, begun: Any) -> None:
        """Note that the forward pass has ended that began at this moment."""
        if self.times_passes:
            self._passes.append((begun, self._now()))

    def close_step(self, waited: float) -> None:
        """Note that the passes since the last call were those of one step, with the seconds that it waited for data."""
        self._steps.append((waited, self._passes))
        self._passes = []

    def take(self) -> list[float]:
        """Return the seconds of each step since the last call; on a GPU this waits for the last forward pass."""
        if self._events and self._steps and self._steps[-1][1]:
            self._steps[-1][1][-1][1].synchronize()
        out = [waited + sum(self._seconds(*each) for each in passes) for waited, passes in self._steps]
        self._steps = []
        return out

    def _now(self) -> Any:
        if not self._events:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _seconds(self, begun: Any, ended: Any) -> float:
        return float(begun.elapsed_time(ended) / 1000 if self._events else ended - begun)


class Stepper:
    """The optimizer steps of one rank and their measurements; all ranks call the same methods in the same order."""

    def __init__(
        self,
        engine: Any,
        config: RunConfig,
        world: World,
        feed: Feed,
        prefetcher: Prefetcher,
        micro_batch: int,
        *,
        dropout: bool,
        stop: StopRequest,
        per_value_lr: PerValueLR | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.engine, self.config, self.world, self.micro_batch = engine, config, world, micro_batch
        self.feed, self.prefetcher, self.dropout, self.stop = feed, prefetcher, dropout, stop
        self.per_value_lr, self.teacher = per_value_lr, teacher
        self.position: Position | None = None  # in the data, after the last step taken
        self.passes = config.batch // (world.size * micro_batch)
        self.every = min(config.log_every, LARGEST_WINDOW)
        self._sums = torch.zeros(self.every, _BROKEN + world.size * self.passes, device=world.device)
        self._norms = torch.zeros(self.every, 1, device=world.device)
        self._waiting: list[tuple[int, float, float]] = []  # step, lr, seconds
        self._own = OwnTime(world, config.stage)

    def __call__(self, step: int) -> None:
        """Take one optimizer step; ``step`` counts from 0."""
        began = time.perf_counter()
        engine, world = self.engine, self.world
        if self.dropout:  # the seed depends on the step, so that a resumed run draws the same numbers
            torch.manual_seed(dropout_seed(self.config.seed, step, world.rank))
        if self.per_value_lr:
            self.per_value_lr.step = step
        if step >= self.config.teacher_steps:
            self.teacher = None  # gives its memory back
        lr = float(engine.get_lr()[0])
        row = len(self._waiting)
        sums = self._sums[row].zero_()
        fetched = self.prefetcher.take(step)
        self.position = fetched.position
        for index, part in enumerate(torch.split(fetched.blocks, self.micro_batch)):
            begun = self._own.begin()
            loss, value, divergence = self._losses(to_device(part, world.device))
            self._own.end(begun)
            finite = loss.detach().isfinite()
            sums[_LOSS] += value / (self.passes * world.size)
            if divergence is not None:
                sums[_DISTILLATION] += divergence / (self.passes * world.size)
            sums[_BROKEN + world.rank * self.passes + index] = finite.logical_not()
            # An infinite loss can have finite gradients. NaN spreads to all ranks when gradients are reduced, and
            # DeepSpeed then skips the step. This needs no reading from the device, and a factor of 1 changes no bit.
            engine.backward(loss * torch.where(finite, 1.0, math.nan))
            if index == self.passes - 1 and engine.optimizer is engine.basic_optimizer:
                self._norms[row] = self._guard()
            engine.step()
        if engine.optimizer is not engine.basic_optimizer:
            self._norms[row] = engine.get_global_grad_norm()
            if not engine.was_step_applied():  # the schedule is a function of the step, whatever was skipped
                engine.lr_scheduler.step()
        if self.stop.asked:
            sums[_STOP] = 1.0
        took = time.perf_counter() - began
        sums[_SECONDS] = took / world.size
        sums[_WAITED] = fetched.waited / world.size
        self._own.close_step(fetched.waited)
        self._waiting.append((step, lr, took))

    def _losses(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the loss to differentiate, the cross entropy, and the divergence from the teacher, if there is one."""
        if self.teacher is None:
            loss = self.engine(blocks)
            return loss, loss.detach().float(), None
        taught = self.teacher(blocks)
        loss, entropy, divergence = self.engine(blocks, teacher=taught, share=self.config.teacher_weight)
        return loss, entropy.float(), divergence.float()

    def _guard(self) -> torch.Tensor:
        """Return the norm in fp32 without ZeRO, where DeepSpeed keeps none, and let AdamW skip if it is not finite."""
        parameters = [p for p in self.engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        optimizer = self.engine.basic_optimizer
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = norm.isfinite().logical_not().float()
        elif not norm.isfinite():
            for parameter in parameters:
                parameter.grad = None
        return norm

    def due(self, done: int) -> bool:
        """Return true if the buffer must be read after ``done`` steps; the same on every rank."""
        return len(self._waiting) >= self.every or done % self.config.log_every == 0

    def read(self) -> list[Reading]:
        """Return the measurements of the steps since the last reading, in order; this waits for the device."""
        count = len(self._waiting)
        if not count:
            return []
        began = time.perf_counter()
        sums, columns = self._sums[:count], [self._norms[:count]]
        own = self._own.take()
        if self.world.size > 1:
            dist.all_reduce(sums)
            columns.insert(0, self._of_all_ranks(own))
        values = torch.cat([sums, *columns], dim=1).tolist()
        waited = time.perf_counter() - began
        ranks = self.world.size if self.world.size > 1 else 0
        last = -1 - ranks  # the column after those of broken micro-batches
        readings = [
            Reading(
                step=step + 1,
                seconds=seconds + (waited if index == count - 1 else 0.0),
                waited=row[_WAITED],
                loss=row[_LOSS],
                lr=lr,
                grad_norm=row[-1],
                asked_to_stop=row[_STOP] > 0,
                broken=self._broken(step, row[_BROKEN:last]),
                distillation_loss=row[_DISTILLATION] if step < self.config.teacher_steps else None,
                own_seconds=tuple(row[last:-1]),
            )
            for index, ((step, lr, seconds), row) in enumerate(zip(self._waiting, values, strict=True))
        ]
        self._waiting.clear()
        mean = sum(row[_SECONDS] for row in values) / count  # of all ranks, so that they agree on the next reading
        self.every = max(1, min(len(self._sums), int(READ_SECONDS / max(mean, 1e-9))))
        return readings

    def _of_all_ranks(self, own: list[float]) -> torch.Tensor:
        """Return the own seconds of every step on every rank, ``[steps, ranks]``."""
        mine = torch.tensor(own, device=self.world.device)
        out = torch.empty(self.world.size * len(own), device=self.world.device)
        dist.all_gather_into_tensor(out, mine)
        return out.reshape(self.world.size, len(own)).T

    def _broken(self, step: int, flags: list[float]) -> tuple[int, ...]:
        if not any(flags):
            return ()
        parts = self.feed.rows(step).reshape(len(flags), self.micro_batch)
        return tuple(int(row) for part, flag in zip(parts, flags, strict=True) if flag for row in part)
