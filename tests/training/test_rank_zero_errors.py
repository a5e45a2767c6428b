"""Errors of what rank 0 alone does at the start of a run: every rank raises them, so none waits for another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scenarios import SETTINGS, FakeBlocks

from phigrow.errors import GrowthError
from phigrow.training import RunConfig, loop
from phigrow.training.initial_state import InitialState
from phigrow.training.process import World

DAMAGE = GrowthError("the disk is full", where="somewhere", fix="free some space")


def refuse(*_: Any, **__: Any) -> Any:
    raise DAMAGE


def build(out: Path, rank: int) -> Any:
    world = World(rank, 2, rank, 2, torch.device("cpu"))
    config = RunConfig(**SETTINGS | {"out": str(out)})
    run: Any = SimpleNamespace(
        config=config,
        world=world,
        out=out,
        export=None,
        engine={},
        attention=SimpleNamespace(name="sdpa"),
        optimizer_device="cpu",
    )
    return loop.build_run(run, None, FakeBlocks(), InitialState(), None, {})  # type: ignore[arg-type]


@pytest.fixture
def as_rank(monkeypatch) -> Callable[[int], list[Any]]:
    """Give a rank to be, get the messages of rank 0 that no rank has taken yet; nothing is trained."""
    messages: list[Any] = []
    state = SimpleNamespace(rank=0)

    def broadcast(answer: list[Any], src: int) -> None:
        if state.rank == 0:
            messages.append(copy.deepcopy(answer))
        else:
            answer[:] = messages.pop(0)

    monkeypatch.setattr("torch.distributed.broadcast_object_list", broadcast)
    for name in ("phigrow.training.model.build_model", "phigrow.training.engine.make_engine"):
        monkeypatch.setattr(name, lambda *_, **__: None)
    monkeypatch.setattr("phigrow.training.weights.masters_from_scratch", lambda *_: None)
    monkeypatch.setattr(loop, "make_per_value_lr", lambda *_: None)
    monkeypatch.setattr(loop, "Trainer", lambda *_, **more: more)
    monkeypatch.setattr(loop, "Monitors", lambda *_, **__: None)
    monkeypatch.setattr(loop, "opening", lambda *_: "the run begins")
    monkeypatch.setattr(loop, "run_record", lambda *_: {})
    monkeypatch.setattr(loop, "RecordWriter", lambda *_, **__: "the records")
    monkeypatch.setattr(FakeBlocks, "save_tokenizer", lambda _: None)

    def become(rank: int) -> list[Any]:
        state.rank = rank
        return messages

    return become


@pytest.mark.parametrize("place", ["the tokenizer", "the opening", "the run record", "the records"])
def test_every_rank_raises_what_stops_rank_0(as_rank, tmp_path, monkeypatch, place):
    owner, name = {
        "the tokenizer": (FakeBlocks, "save_tokenizer"),
        "the opening": (loop, "opening"),
        "the run record": (loop, "run_record"),
        "the records": (loop, "RecordWriter"),
    }[place]
    monkeypatch.setattr(owner, name, refuse)
    for rank in (0, 1):
        messages = as_rank(rank)
        with pytest.raises(GrowthError, match="the disk is full"):
            build(tmp_path, rank)
    assert messages == []  # the other rank took every message, and waits for none


def test_only_rank_0_has_the_records(as_rank, tmp_path, capsys):
    """Negative control of the test above: nothing is raised where nothing fails."""
    as_rank(0)
    assert build(tmp_path, 0)["records"] == "the records"
    assert capsys.readouterr().out == "the run begins\n"
    messages = as_rank(1)
    assert build(tmp_path, 1)["records"] is None
    assert capsys.readouterr().out == ""
    assert messages == []
