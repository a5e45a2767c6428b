"""The published operators, each formula written a second time, on live tensors and with plain indexing."""

import random

import numpy as np
import pytest
import torch
from tiny_models import logits, model_of, probe, random_pair

import phigrow
from phigrow.errors import GrowthError
from phigrow.expansion.logits import widen_norms
from phigrow.expansion.provenance import copied_values
from phigrow.growth.origins import Kind, anatomy, span_lines
from phigrow.growth.plan import Plan
from phigrow.inspection.difference import ABSENT, differences
from phigrow.inspection.pictures import blocks
from phigrow.models.families import all_families
from phigrow.training.per_value_lr import copied_mask

FAMILIES = all_families()


def doubled(family, seed=0, **flags):
    """A pair in which hidden, heads and mlp double: what HyperCloning grows."""
    src, dst = random_pair(FAMILIES[family], random.Random(seed), whole=True, **flags)
    return src, dst | {"intermediate_size": 2 * src["intermediate_size"]}


def hypercloned(name, weight, heads, family):
    """HyperCloning at 2x, from the formulas of 2409.12903, section 3: repeat what is written, halve what is read."""
    values = weight.clone()
    if "query_key_value" in name and family == "gpt_neox":
        # Rows are head by head: heads repeat, and in them nothing moves.
        values = values.reshape(heads, -1, *values.shape[1:])
        values = torch.cat([values, values]).reshape(-1, *weight.shape[1:])
    elif "embed" in name and "out" not in name:
        return torch.cat([values, values], dim=1)
    elif not name.startswith(("lm_head", "embed_out")):
        values = torch.cat([values, values])
    return torch.cat([values, values], dim=1) / 2 if values.ndim == 2 else values


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "qwen2"])
def test_hypercloning_has_the_published_weights_and_function(family):
    for seed in range(4):
        src, dst = doubled(family, seed)
        model = model_of(src)
        clean = phigrow.expand_model(model, dst, method="hypercloning", snr="none", depth="stack")
        wider = clean.state_dict()
        for name, tensor in model.state_dict().items():
            expected = hypercloned(name, tensor, src["num_attention_heads"], family)
            assert torch.equal(wider[name], expected), name
        noisy = phigrow.expand_model(model, dst, method="hypercloning", depth="stack")  # 10 dB
        ids = probe(src["vocab_size"])
        for grown in (clean, noisy):
            widen_norms(grown)
            assert float((logits(model, ids) - logits(grown, ids)).abs().max()) <= 1e-10
        name = next(name for name in wider if name.endswith(("mlp.up_proj.weight", "dense_h_to_4h.weight")))
        added, half = (noisy.state_dict()[name] - wider[name]).numpy(), model.state_dict()[name].shape[1]
        np.testing.assert_allclose(added[:, :half], -added[:, half:], atol=1e-15)  # pairs that cancel
        power = 10 * np.log10(np.square(wider[name].numpy()).mean() / np.square(added).mean())
        assert power == pytest.approx(10, abs=1)  # decibels
        tile = phigrow.expand_model(model, dst, method="tile", scale="preserve", depth="stack").state_dict()
        assert all(torch.equal(tile[name], wider[name]) for name in wider)  # at whole factors they are one formula


def test_the_comparison_with_hypercloning_can_fail():
    # Negative control: another order of heads, and halves that are not halved.
    src, dst = doubled("gpt_neox", 1)
    model = model_of(src)
    wider = phigrow.expand_model(model, dst, method="hypercloning", snr="none", depth="stack").state_dict()
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    tensor = model.state_dict()[name]
    assert torch.equal(wider[name], hypercloned(name, tensor, src["num_attention_heads"], "gpt_neox"))
    assert not torch.equal(wider[name], torch.cat([torch.cat([tensor, tensor], dim=1)] * 2))
    sums = phigrow.expand_model(model, dst, method="tile", depth="stack").state_dict()
    assert not torch.equal(sums[name], wider[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": 31}, "hypercloning cannot grow mlp .* which is no whole factor"),
        ({"head_dim": 32}, "hypercloning cannot grow heads"),
    ],
)
def test_what_hypercloning_cannot_do_is_refused(change, message):
    src, dst = random_pair(FAMILIES["llama"], random.Random(3), whole=True)
    src |= {"intermediate_size": 30}
    with pytest.raises(GrowthError, match=message):
        phigrow.plan(src, dst | {"intermediate_size": 30} | change, "hypercloning")


