"""Larger heads, exactly: a rotary part that grows by a whole factor, and LayerNorm inside heads."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tiny_models import logits, model_of, phi_config, phi_model, probe

import phigrow
from phigrow.errors import GrowthError
from phigrow.expansion.logits import widen_norms
from phigrow.growth.lift import InMemory, Lift, lift
from phigrow.growth.plan import Plan
from phigrow.models.families import all_families

EXACT = 1e-10
FAMILIES = all_families()
SETTINGS = {"initializer_range": 0.02, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None}
WHOLE_HEADS = ("llama", "qwen2")
"""Families whose whole head turns."""


def config(family, *, head=8, rotary=None, kv=2, group=2, **more):
    """Whole heads turn where the family has no choice; else half of them, or ``rotary`` coordinates."""
    group = 1 if family == "gpt_neox" else group
    rotary = head if family in WHOLE_HEADS else rotary or head // 2
    sizes = {"kv": kv, "group": group, "q": head, "rotary": rotary, "mlp": 20, "layer": 2, "vocab": 40}
    return {**FAMILIES[family].config_of(sizes | {"hidden": kv * group * head}), **SETTINGS, **more}


def difference(src, dst, method="lossless", length=24, **options):
    """max |dlogit| in float64, and the grown model."""
    model = model_of(src)
    grown = phigrow.expand_model(model, dst, method=method, **options)
    widen_norms(grown)
    ids = probe(src["vocab_size"], length=length)
    return float((logits(model, ids) - logits(grown, ids)[..., : src["vocab_size"]]).abs().max()), grown


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rotary_part_grows_by_a_whole_factor(family, factor):
    src = config(family)
    dst = config(family, head=8 * factor) | {"intermediate_size": 31, "num_hidden_layers": 3}
    plan = phigrow.plan(src, dst, "lossless")
    assert plan.exact
    assert plan.dst_sizes["rotary"] == factor * plan.src_sizes["rotary"]
    assert difference(src, dst)[0] <= EXACT


@pytest.mark.parametrize("method", ["isometric", "gesmundo"])
@pytest.mark.parametrize("head", [16, 32])
def test_other_exact_methods_grow_it_too(method, head):
    src, dst = config("llama", max_position_embeddings=256), config("llama", head=head, max_position_embeddings=256)
    assert difference(src, dst, method, length=200)[0] <= EXACT


def test_pair_i_becomes_pair_m_i():
    plan = phigrow.plan(phi_config(24, 3, rotary=4), phi_config(60, 3, rotary=12), "lossless")
    # Pairs (0, 2) and (1, 3) of 4 turning coordinates become pairs (0, 6) and (3, 9) of 12.
    for axis in ("q", "k"):
        turning = [0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1]
        assert plan.axes[axis].source.tolist() == [*turning, 4, 5, 6, 7, -1, -1, -1, -1]
    assert plan.axes["v"].source.tolist() == [*range(8), *[-1] * 12]
    assert plan.axes["q"].write.max() == np.sqrt(20 / 8)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 32},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "dynamic", "factor": 4.0},
    ],
    ids=["linear", "llama3", "yarn", "dynamic"],
)  # fmt: skip
def test_scaled_positions_whose_frequencies_stay(scaling):
    more = {"rope_parameters": {"rope_theta": 20000.0, **scaling}, "max_position_embeddings": 256}
    src, dst = config("llama", head=16, **more), config("llama", head=32, **more)
    assert difference(src, dst, length=200)[0] <= EXACT


def test_other_pairs_change_the_function():
    # Negative control: the rotary part in one block, and without the larger temperature.
    src, dst = config("llama"), config("llama", head=16)
    worst, grown = difference(src, dst)
    assert worst <= EXACT
    model, ids = model_of(src), probe(40)
    with torch.no_grad():
        for layer in grown.model.layers:
            for name in ("q_proj", "k_proj"):
                weight = getattr(layer.self_attn, name).weight
                heads = weight.view(-1, 2, 8, weight.shape[1])
                heads.copy_(heads[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].clone())
    assert float((logits(model, ids) - logits(grown, ids)).abs().max()) > 1e-3


SCALED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("src", "dst", "message"),
    [
        (
            config("llama"), config("llama", head=12),
            r"rotary part of a head, 8 -> 12 coordinates\n.*axis head: rotary.*\n  why: .* only if it grows by a "
            r"whole factor\n  what to do: keep heads of 8 .*choose more of them, or choose a rotary part of 16",
        ),
        (
            config("phi", head=20, rotary=4), config("phi", head=40, rotary=6),
            r"4 -> 6 coordinates(.|\n)*set partial_rotary_factor to 4 / head_dim = 0.1 .* rotary part of 8",
        ),
        (
            config("llama", rope_parameters=SCALED), config("llama", head=16, rope_parameters=SCALED),
            r"compute different functions\n.*\n  why: the rotary part of a head: 8 -> 16 coordinates \(this "
            r"changes inverse frequencies by 20 %\)\n",
        ),
    ],
    ids=["uneven", "partial", "yarn"],
)  # fmt: skip
def test_other_frequencies_are_refused(src, dst, message):
    with pytest.raises(GrowthError, match=message):
        phigrow.plan(src, dst, "lossless")


def normed(hidden, heads, rotary, **more):
    return phi_config(hidden, heads, 48, 2, rotary, qk_layernorm=True, **more)


LARGER = {
    "larger heads": normed(52, 4, 4), "twice the rotary part": normed(64, 4, 8), "more heads": normed(60, 6, 4),
    "deeper": normed(48, 4, 4, num_hidden_layers=3),
}  # fmt: skip


@pytest.mark.parametrize("method", ["lossless", "isometric"])
@pytest.mark.parametrize("dst", LARGER.values(), ids=LARGER)
def test_heads_with_a_normalisation_inside(dst, method):
    src = normed(32, 4, 4)
    assert phigrow.plan(src, dst, method).exact
    assert difference(src, dst, method)[0] <= EXACT


def test_grouped_heads_with_a_normalisation_inside():
    src = normed(32, 4, 4, num_key_value_heads=2)
    dst = normed(72, 6, 4, num_key_value_heads=3)
    assert difference(src, dst)[0] <= EXACT


def test_the_weights_are_what_the_formulas_say():
    src, dst = normed(32, 4, 4), normed(48, 4, 4)
    plan, state = phigrow.plan(src, dst, "lossless"), phi_model(src).state_dict()
    sources = {name: InMemory(tensor) for name, tensor in state.items()}
    grown = {recipe.name: lift(recipe, sources, torch.float64) for recipe in plan.recipes()}
    gain, at = np.sqrt(12 / 8), "model.layers.1.self_attn"
    for name, behind in (("q", gain), ("k", 1.0)):
        old = state[f"{at}.{name}_proj.weight"].reshape(4, 8, 32)
        new = grown[f"{at}.{name}_proj.weight"].reshape(4, 12, 48)[..., :32]
        torch.testing.assert_close(new[:, :8], old * gain, rtol=1e-15, atol=0)
        torch.testing.assert_close(
            new[:, 8:], (old.mean(1, keepdim=True) * gain).expand(4, 4, 32), rtol=1e-14, atol=1e-17
        )
        old, new = (where[f"{at}.{name}_proj.bias"].reshape(4, -1) for where in (state, grown))
        torch.testing.assert_close(new[:, :8], old * gain, rtol=1e-15, atol=0)
        torch.testing.assert_close(new[:, 8:], (old.mean(1, keepdim=True) * gain).expand(4, 4), rtol=1e-14, atol=1e-17)
        weight, bias = (grown[f"{at}.{name}_layernorm.{part}"] for part in ("weight", "bias"))
        torch.testing.assert_close(
            weight[:8], state[f"{at}.{name}_layernorm.weight"] * (behind / gain), rtol=1e-15, atol=0
        )
        torch.testing.assert_close(bias[:8], state[f"{at}.{name}_layernorm.bias"] * behind, rtol=1e-15, atol=0)
        assert bool((weight[8:] == 1).all())
        assert bool((bias[8:] != 0).all() if name == "q" else (bias[8:] == 0).all())
        assert name == "k" or len(set(bias[8:].tolist())) == 4


def test_new_coordinates_of_a_normed_head_learn_and_differ():
    _, grown = difference(normed(32, 4, 4), normed(48, 4, 4))
    ids = probe(61)
    grown.train()(ids, labels=ids).loss.backward()
    attention = grown.model.layers[0].self_attn
    new = attention.k_proj.weight.grad.reshape(4, 12, 48)[:, 8:]
    assert bool((new.abs().sum(-1) > 0).all())
    assert len({round(float(row.norm()), 12) for row in new.reshape(-1, 48)}) == 16  # no two rows get one gradient


@pytest.mark.parametrize("part", ["mean", "temperature"])
def test_a_head_that_sees_other_statistics_is_noticed(part):
    # Negative controls: rows that do not hold the mean, and queries without the gain for the larger divisor.
    src, dst = normed(32, 4, 4), normed(48, 4, 4)
    _, grown = difference(src, dst)
    attention = grown.model.layers[0].self_attn
    with torch.no_grad():
        if part == "mean":
            attention.k_proj.weight.view(4, 12, 48)[:, 8:] = 0
        else:
            attention.q_layernorm.weight[:8] *= (8 / 12) ** 0.5
    ids = probe(61)
    assert float((logits(model_of(src), ids) - logits(grown, ids)).abs().max()) > 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_of_rows_do_not_show(dtype):
    src, dst = normed(32, 4, 4), normed(52, 4, 4)
    for method in ("lossless", "isometric"):
        plan = phigrow.plan(src, dst, method)
        sources = {name: InMemory(t) for name, t in phi_model(src, getattr(torch, dtype)).state_dict().items()}
        for recipe in plan.recipes():
            if recipe.layer != 0 or "_proj.weight" not in recipe.name:
                continue
            made = [Lift(recipe, sources, dtype) for _ in range(2)]
            whole = made[0].rows(0, recipe.shape[0])
            parts = [made[1].rows(a, b) for a, b in itertools.pairwise((0, 1, 11, 12, 31, 33, recipe.shape[0]))]
            assert np.array_equal(np.concatenate(parts), whole), recipe.name


def test_a_plan_of_normed_heads_survives_its_json():
    plan = phigrow.plan(normed(32, 4, 4), normed(64, 4, 8), "lossless")
    data = plan.to_json()
    again = Plan.from_json(data)
    assert again.hash == plan.hash
    assert again.axes["k"].head_norm == plan.axes["k"].head_norm
    for wrong in (
        {"write": -1.0, "shift": "zero"},
        {"write": 1.0, "shift": "drawn"},
        {"write": "much", "shift": "zero"},
    ):
        with pytest.raises(GrowthError, match="an axis map of the plan cannot be read"):
            Plan.from_json({**data, "axes": {**data["axes"], "k": {**data["axes"]["k"], "norm": wrong}}})


@pytest.mark.parametrize(
    ("src", "dst"),
    [(config("qwen2", tie_word_embeddings=True), config("qwen2", head=16, tie_word_embeddings=True)),
     (normed(32, 4, 4), normed(64, 4, 8))],
    ids=["qwen2", "qk_layernorm"],
)  # fmt: skip
def test_a_folder_is_grown_and_certified(src, dst, save_model, tmp_path):
    folder = save_model(model_of(src))
    certificate = phigrow.verify(
        folder, phigrow.expand(folder, dst, tmp_path / "out", method="lossless"), dtype="float64"
    )
    assert certificate.claims_exact
    assert certificate.passed
    assert certificate.max_abs_dlogit <= EXACT
    backend = phigrow.verify(folder, tmp_path / "out", dtype="float64", backend="transformers")
    assert backend.max_abs_dlogit <= EXACT
