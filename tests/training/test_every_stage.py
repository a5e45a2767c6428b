"""At every ZeRO stage: resumed runs, what bf16 runs start from, and in which data type ranks sum gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import assert_continued
from safetensors.torch import load_file
from scenarios import TINY

pytestmark = pytest.mark.slow
NAMES = ("sums", "bf16-sums")


def scenarios(folder: Path, ranks: int) -> list[dict[str, Any]]:
    if ranks != 2:
        return []
    runs: list[dict[str, Any]] = []
    for stage in (1, 2):
        settings = {"zero": stage, "dtype": "bf16", "save_every": 2, "keep": 1, "export": "export"}
        runs.append({"out": f"whole-zero{stage}", **settings})
        runs.append({"out": f"cut-zero{stage}", **settings, "stop_at": 4 if stage % 2 else 3, "log_every": 1})
        runs.append({"out": f"cut-zero{stage}", **settings})
    source = saved_model(folder / "source")
    rounded = {"model": None, "init": str(source), "dtype": "bf16", "export": "export", "export_dtype": "fp32"}
    # A learning rate of 0: what is exported is what the run started from.
    still = rounded | {"lr": 0.0, "steps": 1, "warmup": 0, "eval_every": 0}
    runs += [{"out": f"masters-zero{stage}", "zero": stage, **still} for stage in range(4)]
    drawn = still | {"init": "scratch", "model": TINY}
    runs += [{"out": f"drawn-zero{stage}", "zero": stage, **drawn} for stage in range(4)]
    runs.append({"out": "drawn-fp32", "zero": 0, **drawn, "dtype": "fp32"})
    short = {"dtype": "bf16", "steps": 1, "warmup": 0, "eval_every": 0, "collectives": True}
    runs += [{"out": f"sums-zero{stage}", "zero": stage, **short} for stage in range(4)]
    runs += [{"out": f"bf16-sums-zero{stage}", "zero": stage, "reduce_dtype": "bf16", **short} for stage in range(4)]
    return runs


def saved_model(folder: Path) -> Path:
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(5)
    sizes = {key: value for key, value in TINY.items() if key not in ("architectures", "model_type")}
    PhiForCausalLM(PhiConfig(**sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(launches) -> Path:
    return launches(__name__)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_stopped_run_continues_the_same_curve(runs, stage):
    assert_continued(runs / f"cut-zero{stage}", runs / f"whole-zero{stage}")


@pytest.mark.parametrize("stage", range(4))
def test_masters_start_from_the_checkpoints_values_not_from_their_rounding(runs, stage):
    """DeepSpeed makes its masters from the bf16 weights (as in its issue 762)."""
    start = load_file(runs / "source" / "model.safetensors")
    masters = load_file(runs / f"masters-zero{stage}" / "export" / "model.safetensors")
    assert set(masters) == set(start)
    assert all(torch.equal(masters[name], start[name]) for name in start)
    matrices = [value for value in start.values() if value.ndim == 2]
    assert not any(torch.equal(value, value.bfloat16().float()) for value in matrices)  # so that they could be told


@pytest.mark.parametrize("stage", range(4))
def test_masters_of_a_scratch_run_are_what_was_drawn_not_its_rounding(runs, stage):
    drawn = load_file(runs / "drawn-fp32" / "export" / "model.safetensors")
    masters = load_file(runs / f"drawn-zero{stage}" / "export" / "model.safetensors")
    assert set(masters) == set(drawn)
    assert all(torch.equal(masters[name], drawn[name]) for name in drawn)
    matrices = [value for value in drawn.values() if value.ndim == 2]
    assert not any(torch.equal(value, value.bfloat16().float()) for value in matrices)


@pytest.mark.parametrize("stage", range(4))
def test_ranks_sum_gradients_in_fp32_and_in_bf16_where_it_is_asked(runs, stage):
    """DeepSpeed's own default is the data type of the weights."""
    found = {name: json.loads((runs / f"{name}-zero{stage}" / "collectives.json").read_text()) for name in NAMES}
    assert set(found["sums"]) == {"float32"}
    assert set(found["bf16-sums"]) == {"bfloat16"}