def grown(method, seed=0, **options):
    """A Llama at uneven ratios of everything but hidden, its grown weights and its plan."""
    src = {"vocab": 37, "hidden": 24, "mlp": 20, "layer": 1, "kv": 2, "group": 1, "q": 8, "rotary": 8}
    dst = src | {"mlp": 33, "kv": 3, "hidden": 48}
    pair = [FAMILIES["llama"].config_of(sizes) | {"initializer_range": 0.02} for sizes in (src, dst)]
    model = model_of(pair[0])
    made = phigrow.plan(*pair, method, seed=seed, **options)
    wide = phigrow.expand_model(model, pair[1], method=method, seed=seed, **options).state_dict()
    return model.state_dict(), {name: tensor.numpy() for name, tensor in wide.items()}, made


UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize("method", ["net2net", "fpi"])
def test_random_copies_share_what_reads_them(method):
    small, wide, made = grown(method)
    g = {axis: made.axes[axis].source for axis in ("hidden", "normed", "mlp")}
    assert np.array_equal(g["hidden"], g["normed"])
    assert np.array_equal(g["mlp"][:20], np.arange(20))
    counts = {axis: np.bincount(source)[source] for axis, source in g.items()}
    up, down = small[UP].numpy(), small[DOWN].numpy()
    np.testing.assert_allclose(wide[UP], up[g["mlp"]][:, g["normed"]] / counts["normed"], rtol=1e-14)
    np.testing.assert_allclose(wide[DOWN], down[g["hidden"]][:, g["mlp"]] / counts["mlp"], rtol=1e-14)
    other = grown(method, seed=1)[2].axes["mlp"].source
    assert not np.array_equal(other, g["mlp"])  # drawn anew from another seed
    assert np.array_equal(grown(method)[2].axes["mlp"].source, g["mlp"])
    even = set(np.bincount(g["hidden"]).tolist()) == {2}
    assert even == made.exact == (method == "fpi")


def test_lemon_splits_what_reads_copies_unevenly():
    small, wide, made = grown("lemon")
    source = np.arange(33) % 20
    root = 2**0.5
    down = np.vstack([root * small[DOWN].numpy(), np.zeros((24, 20))])  # RMSNorm: no mean to fill with
    for unit in range(20):
        copies = np.flatnonzero(source == unit)
        np.testing.assert_allclose(wide[DOWN][:, copies].sum(1), down[:, unit], rtol=1e-12, atol=1e-15)
        if len(copies) == 2:
            shares = wide[DOWN][0, copies] / down[0, unit]
            assert abs(shares[0] - shares[1]) > 1e-3
            assert 0.25 <= shares.min() < shares.max() <= 0.75
    np.testing.assert_array_equal(wide[UP][:, :24], small[UP].numpy()[source])
    assert made.exact


def test_gesmundo_is_exact_under_rmsnorm_and_not_under_layernorm():
    small, wide, made = grown("gesmundo")
    assert made.exact
    assert not wide[DOWN][24:].any()
    assert not wide[DOWN][:, 20:].any()
    np.testing.assert_allclose(wide[DOWN][:24, :20], 2**0.5 * small[DOWN].numpy(), rtol=1e-14)
    np.testing.assert_allclose(wide["model.norm.weight"][:24], small["model.norm.weight"].numpy() / 2**0.5, rtol=1e-14)
    for family in ("phi", "gpt_neox"):
        made = phigrow.plan(*doubled(family), "gesmundo")
        assert made.approximations == ("zeros in the stream shift the mean that LayerNorm takes off",)


