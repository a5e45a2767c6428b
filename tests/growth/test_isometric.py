"""isometric, its formulas written a second time; dense legs, and normalisations folded into what reads them."""

import itertools
import random

import numpy as np
import pytest
import torch
from tiny_models import logits, model_of, phi_config, phi_model, probe, random_pair

import phigrow
from phigrow.checkpoints.bits import bits_of
from phigrow.errors import GrowthError
from phigrow.expansion.logits import widen_norms
from phigrow.growth.dense_map import Isometry
from phigrow.growth.lift import InMemory, Lift
from phigrow.growth.norm_fusion import norm_fusions
from phigrow.growth.plan import Plan
from phigrow.inspection.difference import differences
from phigrow.inspection.explain import axis_rows
from phigrow.models.families import all_families

FAMILIES = all_families()
SRC, DST = phi_config(24, 3, 30, 1, 4), phi_config(40, 5, 37, 2, 4)
LAYER = "model.layers.0."
PINNED = [[0.23982874136102017, 0.08619939622322842], [0.18829849229442613, -0.1289898775566903]]


@pytest.mark.parametrize(("src", "dst"), [(1, 2), (1, 7), (2, 3), (16, 17), (20, 53)])
def test_an_isometry_keeps_lengths_and_the_mean(src, dst):
    legs = Isometry(src, dst, seed=3)
    q, aside = legs.write(np.float64), legs.bias_direction(np.float64)
    np.testing.assert_allclose(q.T @ q, np.eye(src), atol=1e-14)
    np.testing.assert_allclose(q @ np.full(src, src**-0.5), np.full(dst, dst**-0.5), atol=1e-14)
    np.testing.assert_allclose(aside @ q, 0, atol=1e-14)
    assert aside @ aside == pytest.approx(1)
    assert np.array_equal(legs.read(np.float64), q.T)
    assert legs.left_inverse_error(np.ones(dst)) < 1e-14
    assert np.array_equal(legs.write(np.float32), q.astype(np.float32))


def test_an_isometry_is_drawn_from_its_seed_and_spreads_every_coordinate():
    q = Isometry(20, 53, seed=3).write(np.float64)
    np.testing.assert_allclose(q[:2, :2], PINNED, rtol=1e-11)
    assert np.abs(q - Isometry(20, 53, seed=4).write(np.float64)).max() > 0.1
    assert np.unique(q.round(12)).size == q.size  # no two entries alike, none zero
    # Beside the mean, uniform: entries as of a normal vector, 19 of 20 parts of the whole.
    many = np.concatenate([Isometry(20, 53, seed).write(np.float64).ravel() for seed in range(30)]) * 53**0.5
    assert many.mean() == pytest.approx(20**-0.5, abs=1e-12)
    assert many.var() == pytest.approx(0.95, abs=1e-12)
    assert ((many - many.mean()) ** 4).mean() == pytest.approx(3 * 0.95**2, rel=0.1)


def grown(src, dst, **flags):
    model = model_of({**src, **flags})
    wide = phigrow.expand_model(model, {**dst, **flags}, method="isometric")
    widen_norms(wide)
    return model, wide, phigrow.plan({**src, **flags}, {**dst, **flags}, "isometric")


def test_every_tensor_of_a_phi_is_what_the_formulas_say():
    model, wide, plan = grown(SRC, DST)
    old, new = ({n: t.numpy() for n, t in m.state_dict().items()} for m in (model, wide))
    q = Isometry(24, 40, 0).write(np.float64)
    c = (40 / 24) ** 0.5
    gamma, beta = old[LAYER + "input_layernorm.weight"], old[LAYER + "input_layernorm.bias"]
    last, shift = old["model.final_layernorm.weight"], old["model.final_layernorm.bias"]
    out = LAYER + "self_attn.dense."
    expected = {
        "model.embed_tokens.weight": c * old["model.embed_tokens.weight"] @ q.T,
        out + "weight": np.hstack([c * q @ old[out + "weight"], np.zeros((40, 16))]),
        out + "bias": c * q @ old[out + "bias"],
        LAYER + "mlp.fc2.weight": np.hstack([c * q @ old[LAYER + "mlp.fc2.weight"], np.zeros((40, 7))]),
        LAYER + "mlp.fc2.bias": c * q @ old[LAYER + "mlp.fc2.bias"],
        "lm_head.weight": (old["lm_head.weight"] * last) @ q.T,
        "lm_head.bias": old["lm_head.bias"] + old["lm_head.weight"] @ shift,
        **dict.fromkeys((LAYER + "input_layernorm.weight", "model.final_layernorm.weight"), np.full(40, 1 / c)),
        **dict.fromkeys((LAYER + "input_layernorm.bias", "model.final_layernorm.bias"), np.zeros(40)),
    }
    for name in ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.", "mlp.fc1."):
        weight, bias = old[LAYER + name + "weight"], old[LAYER + name + "bias"]
        rows = len(weight)
        np.testing.assert_allclose(new[LAYER + name + "weight"][:rows], (weight * gamma) @ q.T, atol=1e-14)
        np.testing.assert_allclose(new[LAYER + name + "bias"][:rows], bias + weight @ beta, atol=1e-14)
        assert 0.01 < new[LAYER + name + "weight"][rows:].std() < 0.04  # new heads and units: an initialisation
    for name, values in expected.items():
        np.testing.assert_allclose(new[name], values, atol=1e-14, err_msg=name)
    assert plan.exact
    assert not new["model.layers.1.mlp.fc2.weight"].any()  # an inserted layer


