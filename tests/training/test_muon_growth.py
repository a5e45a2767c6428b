"""Muon's momentum grown with the model: by the law of gradients, and into the engines of every stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import losses
from scenarios import SETTINGS, TINY, FakeBlocks

import phigrow
from phigrow.checkpoints import universal
from phigrow.checkpoints.integrity import digests, read_marker, write_marker
from phigrow.checkpoints.run_checkpoints import marked_checkpoints
from phigrow.errors import GrowthError
from phigrow.training import RunConfig, train

# What torch's own modules say when DeepSpeed imports them in this process.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

LARGER = TINY | {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 100}
LARGER |= {"num_hidden_layers": 3}
FIRST = {"save_every": 3, "export": "export", "export_dtype": "fp32", "eval_every": 0, "log_every": 1}
MUON = {"optimizer": "muon", "lr": 0.02}


def run(out: Path, **settings: Any) -> Path:
    train(RunConfig(**SETTINGS | {"out": str(out), "zero": 1} | settings), FakeBlocks())
    return out


@pytest.fixture(scope="module")
def adam(alone, tmp_path_factory) -> Path:
    """Six steps of AdamW."""
    return run(tmp_path_factory.mktemp("adam") / "source", **FIRST)


@pytest.fixture(scope="module")
def muon(alone, tmp_path_factory) -> Path:
    """Six steps of Muon."""
    return run(tmp_path_factory.mktemp("muon") / "source", **FIRST, **MUON)


def is_hidden(name: str) -> bool:
    return ".layers." in name and name.endswith(".weight") and "layernorm" not in name


def as_if_from_muon(folder: Path, out: Path) -> Path:
    """Copy AdamW's universal folder, with the first moments of matrices inside layers as Muon's momentum."""
    shutil.copytree(folder, out)
    for name in filter(is_hidden, universal.parameters(out)):
        place = out / "zero" / name
        (place / "exp_avg.pt").rename(place / "momentum_buffer.pt")
        (place / "exp_avg_sq.pt").unlink()
    content = json.loads((out / universal.STATE).read_text())
    content["states"] = {"momentum_buffer": 1, "exp_avg": 1, "exp_avg_sq": 2}
    (out / universal.STATE).write_text(json.dumps(content))
    marker = {key: value for key, value in read_marker(out).items() if key != "files"}
    write_marker(out, marker, digests(out))
    return out


@pytest.mark.parametrize("method", ["lossless", "wr", "isometric"])
def test_momentum_grows_as_gradients_do(adam, tmp_path, method):
    checkpoint = marked_checkpoints(adam)[0][-1]
    universal.convert(checkpoint.folder, tmp_path / "adam", checkpoint.marker)
    grown = phigrow.expand(adam / "export", LARGER, tmp_path / "grown", method=method)
    wanted = phigrow.grow_optimizer(tmp_path / "adam", grown, tmp_path / "wanted")
    found = phigrow.grow_optimizer(as_if_from_muon(tmp_path / "adam", tmp_path / "muon"), grown, tmp_path / "found")
    names = universal.parameters(found)
    assert names == universal.parameters(wanted)
    for name in names:
        # `tests/growth/test_moments.py` holds AdamW's first moments against gradients of the grown model.
        if is_hidden(name):
            assert universal.states_of(found, name) == ("momentum_buffer",)
            pairs = [("momentum_buffer", "exp_avg")]
        else:
            assert universal.states_of(found, name) == ("exp_avg", "exp_avg_sq")
            pairs = [("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")]
        for mine, theirs in pairs:
            assert torch.equal(universal.stored(found, name, mine), universal.stored(wanted, name, theirs)), name
    moved = [name for name in filter(is_hidden, names) if universal.stored(found, name, "momentum_buffer").any()]
    assert len(moved) > 10


def test_every_stage_starts_with_the_grown_momentum(muon, tmp_path):
    grown = phigrow.expand(muon / "export", LARGER, tmp_path / "grown", method="tile")
    start = {"init": str(grown), "model": None, "steps": 4, "warmup": 0, "log_every": 1, **MUON}
    for state in ("scale", "reset"):
        optimizer = phigrow.grow_optimizer(muon, grown, tmp_path / state, state=state)
        for stage in (1, 2, 3) if state == "scale" else (1,):
            run(tmp_path / f"{state}-{stage}", **start, init_optimizer=str(optimizer), data_start=48, zero=stage)
    first = losses(tmp_path / "scale-1")
    for stage in (2, 3):
        np.testing.assert_allclose(losses(tmp_path / f"scale-{stage}"), first, rtol=5e-5)
    # Negative control: without momentum, the second step reads another model.
    assert abs(losses(tmp_path / "reset-1")[1] / first[1] - 1) > 1e-3


def test_state_of_another_optimizer_is_refused(muon, adam, tmp_path):
    grown = phigrow.expand(adam / "export", LARGER, tmp_path / "grown", method="tile")
    optimizer = phigrow.grow_optimizer(adam, grown, tmp_path / "state")
    with pytest.raises(GrowthError, match="muon needs momentum_buffer, exp_avg, exp_avg_sq"):
        run(tmp_path / "run", init=str(grown), model=None, init_optimizer=str(optimizer), **MUON)
