"""Muon: which parameters it trains, that it orthogonalises at every ZeRO stage, and what it refuses."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import assert_continued, losses, records
from tiny_models import model_of, random_pair

from phigrow.checkpoints import universal
from phigrow.checkpoints.integrity import read_marker
from phigrow.errors import GrowthError
from phigrow.models.families import all_families
from phigrow.training import RunConfig
from phigrow.training.engine import engine_config
from phigrow.training.optimizer_spec import find_optimizer

RUNS = [("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 3)]
MOVED = {("fp32", 1): 2, ("fp32", 2): 3, ("fp32", 3): 1, ("bf16", 1): 3, ("bf16", 3): 1}
"""Stage at which one rank continues what two ranks began."""
MUON = {"optimizer": "muon", "lr": 0.02, "weight_decay": 0.0}
TOLERANCE = {"fp32": 5e-5, "bf16": 2e-3}
HIDDEN = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")


def scenarios(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """List runs at every stage, on one rank and on two; those on two are also stopped and continued."""
    runs = []
    for dtype, stage in RUNS:
        settings = {**MUON, "zero": stage, "dtype": dtype, "save_every": 2, "export": "export", "keep": 0}
        if ranks == 2 or dtype == "fp32":
            runs.append({"out": f"{ranks}-{dtype}-zero{stage}", **settings, "updates": True})
        if ranks == 2:
            cut = {"out": f"cut-{dtype}-zero{stage}", **settings}
            runs += [{**cut, "stop_at": 4, "log_every": 1}, cut]
        else:
            moved = {
                **settings,
                "zero": MOVED[dtype, stage],
                "universal": True,
                "copy_of": str(folder / f"2-{dtype}-zero{stage}"),
            }
            runs.append({"out": f"moved-{dtype}-zero{stage}", **moved})
    if ranks == 1:
        runs.append({"out": "adamw", "zero": 1, "updates": True})
        runs.append({"out": "stage0", "zero": 0, **MUON})
    return runs


def singular_values(folder: Path) -> dict[str, torch.Tensor]:
    """Singular values of the last update of every matrix, over the learning rate and Muon's factor for its shape."""
    content = torch.load(folder / "updates.pt", weights_only=True)
    out = {}
    for name, before in content["before"].items():
        if before.ndim == 2:
            rows, columns = before.shape
            update = (before - content["after"][name]) / content["lr"] / max(1, rows / columns) ** 0.5
            out[name] = torch.linalg.svdvals(update.float())
    return out


def orthogonalised(values: torch.Tensor) -> bool:
    """True if most singular values lie between 0.65 and 1.25 and none above. Newton-Schulz leaves tiny ones smaller."""
    return bool(values.max() < 1.25 and values.median() > 0.65 and (values > 0.65).float().mean() > 0.6)


@pytest.mark.parametrize("run", [f"2-{dtype}-zero{stage}" for dtype, stage in RUNS] + ["1-fp32-zero1", "1-fp32-zero3"])
def test_updates_of_hidden_matrices_are_orthogonalised_at_every_stage(launches, run):
    values = singular_values(launches(__name__) / run)
    found = {name for name, each in values.items() if orthogonalised(each)}
    assert found == {name for name in values if name.split(".")[-2] in HIDDEN}
    assert len(found) == 12


def test_updates_of_adamw_are_not_orthogonalised(launches):
    # Negative control: the same measure of another optimizer's updates.
    assert not any(map(orthogonalised, singular_values(launches(__name__) / "adamw").values()))


@pytest.mark.parametrize(("dtype", "stage"), RUNS)
def test_losses_are_those_of_one_rank_and_of_every_other_stage(launches, dtype, stage):
    folder = launches(__name__)
    one, two = folder / "1-fp32-zero1", folder / f"2-{dtype}-zero{stage}"
    for kind in ("step", "eval"):
        np.testing.assert_allclose(losses(two, kind), losses(one, kind), rtol=TOLERANCE[dtype])
    assert losses(one, "eval")[-1] < losses(one, "eval")[0] - 0.3