def test_a_reader_without_bias_reads_the_shift_aside():
    src, dst = random_pair(FAMILIES["gpt_neox"], random.Random(4), whole=True)
    model, wide, _ = grown(src, dst)
    small, large = src["hidden_size"], dst["hidden_size"]
    legs = Isometry(small, large, 0)
    q, u = legs.write(np.float64), legs.bias_direction(np.float64)
    old = {n: t.numpy() for n, t in model.state_dict().items()}
    new = {n: t.numpy() for n, t in wide.state_dict().items()}
    head = next(n for n in ("embed_out.weight", "lm_head.weight") if n in old)
    gamma, beta = (old[f"gpt_neox.final_layer_norm.{end}"] for end in ("weight", "bias"))
    np.testing.assert_allclose(new["gpt_neox.final_layer_norm.bias"], u, atol=1e-14)
    np.testing.assert_allclose(new[head], (old[head] * gamma) @ q.T + np.outer(old[head] @ beta, u), atol=1e-13)
    assert not new["gpt_neox.layers.0.input_layernorm.bias"].any()  # its readers have biases


def apart(model, wide, vocab):
    ids = probe(vocab)
    return float((logits(model, ids) - logits(wide, ids)).abs().max())


@pytest.mark.parametrize(
    ("family", "flags"),
    [("phi", {}), ("gpt_neox", {}), ("gpt_neox", {"attention_bias": False}), ("llama", {}), ("qwen2", {})],
)
def test_weights_of_normalisations_may_be_zero(family, flags):
    src, dst = random_pair(FAMILIES[family], random.Random(6), whole=True)
    model = model_of({**src, **flags})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter[::2] = 0
                parameter[1] = 1e-30
    wide = phigrow.expand_model(model, {**dst, **flags}, method="isometric")
    widen_norms(wide)
    assert apart(model, wide, src["vocab_size"]) <= 1e-10
    with torch.no_grad():  # negative control: one value of a folded matrix
        next(p for n, p in wide.named_parameters() if "mlp" in n and p.ndim == 2)[0, 0] += 1e-3
    assert apart(model, wide, src["vocab_size"]) > 1e-8


def test_which_readers_take_in_which_normalisation():
    found = norm_fusions(FAMILIES["llama"], {"attention_bias": False}, {("normed",), ("final",)})
    norm = {n.rsplit(".", 2)[-2]: fusion.scale.split(".")[-2] for n, fusion in found.items()}
    assert norm == {
        "input_layernorm": "input_layernorm", "q_proj": "input_layernorm", "k_proj": "input_layernorm",
        "v_proj": "input_layernorm", "post_attention_layernorm": "post_attention_layernorm",
        "gate_proj": "post_attention_layernorm", "up_proj": "post_attention_layernorm", "norm": "norm",
        "lm_head": "norm",
    }  # fmt: skip
    neox = norm_fusions(FAMILIES["gpt_neox"], {"attention_bias": False}, {("normed",), ("final",)})
    aside = {name.split("{layer}.")[-1] for name, fusion in neox.items() if fusion.bias_direction}
    assert aside == {
        "input_layernorm.weight", "input_layernorm.bias", "attention.query_key_value.weight",
        "gpt_neox.final_layer_norm.weight", "gpt_neox.final_layer_norm.bias", "embed_out.weight",
    }  # fmt: skip
    assert neox["gpt_neox.layers.{layer}.mlp.dense_h_to_4h.bias"].at(3).reader == (
        "gpt_neox.layers.3.mlp.dense_h_to_4h.weight"
    )
    assert norm_fusions(FAMILIES["phi"], {}, set()) == {}


