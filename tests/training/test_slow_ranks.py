"""A rank that is slower than the others: its own time is measured, recorded, and reported where it is lasting."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scenarios import SETTINGS

from phigrow.records.writer import RecordWriter
from phigrow.training import RunConfig
from phigrow.training.anomalies import SlowRanks, slowest
from phigrow.training.prefetch import Fetched
from phigrow.training.process import World
from phigrow.training.step import OwnTime, Reading, Stepper
from phigrow.training.trainer import Trainer

CPU = torch.device("cpu")


class FakeEngine:
    """An engine whose forward pass takes a known time, and whose backward pass and step wait for other ranks."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.optimizer, self.basic_optimizer = object(), None
        self.lr_scheduler = SimpleNamespace(step=lambda: None)

    def __call__(self, blocks: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return torch.ones(())

    def get_lr(self) -> list[float]:
        return [1e-3]

    def backward(self, loss: torch.Tensor) -> None:
        time.sleep(0.05)

    def step(self) -> None:
        pass

    def get_global_grad_norm(self) -> float:
        return 2.0

    def was_step_applied(self) -> bool:
        return True


def readings(world: World, monkeypatch: Any, **settings: Any) -> list[Reading]:
    """Three steps of rank 0 of ``world``; the other ranks need three times as long as it."""
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: None)

    def gather(out: torch.Tensor, mine: torch.Tensor) -> None:
        out.copy_(torch.cat([mine, *[3 * mine] * (world.size - 1)]))

    monkeypatch.setattr("torch.distributed.all_gather_into_tensor", gather)
    config = RunConfig(**SETTINGS | {"batch": 4 * world.size, "log_every": 3} | settings)
    waits = iter((0.5, 0.0, 0.0))
    prefetcher = SimpleNamespace(take=lambda step: Fetched(torch.zeros(4, 3, dtype=torch.int64), None, next(waits)))
    feed = SimpleNamespace(rows=lambda step: np.arange(config.batch))
    stop = SimpleNamespace(asked=False)
    stepper = Stepper(FakeEngine(0.02), config, world, feed, prefetcher, 2, dropout=False, stop=stop)  # type: ignore[arg-type]
    for step in range(3):
        stepper(step)
    return stepper.read()


def test_data_and_forward_passes_count_and_waiting_for_other_ranks_does_not(monkeypatch):
    first, *rest = readings(World(0, 2, 0, 2, CPU), monkeypatch, zero=1)
    for reading, waited in ((first, 0.5), *((each, 0.0) for each in rest)):
        own, other = reading.own_seconds
        assert other == pytest.approx(3 * own)
        assert waited + 0.04 <= own < waited + 0.09  # two passes of 0.02 s; the two backward passes take 0.1 s
        assert (reading.grad_norm, reading.broken) == (2.0, ())


def test_at_stage_3_only_the_data_counts(monkeypatch):
    found = readings(World(0, 3, 0, 3, CPU), monkeypatch, zero=3)
    assert [reading.own_seconds for reading in found] == [pytest.approx((0.5, 1.5, 1.5)), (0, 0, 0), (0, 0, 0)]


def test_one_rank_has_no_own_time(monkeypatch):
    assert [reading.own_seconds for reading in readings(World(0, 1, 0, 1, CPU), monkeypatch, zero=1)] == [()] * 3


def test_events_of_a_gpu_are_read_after_the_steps_only(monkeypatch):
    calls: list[str] = []

    class Event:
        count = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            Event.count += 1
            self.number = Event.count

        def record(self) -> None:
            calls.append(f"record {self.number}")

        def synchronize(self) -> None:
            calls.append(f"wait {self.number}")

        def elapsed_time(self, other: Event) -> float:
            assert calls[-1] == "wait 6"
            return 1000.0 * (other.number - self.number)

    monkeypatch.setattr("torch.cuda.Event", Event)
    own = OwnTime(World(0, 2, 0, 2, torch.device("cuda")), 2)
    for passes, waited in ((2, 0.25), (1, 0.0)):
        for _ in range(passes):
            own.end(own.begin())
        own.close_step(waited)
    assert calls == [f"record {number}" for number in range(1, 7)]
    assert own.take() == [2.25, 1.0]
    assert own.take() == []


def test_a_rank_is_slow_if_it_is_slow_nearly_always():
    steady, rare = SlowRanks(), SlowRanks()
    found = [steady.find((1.0, 1.3, 1.0), 2.0) for _ in range(300)]
    assert found == [None] * 99 + [(1, pytest.approx(1.3))] + [None] * 200  # reported once
    assert {rare.find((1.0, 9.0 if step % 2 else 1.0, 1.1), 9.5) for step in range(300)} == {None}
    even = SlowRanks()
    assert {even.find((1.0, 1.1, 1.0), 2.0) for step in range(300)} == {None}
    assert [steady.find((1.0, 1.0, 2.0), 3.0) for _ in range(100)].count((2, 2.0)) == 1


def test_a_rank_that_costs_less_than_a_fiftieth_of_the_time_is_no_slow_rank():
    """The own times at ZeRO 3 are the waits for data only: half a millisecond is no matter in a step of 0.1 s."""
    cheap, costly = SlowRanks(), SlowRanks()
    assert {cheap.find((0.0001, 0.0001, 0.0006), 0.1) for _ in range(300)} == {None}
    assert [costly.find((0.0001, 0.0001, 0.0031), 0.1) for _ in range(100)][-1] == (2, pytest.approx(31))


def test_the_slowest_rank_is_recorded_and_a_lasting_one_is_printed(tmp_path: Path, capsys, monkeypatch):
    config = RunConfig(**SETTINGS | {"steps": 120, "log_every": 1000})
    world = World(0, 4, 0, 2, CPU)
    run: Any = SimpleNamespace(config=config, world=world, out=tmp_path, step_tokens=10, micro_batch=2)
    feed: Any = SimpleNamespace(
        notices=lambda steps, ended=False: [],
        seek=lambda step, position: None,
        read=lambda step, rank, ranks: (np.zeros((4, 3), np.int64), None),
        close=lambda: None,
    )
    trainer = Trainer(
        run, None, feed, flops_per_token=1.0, has_dropout=False, records=RecordWriter(tmp_path, run={"arm": "a"})
    )
    steps = [
        Reading(step, 0.1, 0.0, 2.0, 1e-3, 1.0, False, (), own_seconds=(0.05, 0.05, 0.05, 0.08))
        for step in range(1, 121)
    ]

    class ReadSteps:
        """A stepper that takes no steps and reads those above after the last one."""

        position = None

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def __call__(self, step: int) -> None:
            pass

        def due(self, done: int) -> bool:
            return done == 120

        def read(self) -> list[Reading]:
            return steps

    monkeypatch.setattr("phigrow.training.step.Stepper", ReadSteps)
    trainer.take_steps([], None)
    trainer.close()
    last = json.loads((tmp_path / "records.jsonl").read_text().splitlines()[-1])
    assert (last["slowest_rank"], last["slowest_seconds"], last["median_seconds"]) == (3, 0.08, 0.05)
    lines = [line for line in capsys.readouterr().out.splitlines() if "median" in line]
    assert len(lines) == 1
    assert lines[0].startswith("step 100: rank 3 needs 1.60 times the median")


def test_the_slowest_of_one_value():
    assert slowest((0.5,)) == (0, 0.5, 0.5)