@pytest.mark.parametrize(("dtype", "stage"), RUNS)
def test_a_stopped_run_continues_to_the_bit(launches, dtype, stage):
    folder = launches(__name__)
    assert_continued(folder / f"cut-{dtype}-zero{stage}", folder / f"2-{dtype}-zero{stage}")


@pytest.mark.parametrize(("dtype", "stage"), RUNS)
def test_a_run_continues_on_other_ranks_and_at_another_stage(launches, dtype, stage):
    folder = launches(__name__)
    moved, whole = folder / f"moved-{dtype}-zero{stage}", folder / f"2-{dtype}-zero{stage}"
    assert [record["was"]["zero"] for record in records(moved, "resume")] == [stage]
    np.testing.assert_allclose(losses(moved), losses(whole), rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "stage"), RUNS[1:])
def test_converted_momentum_is_that_of_every_stage(launches, tmp_path, dtype, stage):
    folder = launches(__name__)
    found = {}
    for run in ("2-fp32-zero1", f"2-{dtype}-zero{stage}"):
        checkpoint = folder / run / "checkpoints" / "step-4"
        universal.convert(checkpoint, tmp_path / run, read_marker(checkpoint))
        found[run] = {
            name: universal.stored(tmp_path / run, name, "momentum_buffer").flatten()
            for name in universal.parameters(tmp_path / run)
            if "momentum_buffer" in universal.states_of(tmp_path / run, name)
        }
        assert universal.states_of(tmp_path / run, "lm_head.weight") == ("exp_avg", "exp_avg_sq")
    first, second = found.values()
    assert len(first) == len(second) == 12
    for name, values in first.items():
        assert values.norm() > 0
        assert (values - second[name]).norm() < (1e-3 if dtype == "fp32" else 0.1) * values.norm(), name


def test_parameters_outside_of_layers_have_their_own_rate(launches):
    assert [record["lr"] for record in records(launches(__name__) / "1-fp32-zero1", "step")][2] == pytest.approx(0.02)


def test_the_stage_that_does_not_orthogonalise_is_refused(launches):
    message = (launches(__name__) / "stage0" / "error-0.txt").read_text()
    assert "Optimizer muon requires ZeRO stage 1, 2 or 3 (got 0)." in message
    assert "Set zero: 1." in message


def test_settings_that_would_change_the_update_are_refused():
    assert RunConfig(optimizer="muon").grad_clip == 0
    assert RunConfig().grad_clip == 1
    for settings, message in (
        ({"dtype": "bf16", "zero": 2}, "cannot be combined with dtype bf16 at ZeRO stage 2"),
        ({"dtype": "fp16"}, "cannot be combined with dtype fp16"),
        ({"grad_clip": 1.0}, "cannot be combined with grad_clip 1"),
        ({"offload_optimizer": "cpu"}, "cannot be combined with offload_optimizer"),
    ):
        with pytest.raises(GrowthError, match=message):
            engine_config(RunConfig(optimizer="muon", **settings), 1, 16)
    found = engine_config(RunConfig(optimizer="muon", zero=3), 1, 16)
    assert (found["gradient_clipping"], found["zero_optimization"]["reduce_scatter"]) == (0, False)


@pytest.mark.parametrize("family", ["phi", "llama", "qwen2", "gpt_neox"])
def test_the_parameters_are_those_that_deepspeed_would_choose(family):
    rng = random.Random(0)
    model = model_of(random_pair(all_families()[family], rng)[0])
    muon, *adam = find_optimizer("muon").groups(model, RunConfig(optimizer="muon"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    expected = {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and not any(word in name for word in ("embed", "lm_head"))
    }
    assert {names[id(parameter)] for parameter in muon["params"]} == expected
    assert all(parameter.use_muon for parameter in muon["params"])
    rest = [parameter for group in adam for parameter in group["params"]]
    assert len(rest) + len(muon["params"]) == len(names)
    assert not any(parameter.use_muon for parameter in rest)
    assert [group["weight_decay"] for group in (muon, *adam)] == [0.1, 0.1, 0.0]