def test_no_two_coordinates_are_alike_and_all_of_the_width_is_in_use():
    _, wide, _ = grown(SRC, phi_config(48, 6, 37, 2, 4))
    for name, tensor in wide.state_dict().items():
        if "embed" in name or "fc1.weight" in name or "lm_head.weight" in name:
            alike = torch.corrcoef(tensor.T).fill_diagonal_(0)
            assert float(alike.abs().max()) < 0.9, name  # copies, as tile makes them, have 1
    stream = wide.model.embed_tokens(torch.arange(61))
    assert int(torch.linalg.matrix_rank(stream)) == 24  # all of the old, spread over all of the new
    assert float(stream.detach().square().mean(0).min()) > 0.2 * float(stream.detach().square().mean())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_do_not_show(dtype):
    src, dst = phi_config(48, 3, 70, 1, 4), phi_config(104, 4, 90, 2, 4)
    plan = phigrow.plan(src, dst, "isometric", seed=2)
    sources = {n: InMemory(t) for n, t in phi_model(src, getattr(torch, dtype)).state_dict().items()}
    for recipe in plan.recipes():
        if len(recipe.shape) == 1:
            continue
        made = [Lift(recipe, sources, dtype) for _ in range(2)]
        whole, cuts = made[0].rows(0, recipe.shape[0]), [0, 1, 31, 33, recipe.shape[0]]
        cuts = sorted({min(cut, recipe.shape[0]) for cut in cuts})
        parts = [made[1].rows(a, b) for a, b in itertools.pairwise(cuts)]
        assert np.array_equal(np.concatenate(parts), whole), recipe.name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_is_grown_as_a_live_model_and_certified(dtype, save_model, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("phigrow.expansion.write_tensors.BLOCK_VALUES", 700)
    model = phi_model(SRC, getattr(torch, dtype))
    out = phigrow.expand(save_model(model), DST, tmp_path / "out", method="isometric", shard_size="20KB")
    written = AutoModelForCausalLM.from_pretrained(out).state_dict()
    live = phigrow.expand_model(model, DST, method="isometric").state_dict()
    assert all(np.array_equal(bits_of(written[name]), bits_of(tensor)) for name, tensor in live.items())
    certificate = phigrow.verify(tmp_path / "src", out)
    assert certificate.passed, certificate


def test_float32_is_as_exact_as_its_storage():
    """Sums in float64 and one rounding: no worse than lossless, whose gains round once too."""
    rng, worst = random.Random(8), {"isometric": [], "lossless": []}
    for _ in range(12):
        src, dst = random_pair(FAMILIES["phi"], rng)
        model = model_of(src, torch.float32)
        for method, found in worst.items():
            found.append(apart(model, phigrow.expand_model(model, dst, method=method), src["vocab_size"]))
    assert max(worst["isometric"]) < 1e-5
    assert np.median(worst["isometric"]) < 3 * np.median(worst["lossless"])


def test_a_plan_holds_the_seed_and_not_the_matrix():
    plan = phigrow.plan(SRC, DST, "isometric", seed=5)
    data = plan.to_json()
    assert data["axes"]["hidden"]["legs"] == {"kind": "isometry", "seed": 5}
    assert data["axes"]["hidden"]["runs"] == [[40, "dense", (40 / 24) ** 0.5, (24 / 40) ** 0.5]]
    again = Plan.from_json(data)
    assert again.hash == plan.hash
    assert np.array_equal(again.axes["normed"].dense_legs()[0], plan.axes["normed"].dense_legs()[0])
    rows = {name: row for name, *row in axis_rows(plan)}
    assert rows["hidden"] == ["24 → 40", "mixtures of all 24 (isometry, seed 5)", "1.291", "0.7746"]
    other = phigrow.plan(SRC, DST, "isometric", seed=6)
    found = {d.name: (d.first, d.second) for d in differences(plan, other) if d.part == "axis"}
    assert found["hidden, legs"] == ({"kind": "isometry", "seed": 5}, {"kind": "isometry", "seed": 6})


@pytest.mark.parametrize(
    "change",
    [{"legs": {"kind": "shear", "seed": 1}}, {"legs": {"kind": "isometry"}}, {"legs": None}, {"runs": [[40, 0, 1, 1]]}],
)
def test_a_plan_of_other_dense_legs_is_refused(change):
    data = phigrow.plan(SRC, DST, "isometric").to_json()
    axis = {**data["axes"]["hidden"], **change}
    if axis["legs"] is None:
        del axis["legs"]
    with pytest.raises(GrowthError, match="an axis map of the plan cannot be read"):
        Plan.from_json({**data, "axes": {**data["axes"], "hidden": axis}})


def test_what_isometric_cannot_do_is_refused():
    tied = {"tie_word_embeddings": True}
    with pytest.raises(
        GrowthError, match=r"isometric cannot grow hidden 24 -> 40 where embeddings are tied\n"
    ) as error:
        phigrow.plan(SRC | tied, DST | tied, "isometric")
    assert error.value.fix == "use --method lossless, or a source with a head of its own"
    same = phigrow.plan(SRC | tied, SRC | tied | {"intermediate_size": 50}, "isometric")
    assert same.exact  # the stream does not turn where it does not grow
