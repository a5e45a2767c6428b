"""LiGO: its formula written a second time, and the operators that it starts from."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import model_of, phi_config, phi_model, random_pair

import phigrow
from phigrow.checkpoints.bits import bits_of
from phigrow.errors import GrowthError
from phigrow.expansion.provenance import copied_values
from phigrow.growth.learned import Learned, selection
from phigrow.growth.lift import InMemory, Lift, lift
from phigrow.growth.matrices import FILE, Maps, read_maps, write_maps
from phigrow.growth.origins import Kind, anatomy, matching
from phigrow.growth.plan import Plan
from phigrow.inspection.difference import differences
from phigrow.inspection.explain import axis_rows, layer_rows
from phigrow.inspection.plan_file import read_plan_file
from phigrow.models.families import all_families

FAMILIES = all_families()
SRC, DST = phi_config(24, 3, 30, 2, 4), phi_config(40, 5, 37, 3, 4)


def drawn_maps(plan: Plan, folder, seed=0, spread=0.1) -> Maps:
    """The start's matrices, moved at random, in a file; float32 holds them exactly."""
    random_values = np.random.default_rng(seed)
    learned, tensors = plan.learned, {}
    for name, size in learned.widths.items():
        tensors[f"width/{name}"] = learned.matrix(name) + spread * random_values.normal(size=size)
    for line in learned.lines():
        start = learned.depth(line)
        tensors[f"depth/{line}"] = start + spread * random_values.normal(size=start.shape)
    folder.mkdir(parents=True, exist_ok=True)
    said = {"options": plan.options, "depth": plan.depth, "rounding": "half-even", "seed": plan.seed}
    return write_maps(folder, tensors, {"start": said, "cost": {"tokens": 0, "flops": 0.0, "seconds": 0.0}})


@pytest.mark.parametrize(("family", "start"), [*((family, "fpi") for family in FAMILIES), ("phi", "tile")])
def test_at_its_start_it_is_the_operator_that_it_starts_from(family, start, tmp_path):
    """With the matrices of the start in a file, by dense products, and without any."""
    rng = random.Random(4)
    for k in range(2):
        src, dst = random_pair(FAMILIES[family], rng, tie_word_embeddings=k == 1)
        model = model_of(src)
        expected = phigrow.expand_model(model, dst, method=start, depth="stack", seed=5).state_dict()
        plan = phigrow.plan(src, dst, f"ligo:start={start}", seed=5)
        drawn_maps(plan, tmp_path / f"{k}", spread=0.0)
        moved = drawn_maps(plan, tmp_path / "moved", spread=1e-3)
        for how in ({"seed": 5}, {"maps": tmp_path / f"{k}"}):
            grown = phigrow.expand_model(model, dst, method=f"ligo:start={start}", **how).state_dict()
            worst = max(float((grown[name] - value).abs().max()) for name, value in expected.items())
            assert worst <= 1e-12, (how, src, dst)
        if k == 0:  # negative control: matrices that are not the start's
            grown = phigrow.expand_model(model, dst, method=f"ligo:start={start}", maps=moved.path).state_dict()
            assert max(float((grown[name] - value).abs().max()) for name, value in expected.items()) > 1e-5


def formula(model, plan, maps):
    """W'_l = sum over k of w[l, k] B W_k A^T for a Phi without groups, from the file's matrices alone."""
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    b = {name.removeprefix("width/"): value for name, value in maps.tensors.items() if name.startswith("width/")}
    axes = plan.axes
    heads = {p: np.kron(axes["kv"].read, axes[p].read) for p in ("q", "v")}
    queries = np.kron(axes["kv"].write, axes["q"].write)
    read = b["stream"] * axes["normed"].read[:, None]
    out = {"model.embed_tokens.weight": weights["model.embed_tokens.weight"] @ b["stream"].T}
    for end in ("weight", "bias"):
        out[f"model.final_layernorm.{end}"] = b["stream"] @ weights[f"model.final_layernorm.{end}"]
    out["lm_head.weight"] = weights["lm_head.weight"] @ read.T
    out["lm_head.bias"] = weights["lm_head.bias"]
    legs = {
        "input_layernorm": (b["stream"], None),
        "self_attn.q_proj": (queries[:, None] * b["q"], read),
        "self_attn.k_proj": (b["k"], read),
        "self_attn.v_proj": (b["v"], read),
        "self_attn.dense": (b["stream"], heads["v"][:, None] * b["v"]),
        "mlp.fc1": (b["mlp"], read),
        "mlp.fc2": (b["stream"], axes["mlp"].read[:, None] * b["mlp"]),
    }
    for stem, (write, reads) in legs.items():
        for end in ("weight", "bias"):
            line = f"model.layers.{{layer}}.{stem}.{end}"
            coefficients = maps.tensors[f"depth/{line}"]
            for at, row in enumerate(coefficients):
                value = sum(w * weights[line.format(layer=k)] for k, w in enumerate(row))
                made = write @ value if reads is None or end == "bias" else write @ value @ reads.T
                out[line.format(layer=at)] = made
    return out


