"""Runs that follow each other in one process give their memory back, at every ZeRO stage."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from scenarios import SETTINGS, FakeBlocks

from phigrow.training import RunConfig, loop, train, zero

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
"""torch warns about its own code, which DeepSpeed's engines in bf16 import."""

RUNS = 3


@pytest.fixture
def engines(monkeypatch) -> list[weakref.ref[Any]]:
    """Weak references to the engines of the runs that follow, and to their parameters."""
    kept: list[weakref.ref[Any]] = []
    build = loop.build_run

    def logged(*words: Any) -> Any:
        trainer = build(*words)
        kept.extend(map(weakref.ref, (trainer.engine, trainer.engine.module, *trainer.engine.module.parameters())))
        return trainer

    monkeypatch.setattr(loop, "build_run", logged)
    monkeypatch.setattr(FakeBlocks, "save_tokenizer", lambda _: None)
    return kept


def live_tensors() -> int:
    """Count the tensors of this process, after gloo's threads have let go of those that they reduced last."""
    for _ in range(8):
        torch.distributed.all_reduce(torch.zeros(1))
    gc.collect()
    return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())


def trains(folder: Any, stage: int, dtype: str) -> list[int]:
    """Train runs one after another, and count the live tensors after each."""
    counts = []
    for number in range(RUNS):
        own = {"out": str(folder / str(number)), "zero": stage, "dtype": dtype, "steps": 2, "save_every": 2}
        train(RunConfig(**SETTINGS | own), FakeBlocks())
        counts.append(live_tensors())
    return counts


@pytest.mark.parametrize(("dtype", "stage"), [("fp32", 0), ("bf16", 1), ("bf16", 2), ("bf16", 3)])
def test_a_run_leaves_no_tensor_to_the_next(alone, engines, tmp_path, dtype, stage):
    first, *others = trains(tmp_path, stage, dtype)
    assert len(engines) > RUNS * 20
    assert [each for each in engines if each() is not None] == []
    assert max(others) <= first


def test_engines_that_are_not_released_are_seen(alone, engines, tmp_path, monkeypatch):
    """The negative control: at stage 3 DeepSpeed keeps every engine that nobody takes out of its caches."""
    taken: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(zero, "release", taken.append)
        counts = trains(tmp_path, 3, "bf16")
    assert counts[0] < counts[1] < counts[2]
    for engine in taken:
        zero.release(engine)
    taken.clear()
    del engine
    assert live_tensors() < counts[0]
    assert all(each() is None for each in engines)
