"""Symmetry diagnostics: what they compute, that exact copies stay copies for ever, and that noise breaks them."""

import json
import math

import numpy as np
import pytest
import torch
from launching import records, run_scenarios
from scenarios import TINY, VOCAB, FakeSplit
from tiny_models import phi_config, phi_model

import phigrow
from phigrow.errors import GrowthError
from phigrow.measure import load_run
from phigrow.models.families import all_families
from phigrow.training.configuration import RunConfig
from phigrow.training.diagnostics import (
    Diagnostics,
    copy_cosine,
    effective_rank,
    last_norm,
    sides_of,
    source_indices,
)

SMALL = phi_config(32, 2, 48, 2, 8, vocab=VOCAB)
LARGE = phi_config(64, 4, 96, 3, 8, vocab=VOCAB)


class World:
    first, rank, size, device = True, 0, 1, torch.device("cpu")


class Engine(torch.nn.Module):
    """What the diagnostics need of DeepSpeed's engine, around a plain model."""

    def __init__(self, model):
        super().__init__()
        self.module, self.optimizer = model, None

    def forward(self, blocks):
        return self.module(blocks[:, :-1]).logits


def grown(folder, method="tile", noise=0.0, **options):
    phi_model(SMALL, torch.float32).save_pretrained(folder / "src")
    out = folder / f"{method}-{noise}"
    return phigrow.expand(folder / "src", LARGE, out, method=method, noise=noise, dtype="float32", **options)