def test_learned_maps_are_applied_by_the_formula_of_the_paper(tmp_path):
    plan = phigrow.plan(SRC, DST, "ligo")
    assert sorted(plan.learned.widths) == ["k", "mlp", "q", "stream", "v"]
    maps = drawn_maps(plan, tmp_path / "maps")
    model = phi_model(SRC)
    grown = phigrow.expand_model(model, DST, method="ligo", maps=tmp_path / "maps").state_dict()
    expected = formula(model, plan, maps)
    assert expected.keys() == grown.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(grown[name].numpy(), value, rtol=0, atol=1e-12, err_msg=name)


def test_groups_that_share_a_key_and_fused_projections(tmp_path):
    """Of values the output reads the same mixture for every query of a group; queries mix with no keys."""
    for family, size in (("llama", {"group": 2}), ("gpt_neox", {})):
        sizes = {"vocab": 29, "hidden": 24, "kv": 2, "q": 6, "rotary": 6, "mlp": 20, "layer": 2, "group": 1, **size}
        sizes["hidden"] = sizes["kv"] * sizes["group"] * sizes["q"]
        bigger = {**sizes, "kv": 3, "hidden": 3 * sizes["group"] * sizes["q"]}
        src, dst = (FAMILIES[family].config_of(s) for s in (sizes, bigger))
        plan = phigrow.plan(src, dst, "ligo")
        drawn_maps(plan, tmp_path / family)
        learned = phigrow.plan(src, dst, "ligo", maps=tmp_path / family).learned
        v = learned.matrix("v").reshape(3, 6, 2, 6)
        if family == "llama":
            read = learned.grown(("kv", "group", "v"), plan.composites["kv", "group", "v"]).dense.write(np.float64)
            read = read.reshape(3, 2, 6, 2, 2, 6)
            for g in range(2):
                assert np.array_equal(read[:, g, :, :, g], v)
                assert not read[:, g, :, :, 1 - g].any()
        else:
            fused = learned.grown(("kv", "q|k|v"), plan.composites["kv", "q|k|v"]).dense.write(np.float64)
            fused = fused.reshape(3, 3, 6, 2, 3, 6)
            for p, name in enumerate("qkv"):
                assert np.array_equal(fused[:, p, :, :, p], learned.matrix(name).reshape(3, 6, 2, 6))
                assert not fused[:, p, :, :, (p + 1) % 3].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_is_grown_as_a_live_model_and_says_how(dtype, save_model, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("phigrow.expansion.write_tensors.BLOCK_VALUES", 700)
    model = phi_model(SRC, getattr(torch, dtype))
    maps = drawn_maps(phigrow.plan(SRC, DST, "ligo", seed=3), tmp_path / "maps")
    folder = save_model(model)
    out = phigrow.expand(folder, DST, tmp_path / "out", method="ligo", maps=tmp_path / "maps", shard_size="20KB")
    written = AutoModelForCausalLM.from_pretrained(out).state_dict()
    live = phigrow.expand_model(model, DST, method="ligo", maps=maps.path).state_dict()
    assert all(np.array_equal(bits_of(written[name]), bits_of(tensor)) for name, tensor in live.items())
    read = read_plan_file(out)
    assert read.plan.maps.sha256 == maps.sha256
    assert read.plan.seed == 3  # of the start that was learned from
    assert "--maps" in read.provenance.command
    assert read.provenance.learning["start"]["seed"] == 3
    assert not differences(read.plan, phigrow.plan(read.plan.src_config, read.plan.dst_config, "ligo", maps=out))
    assert [
        d.part for d in differences(read.plan, phigrow.plan(read.plan.src_config, read.plan.dst_config, "ligo", seed=3))
    ][-1] == "maps"
    assert not read.plan.exact
    # Grown again from what lies in its folder, and looked at.
    embedding = {"model.embed_tokens.weight": InMemory(model.state_dict()["model.embed_tokens.weight"])}
    again = lift(next(read.plan.recipes()), embedding, model.dtype)
    assert torch.equal(again, live["model.embed_tokens.weight"])
    found = matching(read.plan, "*.0.self_attn.q_proj.weight")[0]
    assert found.counts[Kind.MIXED] == 40 * 40
    assert len(found.to_json()["blend"]) == 2
    (out / FILE).write_bytes((out / FILE).read_bytes()[:-4] + b"abcd")
    with pytest.raises(GrowthError, match=r"the learned maps are not those of the plan[\s\S]*growth-maps"):
        list(read_plan_file(out).plan.recipes())
    (out / FILE).unlink()
    with pytest.raises(GrowthError, match=r"the learned maps of the plan are missing[\s\S]*put the file beside"):
        list(read_plan_file(out).plan.recipes())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_do_not_show(dtype, tmp_path):
    src, dst = phi_config(48, 3, 70, 2, 4), phi_config(104, 4, 90, 3, 4)
    drawn_maps(phigrow.plan(src, dst, "ligo"), tmp_path)
    plan = phigrow.plan(src, dst, "ligo", maps=tmp_path)
    sources = {n: InMemory(t) for n, t in phi_model(src, getattr(torch, dtype)).state_dict().items()}
    for recipe in plan.recipes():
        made = [Lift(recipe, sources, dtype) for _ in range(2)]
        whole = made[0].rows(0, recipe.shape[0])
        cuts = sorted({min(cut, recipe.shape[0]) for cut in (0, 1, 31, 33, recipe.shape[0])})
        parts = [made[1].rows(a, b) for a, b in itertools.pairwise(cuts)]
        assert np.array_equal(np.concatenate(parts), whole), recipe.name


def test_depth_alone_and_width_alone(tmp_path):
    deep = {**SRC, "num_hidden_layers": 4}
    plan = phigrow.plan(SRC, deep, "ligo", depth="identity")
    assert plan.exact
    assert plan.learned.widths == {}
    assert len(plan.learned.lines()) == 14
    assert [r.is_zero for r in plan.recipes() if r.name.endswith("1.mlp.fc2.weight")] == [True]
    maps = drawn_maps(plan, tmp_path / "deep")
    model = phi_model(SRC)
    grown = phigrow.expand_model(model, deep, method="ligo", maps=tmp_path / "deep").state_dict()
    line = "model.layers.{layer}.mlp.fc1.weight"
    expected = sum(w * model.state_dict()[line.format(layer=k)] for k, w in enumerate(maps.tensors[f"depth/{line}"][3]))
    assert torch.allclose(grown[line.format(layer=3)], expected, rtol=0, atol=1e-14)
    learned = phigrow.plan(SRC, deep, "ligo", maps=tmp_path / "deep")
    assert layer_rows(learned)[3] == (3, 1, "learned sum of all, started from this one")
    wide = phigrow.plan(SRC, {**SRC, "intermediate_size": 50}, "ligo")
    assert wide.learned.widths == {"mlp": (50, 30)}
    assert wide.learned.lines() == []
    assert [row[0] for row in axis_rows(wide)][-1] == "mlp"
    assert "learned, at its start" in axis_rows(wide)[-1][2]
    assert np.array_equal(wide.learned.matrix("mlp"), selection(wide.axes["mlp"]))
    assert "without learned maps" in wide.notes[-1]
    assert Plan.from_json(wide.to_json()).hash == wide.hash


def test_what_does_not_fit_is_said(tmp_path):
    plan = phigrow.plan(SRC, DST, "ligo")
    maps = drawn_maps(plan, tmp_path / "maps")
    with pytest.raises(GrowthError, match=r"method tile takes no maps[\s\S]*only ligo grows with learned maps"):
        phigrow.plan(SRC, DST, "tile", maps=maps.path)
    with pytest.raises(GrowthError, match=r"no learned maps[\s\S]*phigrow learn-growth"):
        phigrow.plan(SRC, DST, "ligo", maps=tmp_path / "none")
    with pytest.raises(GrowthError, match=r"depth is 'identity', but the maps were learned from depth 'stack'"):
        phigrow.plan(SRC, DST, "ligo", maps=maps.path, depth="identity")
    with pytest.raises(GrowthError, match=r"start is 'tile', but the maps were learned from start 'fpi'"):
        phigrow.plan(SRC, DST, "ligo:start=tile", maps=maps.path)
    with pytest.raises(
        GrowthError,
        match=r"do not fit the plan[\s\S]*its shape must be \[38, 30\], but the matrix is of shape \[37, 30\]",
    ):
        phigrow.plan(SRC, {**DST, "intermediate_size": 38}, "ligo", maps=maps.path)
    with pytest.raises(GrowthError, match=r"do not fit the plan[\s\S]*the plan does not use"):
        phigrow.plan(SRC, {**DST, "num_hidden_layers": 2}, "ligo", maps=maps.path)
    with pytest.raises(GrowthError, match=r"ligo cannot be mixed[\s\S]*use it alone"):
        phigrow.plan(SRC, DST, "lossless,mlp=ligo")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(GrowthError, match="the learned maps cannot be read"):
        read_maps(tmp_path / "text")
    odd = tmp_path / b"caf\xe9".decode("utf-8", "surrogateescape")  # in Latin-1
    odd.mkdir()
    written = write_maps(odd, {"a": np.ones(1)}, {"start": {"method": "tile"}})
    assert (read_maps(odd)[0].sha256, read_maps(odd)[1]) == (written.sha256, {"start": {"method": "tile"}})
    assert Maps(written.sha256, odd / FILE).tensors == {"a": np.ones(1)}
    write_maps(tmp_path, {"a": np.zeros(1)}, {})
    with pytest.raises(GrowthError, match="the learned maps have no valid `start` entry"):
        read_maps(tmp_path)
    broken = {name: value.copy() for name, value in maps.tensors.items()}
    broken["width/q"][0, 0] = np.nan
    write_maps(tmp_path, broken, read_maps(maps.path)[1])
    with pytest.raises(GrowthError, match=r"width/q in[\s\S]*not finite"):
        phigrow.plan(SRC, DST, "ligo", maps=tmp_path)


def test_a_learned_plan_is_its_maps(tmp_path):
    plan = phigrow.plan(SRC, DST, "ligo")
    one, two = (drawn_maps(plan, tmp_path / str(k), seed=k) for k in range(2))
    plans = [phigrow.plan(SRC, DST, "ligo", maps=maps.path) for maps in (one, two)]
    assert plans[0].hash != plans[1].hash
    assert replace(plans[0], maps=two).hash == plans[1].hash
    assert isinstance(plans[0].learned, Learned)
    with pytest.raises(GrowthError, match=r"the maps of the plan have no hash"):
        Plan.from_json({**plan.to_json(), "maps": {"sha256": 3}})


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_norm_weights_are_no_new_values(family, tmp_path):
    rng = random.Random(4)
    pairs = (random_pair(FAMILIES[family], rng) for _ in itertools.count())
    src, dst = next((src, dst) for src, dst in pairs if src["hidden_size"] < dst["hidden_size"])
    plan = phigrow.plan(src, dst, "ligo", maps=drawn_maps(phigrow.plan(src, dst, "ligo"), tmp_path).path.parent)
    recipes = [recipe for recipe in plan.recipes() if recipe.kind in ("scale", "shift") and recipe.is_dense]
    assert recipes
    copied = copied_values(plan)
    for recipe in recipes:
        counts = anatomy(recipe).counts
        assert counts[Kind.MIXED] == recipe.shape[0], recipe.name
        # A learning rate for new values leaves them alone.
        assert copied["spans"][recipe.line] == [[[0, recipe.shape[0]]]]
        # They are mixtures indeed: twice the source's weight is twice the value.
        ones = np.ones(recipe.source_shape)
        sources = {term.source: InMemory(torch.from_numpy(ones)) for term in recipe.terms}
        twice = {name: InMemory(torch.from_numpy(2 * ones)) for name in sources}
        once, doubled = (lift(recipe, weights, torch.float64) for weights in (sources, twice))
        assert torch.allclose(2 * once, doubled), recipe.name