def test_sparkling_keeps_root_mean_squares():
    small, wide, _ = grown("sparkling")
    counts = np.bincount(np.arange(33) % 20)[np.arange(33) % 20]
    expected = np.vstack([small[DOWN].numpy()] * 2)[:, np.arange(33) % 20] / np.sqrt(counts)
    np.testing.assert_allclose(wide[DOWN], expected, rtol=1e-14)
    rows = np.sqrt(np.square(small[DOWN].numpy()).sum(1))
    np.testing.assert_allclose(np.sqrt(np.square(wide[DOWN]).sum(1))[:24], rows, rtol=1e-12)


@pytest.mark.parametrize("shrink", ["0.4", "0.8"])
def test_shrink_and_perturb(shrink):
    small, wide, made = grown("shrink_perturb", shrink=shrink)
    added = wide[UP].copy()
    added[:20, :24] -= float(shrink) * small[UP].numpy()
    assert added.std() == pytest.approx(0.02, rel=0.05)
    assert added[:20, :24].std() == pytest.approx(0.02, rel=0.1)
    assert abs(added.mean()) < 0.002
    np.testing.assert_array_equal(wide["model.norm.weight"][:24], small["model.norm.weight"].numpy())
    assert not made.exact


@pytest.mark.parametrize(("family", "tied"), [("phi", False), ("gpt_neox", False), ("llama", True)])
def test_staged_puts_two_models_side_by_side(family, tied):
    src, dst = doubled(family, 2, tie_word_embeddings=tied)
    model = model_of(src)
    small = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    grown = phigrow.expand_model(model, dst, method="staged", depth="stack")
    last = {"phi": "model.final_layernorm", "gpt_neox": "gpt_neox.final_layer_norm", "llama": "model.norm"}[family]
    for name, tensor in grown.state_dict().items():
        values, halved = small[name], name.startswith(last) if tied else name.startswith(("lm_head.w", "embed_out"))
        if "embed" in name or name == "lm_head.weight":
            expected = np.hstack([values, values])
        elif name == "lm_head.bias":
            expected = values
        else:
            expected = np.concatenate([values, values]) if values.ndim == 1 else np.kron(np.eye(2), values)
        assert np.array_equal(tensor.numpy(), expected / 2 if halved else expected), name
    widen_norms(grown)
    ids = probe(src["vocab_size"])
    assert float((logits(model, ids) - logits(grown, ids)).abs().max()) <= 1e-10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": 90}, "staged cannot grow mlp 30 -> 90, which is not twice as much"),
        ({"head_dim": 32}, "staged cannot grow q, .* 32"),
        ({"vocab_size": 99}, "staged cannot grow vocab"),
    ],
)
def test_what_staged_cannot_do_is_refused(change, message):
    src, dst = random_pair(FAMILIES["llama"], random.Random(3), whole=True)
    src |= {"intermediate_size": 30}
    with pytest.raises(GrowthError, match=message) as refused:
        phigrow.plan(src, dst | {"intermediate_size": 30} | change, "staged")
    assert "use --method lossless" in refused.value.fix


def test_what_inspection_says_of_staged():
    src, dst = doubled("llama", 2)
    plan = phigrow.plan(src, dst, "staged")
    recipe = next(r for r in plan.recipes() if r.name == UP)
    found = anatomy(recipe)
    rows, columns = recipe.source_shape
    assert {k.name: n for k, n in found.counts.items() if n} == {
        "COPIED": rows * columns, "TILED": rows * columns, "ZERO": 2 * rows * columns,
    }  # fmt: skip
    painted = np.full(recipe.shape, -1)
    for block in blocks(found):
        painted[slice(*block.rows), slice(*block.columns)] = block.kind
    assert np.array_equal(painted, found.kinds())
    assert (found.gains() == 1).all()
    assert span_lines(found)[0] == "zero but for 2 blocks on the diagonal"
    mask = copied_mask(copied_values(plan), UP, recipe.shape).numpy()
    assert np.array_equal(mask, found.kinds() != Kind.ZERO)
    again = Plan.from_json(plan.to_json())
    assert (again.hash, again.axes["mlp"].diagonal_blocks) == (plan.hash, 2)
    other = phigrow.plan(src, dst, "hypercloning", snr="none")
    assert ("axis", "mlp, parts", 2, ABSENT) in {(d.part, d.name, d.first, d.second) for d in differences(plan, other)}