def trained(folder, steps, seed=0):
    """Diagnostics at the start and after so many steps of AdamW in float64, where rounding hides nothing."""
    from transformers import PhiForCausalLM

    engine = Engine(PhiForCausalLM.from_pretrained(folder, dtype=torch.float64))
    found = Diagnostics(RunConfig(init=str(folder)), World)
    split = FakeSplit(64, 1)
    optimizer = torch.optim.AdamW(engine.module.parameters(), lr=3e-3)
    seen = [found.measure(engine, split, np.arange(16), 8)]
    for step in range(steps):
        blocks = torch.from_numpy(split.batch(np.arange(8) + 8 * (step % 8)))
        torch.nn.functional.cross_entropy(engine(blocks).flatten(0, 1), blocks[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [*seen, found.measure(engine, split, np.arange(16), 8)]


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)


def test_exact_copies_stay_copies_for_ever(tmp_path):
    start, end = trained(grown(tmp_path), 40)
    for found in (start, end):
        assert found["copy_cosine_min"] == pytest.approx(1.0, abs=1e-9)
        assert found["copy_cosine_max"] == pytest.approx(1.0, abs=1e-9)
        assert found["effective_rank"] < 32  # of 64: the new width repeats the old
    assert "fresh_update_share" not in start  # nothing has moved yet
    assert end["fresh_update_share"] == 0.0  # every value is a copy


def test_noise_breaks_them(tmp_path):
    """Negative control: the same training from copies with noise."""
    start, end = trained(grown(tmp_path, noise=0.1, scale="preserve"), 40)
    assert start["copy_cosine_min"] < 0.999
    assert end["copy_cosine"] < start["copy_cosine"]


def test_wr_has_no_copies_and_most_of_its_motion_is_fresh(tmp_path):
    _, end = trained(grown(tmp_path, "wr"), 5)
    assert "copy_cosine" not in end
    shared = {name: tuple(p.shape) for name, p in phi_model(SMALL, torch.float32).named_parameters()}
    assert len(shared) > 10
    assert 0.3 < end["fresh_update_share"] < 1.0


def test_a_start_that_was_not_grown_has_a_stream_only(tmp_path):
    phi_model(SMALL, torch.float32).save_pretrained(tmp_path / "src")
    start, end = trained(tmp_path / "src", 1)
    assert set(start) == set(end) == {"effective_rank"}


def test_cosines_by_hand():
    value = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    assert copy_cosine(value, np.array([0, 1, 0, 1]), 0) == pytest.approx(0.5)  # row 2 is row 0, row 3 is not row 1
    assert copy_cosine(value, np.array([0, 1, 0, -1]), 0) == pytest.approx(1.0)
    assert copy_cosine(value, np.array([0, 1, 2, -1]), 0) is None
    assert copy_cosine(value * 0, np.array([0, 0, 0, 0]), 0) is None
    assert copy_cosine(value.T, np.array([0, 1, 0, 1]), 1) == pytest.approx(0.5)
    # Three copies: the second and the third are each compared with the first.
    assert copy_cosine(torch.tensor([1.0, 1.0, -1.0]), np.array([0, 0, 0]), 0) == pytest.approx(0.0)


def test_effective_rank_by_hand():
    rng = torch.Generator().manual_seed(0)
    flat = torch.randn(4096, 8, generator=rng)
    assert effective_rank(flat) == pytest.approx(8, rel=0.01)
    assert effective_rank(flat[:, :3] @ torch.randn(3, 8, generator=rng)) < 3.01
    assert effective_rank(torch.cat([flat, flat], 1)) == pytest.approx(8, rel=0.01)
    assert math.isnan(effective_rank(torch.ones(5, 3)))


@pytest.mark.parametrize("family", sorted(all_families()))
def test_every_parameter_of_every_family_has_its_source_indices(tmp_path, family):
    table = all_families()[family]
    sizes = {"kv": 2, "group": 1, "q": 8, "k": 8, "v": 8, "rotary": 4, "mlp": 24, "vocab": VOCAB, "layer": 2}
    small = table.config_of({**sizes, "hidden": 16, "normed": 16, "final": 16})
    large = table.config_of({**sizes, "kv": 4, "mlp": 50, "hidden": 32, "normed": 32, "final": 32})
    plan = phigrow.plan(small, large, method="tile")
    found, axes = source_indices(plan.to_json(), tmp_path / "phigrow.json")
    assert found is table
    shapes = table.state_shapes(plan.dst_config)
    for parameter in table.parameters:
        if (name := parameter.name.replace("{layer}", "1")) in shapes:
            assert tuple(map(len, sides_of(parameter, axes))) == shapes[name], name
    assert axes["hidden"].tolist() == [*range(16), *range(16)]
    assert last_norm(table).rpartition(".")[2] in ("final_layernorm", "final_layer_norm", "norm")


def test_stacked_axes_are_told_apart():
    fused = next(p for p in all_families()["gpt_neox"].parameters if p.name.endswith("query_key_value.weight"))
    two = np.array([0, 1])
    side, _ = sides_of(fused, {"kv": np.array([0]), "q": two, "k": two, "v": np.array([0, -1]), "normed": two})
    assert side.tolist() == [0, 1, 2, 3, 4, -1]  # equal indices of queries and keys are other coordinates


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        ({"family": "gpt", "axes": {}}, "ValueError: the plan has the axes of gpt, not those of the model"),
        ({"family": "phi"}, "KeyError: 'axes'"),
        ({"family": "phi", "axes": []}, "AttributeError"),
        (
            {"family": "phi", "axes": {"hidden": {"dst_size": 4, "runs": [[10**12, 0, 1, 1]]}}},
            "the length of a range is 1000000000000",
        ),
        (
            {"family": "phi", "axes": {"hidden": {"dst_size": 4, "runs": [[2, 0, 1, 1]]}}},
            "the plan places 2 of 4 coordinates",
        ),
    ],
)
def test_a_plan_that_cannot_be_read_is_named(tmp_path, plan, why):
    (tmp_path / "phigrow.json").write_text(json.dumps({"plan": plan}))
    with pytest.raises(GrowthError, match="the plan does not show which values are copies") as caught:
        Diagnostics(RunConfig(init=str(tmp_path)), World)
    assert why in str(caught.value)


@pytest.mark.slow
def test_under_deepspeed_at_every_stage(tmp_path):
    """Exact copies stay copies under ZeRO 0 to 3 on two ranks, and the meter reads what was recorded."""
    small = TINY | {"hidden_size": TINY["hidden_size"] // 2, "num_attention_heads": TINY["num_attention_heads"] // 2}
    small |= {"num_key_value_heads": small["num_attention_heads"]}
    phi_model(small, torch.float32).save_pretrained(tmp_path / "src")
    phigrow.expand(tmp_path / "src", TINY, tmp_path / "tile", method="tile", dtype="float32")
    settings = {"init": str(tmp_path / "tile"), "model": None, "diagnostics_every": 3}
    cases = [("fp32", 0), ("bf16", 1), ("fp32", 2), ("bf16", 3)]
    run_scenarios(2, tmp_path, [{"out": f"{d}-{z}", "dtype": d, "zero": z, **settings} for d, z in cases])
    for dtype, zero in cases:
        run = load_run(tmp_path / f"{dtype}-{zero}")
        assert run.diagnostics["step"].tolist() == [0, 3, 6]
        assert run.diagnostics["copy_cosine"] == pytest.approx(np.ones(3), abs=1e-3)
        assert run.diagnostics["effective_rank"].max() < small["hidden_size"] + 0.5
    assert [r["step"] for r in records(tmp_path / "fp32-0", "diagnostics")] == [0, 3, 6]