def test_aki_takes_new_neurons_from_the_layer_above():
    src, _ = random_pair(FAMILIES["phi"], random.Random(5), whole=True)
    sizes = FAMILIES["phi"].sizes_of(src) | {"kv": 2, "group": 1, "layer": 2}
    pair = [FAMILIES["phi"].config_of(s) for s in (sizes, sizes | {"kv": 3, "mlp": sizes["mlp"] + 7})]
    model = model_of(pair[0])
    made = phigrow.plan(*pair, "aki", seed=3)
    small = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    wide = phigrow.expand_model(model, pair[1], method="aki", seed=3).state_dict()
    axes = made.axes
    head = sizes["q"]
    rows = {
        "mlp.fc1": axes["mlp"].source, "mlp.fc2": axes["hidden"].source, "self_attn.dense": axes["hidden"].source,
        **dict.fromkeys(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            (axes["kv"].source[:, None] * head + np.arange(head)).ravel(),
        ),
    }  # fmt: skip
    value = (axes["kv"].source[:, None] * head + np.arange(head)).ravel()
    columns = {"mlp.fc2": axes["mlp"].source, "self_attn.dense": value}
    for layer in range(2):
        for name, g in rows.items():
            f = columns.get(name, axes["normed"].source)
            old, above = ({e: small[f"model.layers.{k}.{name}.{e}"] for e in ("weight", "bias")} for k in (layer, 1))
            kept = np.arange(len(g)) < len(old["bias"])
            counts = np.bincount(f)[f]
            weight = np.where(kept[:, None], old["weight"][g], above["weight"][g])[:, f] / counts
            bias = np.where(kept, old["bias"][g], above["bias"][g])
            got = {e: wide[f"model.layers.{layer}.{name}.{e}"].numpy() for e in ("weight", "bias")}
            np.testing.assert_allclose(got["weight"], weight, rtol=1e-14, err_msg=name)
            np.testing.assert_array_equal(got["bias"], bias, err_msg=name)
        norm = f"model.layers.{layer}.input_layernorm.weight"
        assert np.array_equal(wide[norm].numpy(), small[norm][axes["normed"].source])
    assert made.approximations[-1] == "aki takes new coordinates of hidden, kv, mlp from the layer above"
    again = Plan.from_json(made.to_json())
    assert again.hash == made.hash
    assert np.array_equal(again.axes["mlp"].from_next_layer, np.arange(len(axes["mlp"].source)) >= sizes["mlp"])
    first = next(r for r in made.recipes() if r.name == "model.layers.0.mlp.fc1.weight")
    assert "new coordinates of mlp <- model.layers.1.mlp.fc1.weight" in span_lines(anatomy(first))
    assert next(r for r in made.recipes() if r.name == "model.layers.1.mlp.fc1.weight").next_layer_source is None


def test_aki_of_one_layer_is_fpi():
    src, dst = random_pair(FAMILIES["llama"], random.Random(2), whole=True)
    pair = src | {"num_hidden_layers": 1}, dst | {"num_hidden_layers": 1}
    model = model_of(pair[0])
    aki, fpi = (phigrow.expand_model(model, pair[1], method=method).state_dict() for method in ("aki", "fpi"))
    assert all(torch.equal(aki[name], fpi[name]) for name in fpi)
    assert phigrow.plan(*pair, "aki").exact
