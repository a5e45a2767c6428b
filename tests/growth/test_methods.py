"""wr and tile against formulas written out here a second time, head by head, with einops and plain indexing."""

import random

import numpy as np
import pytest
import torch
from einops import rearrange
from tiny_models import phi_config, phi_model, random_growth

import phigrow
from phigrow.errors import GrowthError
from phigrow.growth.method import Option
from phigrow.growth.methods.depth import layer_map
from phigrow.growth.registry import all_methods, find_method

# What each stored axis of a tensor is, spelled out by hand so that the table itself is under test.
LAYOUT = {
    "embed_tokens.weight": ("vocab", "hidden"),
    "q_proj.weight": ("kv group q", "hidden"),
    "k_proj.weight": ("kv k", "hidden"),
    "v_proj.weight": ("kv v", "hidden"),
    "dense.weight": ("hidden", "kv group v"),
    "fc1.weight": ("mlp", "hidden"),
    "fc2.weight": ("hidden", "mlp"),
    "lm_head.weight": ("vocab", "hidden"),
    "q_proj.bias": ("kv group q",),
    "k_proj.bias": ("kv k",),
    "v_proj.bias": ("kv v",),
    "dense.bias": ("hidden",),
    "fc1.bias": ("mlp",),
    "fc2.bias": ("hidden",),
    "lm_head.bias": ("vocab",),
    "layernorm.weight": ("hidden",),
    "layernorm.bias": ("hidden",),
}


def layout(name):
    return next(axes for ending, axes in LAYOUT.items() if name.endswith(ending))


def sizes(config):
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    head = config["hidden_size"] // heads
    return {
        "vocab": config["vocab_size"], "hidden": config["hidden_size"], "mlp": config["intermediate_size"],
        "kv": kv, "group": heads // kv, "q": head, "k": head, "v": head,
        "rotary": round(head * config["partial_rotary_factor"]),
    }  # fmt: skip


def simple(n, m, anchor, fill):
    """Source of each of m coordinates: 'wrap' or a block with -1 outside."""
    start = 0 if anchor == "edge" else (m - n) // 2
    if fill == "wrap":
        return [(j - start) % n for j in range(m)]
    return [j - start if start <= j < start + n else -1 for j in range(m)]


def source_of(axis, old, new, anchor, fill):
    if axis not in ("q", "k"):
        return simple(old[axis], new[axis], anchor, fill)
    half, new_half = old["rotary"] // 2, new["rotary"] // 2
    first = simple(half, new_half, anchor, fill)
    second = [j + half if j >= 0 else -1 for j in first]
    rest, new_rest = old[axis] - 2 * half, new[axis] - 2 * new_half
    third = simple(rest, new_rest, anchor, fill) if rest else [-1] * new_rest
    return first + second + [j + 2 * half if j >= 0 else -1 for j in third]


def expand_axis(values, dim, axis, old, new, anchor, fill):
    """Gather one stored axis, one named part after the other; also the mask of what was copied."""
    parts = axis.split()
    shape = " ".join(f"d{k}" for k in range(values.ndim))
    inner = shape.replace(f"d{dim}", f"({axis})", 1)
    split = rearrange(values, f"{inner} -> {inner.replace('(', '').replace(')', '')}", **{p: old[p] for p in parts})
    copied = np.ones(1, dtype=bool)
    for k, part in enumerate(parts):
        index = np.array(source_of(part, old, new, anchor, fill))
        split = np.take(split, np.maximum(index, 0), axis=dim + k)
        copied = np.logical_and.outer(copied, index >= 0)
    flat = inner.replace("(", "").replace(")", "")
    return rearrange(split, f"{flat} -> {inner}"), copied.reshape(-1)


def oracle(values, name, old, new, anchor, fill):
    masks = []
    for dim, axis in enumerate(layout(name)):
        values, mask = expand_axis(values, dim, axis, old, new, anchor, fill)
        masks.append(mask)
    return values, masks[0] if len(masks) == 1 else np.logical_and.outer(*masks)


def pairs(seed, count=12):
    rng = random.Random(seed)
    return [random_growth(rng) for _ in range(count)]


def interposed(layer, src, dst):
    return min(src - 1, round(layer * src / dst))


def source_name(name, src, dst):
    words = name.split(".")
    if words[1] == "layers":
        words[2] = str(interposed(int(words[2]), src["num_hidden_layers"], dst["num_hidden_layers"]))
    return ".".join(words)


@pytest.mark.parametrize("anchor", ["edge", "center"])
def test_wr_copies_one_block_and_draws_the_rest(anchor):
    drawn = []
    for src, dst in pairs(11):
        model = phi_model(src)
        old, new = sizes(src), sizes(dst)
        grown = phigrow.expand_model(model, dst, method="wr", anchor=anchor, seed=5).state_dict()
        state, here = model.state_dict(), []
        for name, tensor in grown.items():
            expected, copied = oracle(state[source_name(name, src, dst)].numpy(), name, old, new, anchor, "block")
            values = tensor.numpy()
            np.testing.assert_array_equal(values[copied], expected[copied], err_msg=name)
            if name.endswith("layernorm.weight"):
                assert (values[~copied] == 1).all(), name
            elif name.endswith(".bias"):
                assert (values[~copied] == 0).all(), name
            else:
                here.append(values[~copied])
        drawn.append(np.concatenate(here))
        starts = {part[:8].tobytes() for part in here if len(part) >= 8}
        assert len(starts) == sum(len(part) >= 8 for part in here) > 10  # no two tensors draw the same values
    fresh = np.concatenate(drawn)
    assert len(fresh) > 50_000
    assert abs(fresh.mean()) < 4 * 0.02 / len(fresh) ** 0.5
    assert abs(fresh.std() / 0.02 - 1) < 0.01


@pytest.mark.parametrize("anchor", ["edge", "center"])
def test_tile_wraps_every_axis(anchor):
    for src, dst in pairs(12):
        model = phi_model(src)
        old, new = sizes(src), sizes(dst)
        grown = phigrow.expand_model(model, dst, method="tile", anchor=anchor).state_dict()
        state = model.state_dict()
        for name, tensor in grown.items():
            expected, copied = oracle(state[source_name(name, src, dst)].numpy(), name, old, new, anchor, "wrap")
            np.testing.assert_array_equal(tensor.numpy()[copied], expected[copied], err_msg=name)
            # Only a head that is all rotary has nothing to wrap into its new coordinates.
            assert copied.all() or old["q"] == old["rotary"]


def test_the_oracle_can_fail():
    # Negative control: another anchor, another fill and a swapped axis are all noticed.
    src, dst = phi_config(32, 4, 40, 2, 4), phi_config(72, 6, 70, 2, 4)
    state = phi_model(src).state_dict()
    grown = phigrow.expand_model(phi_model(src), dst, method="tile").state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    old, new = sizes(src), sizes(dst)
    expected, _ = oracle(state[name].numpy(), name, old, new, "edge", "wrap")
    assert np.array_equal(grown[name].numpy(), expected)
    assert not np.array_equal(grown[name].numpy(), oracle(state[name].numpy(), name, old, new, "center", "wrap")[0])
    assert not np.array_equal(grown[name].numpy(), np.resize(state[name].numpy(), grown[name].shape))


@pytest.mark.parametrize("scale", ["preserve", "rms"])
def test_tile_read_gains(scale):
    """Readers are divided by how often what they read was copied; a query carries the gain of its key."""
    src, dst = phi_config(24, 3, 10, 1, 4), phi_config(72, 6, 25, 1, 4)  # heads of 8 become heads of 12
    model = phi_model(src)
    old, new = sizes(src), sizes(dst)
    plain = phigrow.expand_model(model, dst, method="tile").state_dict()
    scaled = phigrow.expand_model(model, dst, method="tile", scale=scale).state_dict()

    def gain(axis):
        index = np.array(source_of(axis, old, new, "edge", "wrap"))
        counts = np.bincount(index)[index]
        return 1 / (counts if scale == "preserve" else np.sqrt(counts))

    value = np.kron(np.kron(gain("kv"), gain("group")), gain("v"))
    temperature = np.sqrt(12 / 8) if scale == "preserve" else 1.0
    query = np.tile(gain("q") * temperature, new["kv"] * new["group"])
    layer = "model.layers.0."
    expected = {
        "lm_head.weight": gain("hidden"),
        layer + "mlp.fc1.weight": gain("hidden"),
        layer + "self_attn.v_proj.weight": gain("hidden"),
        layer + "self_attn.k_proj.weight": gain("hidden"),
        layer + "self_attn.q_proj.weight": query[:, None] * gain("hidden"),
        layer + "self_attn.q_proj.bias": query,
        layer + "self_attn.dense.weight": value,
        layer + "mlp.fc2.weight": gain("mlp"),
    }
    for name, tensor in scaled.items():
        np.testing.assert_allclose(tensor, plain[name].numpy() * expected.get(name, 1.0), rtol=1e-14, err_msg=name)


def test_noise_is_invisible_to_the_function_and_breaks_every_copy():
    src, dst = phi_config(24, 3, 10, 1, 4), phi_config(48, 6, 25, 1, 4)
    model = phi_model(src)
    quiet = phigrow.expand_model(model, dst, method="tile", scale="preserve").state_dict()
    noisy = phigrow.expand_model(model, dst, method="tile", scale="preserve", noise=0.5, seed=3).state_dict()
    name = "model.layers.0.mlp.fc1.weight"
    added = (noisy[name] - quiet[name]).numpy()
    # N (I - E R): what copies of one coordinate receive cancels...
    np.testing.assert_allclose(added[:, :24] + added[:, 24:], 0, atol=1e-15)
    # ... and is of the size asked for: each tensor's root mean square, times the read gain 1/2, times what the
    # projection leaves of the noise, sqrt(1/2).
    rms = float(model.state_dict()[name].square().mean().sqrt())
    assert added.std() == pytest.approx(0.5 * rms * 0.5 * 0.5**0.5, rel=0.05)
    assert float((noisy[name][10:20] - noisy[name][:10]).abs().min()) > 0  # rows that were copies differ now
    unread = [key for key in quiet if torch.equal(quiet[key], noisy[key])]
    assert unread == [key for key in quiet if key.endswith(("bias", "layernorm.weight")) or "embed" in key]


def test_depth_formulas():
    for src in range(1, 9):
        for dst in range(src, 20):
            layers, identity_layers = layer_map("interpose", src, dst)
            assert layers == tuple(min(src - 1, round(k * src / dst)) for k in range(dst))
            assert not identity_layers
            assert layer_map("interpose", src, dst, "floor")[0] == tuple(k * src // dst for k in range(dst))
            half_up = tuple(min(src - 1, int(np.floor(k * src / dst + 0.5))) for k in range(dst))
            assert layer_map("interpose", src, dst, "half-up")[0] == half_up
            assert layer_map("stack", src, dst) == (tuple(k % src for k in range(dst)), frozenset())
            layers, identity_layers = layer_map("identity", src, dst)
            assert [k for i, k in enumerate(layers) if i not in identity_layers] == list(range(src))
            gaps = np.diff([i for i in range(dst) if i not in identity_layers])
            assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1  # spread evenly


def test_published_depth_maps():
    assert layer_map("solar", 32, 48) == ((*range(24), *range(8, 32)), frozenset())  # SOLAR 10.7B
    layers, inserted = layer_map("llama-pro", 32, 40)  # LLaMA-Pro 8.3B: one block after every four
    assert inserted == set(range(4, 40, 5))
    assert [layers[k] for k in sorted(inserted)] == list(range(3, 32, 4))
    assert layer_map("midas", 12, 16) == ((*range(8), *range(4, 12)), frozenset())
    for src in range(1, 7):
        for dst in range(src, 2 * src + 1):
            for method in ("solar", "llama-pro", "midas"):
                layers, inserted = layer_map(method, src, dst)
                assert (len(layers), set(layers)) == (dst, set(range(src)))
                kept = [k for i, k in enumerate(layers) if i not in inserted]
                assert kept == list(range(src)) if inserted or dst == src else len(kept) == dst
        for method in ("solar", "midas"):
            with pytest.raises(GrowthError, match="at most doubles the layers"):
                layer_map(method, src, 2 * src + 1)


def test_random_depth_keeps_source_layers_in_order_where_identity_has_them():
    assert layer_map("random", 1, 6) == ((0, -1, -1, -1, -1, -1), frozenset())
    assert layer_map("random", 2, 6) == ((0, -1, -1, 1, -1, -1), frozenset())
    for src in range(1, 9):
        for dst in range(src, 20):
            layers, identity_layers = layer_map("random", src, dst)
            assert not identity_layers
            assert [k for k in layers if k >= 0] == list(range(src))
            where, inserted = layer_map("identity", src, dst)
            assert layers == tuple(-1 if k in inserted else layer for k, layer in enumerate(where))


def test_published_depth_map_of_phi_2():
    layers, _ = layer_map("interpose", 24, 32)
    assert layers[:8] == (0, 1, 2, 2, 3, 4, 4, 5)
    assert layers[-1] == 23


def test_identity_layers_write_nothing_and_keep_their_layernorm():
    src, dst = phi_config(layers=2), phi_config(layers=4)
    grown = phigrow.expand_model(phi_model(src), dst, method="lossless").state_dict()
    for layer in (1, 3):
        for tail in ("self_attn.dense.weight", "self_attn.dense.bias", "mlp.fc2.weight", "mlp.fc2.bias"):
            assert not grown[f"model.layers.{layer}.{tail}"].any()
        assert grown[f"model.layers.{layer}.input_layernorm.weight"].all()
        assert grown[f"model.layers.{layer}.mlp.fc1.weight"].any()
    assert grown["model.layers.2.mlp.fc2.bias"].any()


@pytest.mark.parametrize("method", all_methods())
def test_a_plan_between_equal_configurations_changes_no_bit(method):
    config = phi_config()
    model = phi_model(config, torch.bfloat16)
    made = phigrow.plan(config, config, method)
    assert made.exact == (method != "shrink_perturb")
    if not made.exact:
        pytest.skip("shrink_perturb shrinks and perturbs whatever the sizes")
    grown = phigrow.expand_model(model, config, method=method).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, grown[name]), name


def test_methods_are_found_by_name_and_check_their_options():
    published = {
        "aki", "fpi", "gesmundo", "hypercloning", "isometric", "lemon", "ligo", "lossless", "net2net",
        "shrink_perturb", "sparkling", "staged", "tile", "wr",
    }  # fmt: skip
    assert published <= set(all_methods())
    assert find_method("tile").resolve_options({"scale": "rms"}) == {"anchor": "edge", "scale": "rms"}
    with pytest.raises(
        GrowthError, match=r"method 'copy' is unknown\n  where: method\n.*choose one of aki, .*lossless, .*tile, wr"
    ):
        find_method("copy")
    with pytest.raises(
        GrowthError, match=r"method wr has no option 'scale'\n  where: method\n.*it has: anchor\n.*use one of anchor"
    ):
        find_method("wr").resolve_options({"scale": "rms"})
    with pytest.raises(GrowthError, match=r"scale 'big' is not allowed\n(.|\n)*give none, preserve or rms"):
        find_method("tile").resolve_options({"scale": "big"})


def test_options_have_types_and_are_spelled_as_their_default_is():
    snr, shrink = find_method("hypercloning").options["snr"], find_method("shrink_perturb").options["shrink"]
    assert [snr.parse(value) for value in (20, "20", 20.0, "none", -0.0)] == [20.0, 20.0, 20.0, "none", 0.0]
    assert [snr.spell(value) for value in (20.0, 12.5, "none", 0.0)] == ["20", "12.5", "none", "0"]
    assert [shrink.spell(shrink.parse(value)) for value in (1, "0.40", 0.25)] == ["1.0", "0.4", "0.25"]
    whole = Option(int, 2, "copies", range=(1, 8))
    assert (whole.parse("3"), whole.spell(3), whole.allowed) == (3, "3", "a whole number from 1 to 8")
    for wrong in ("2.5", 0, 9, "two", None, True, [1], "1e400", 10**400):
        with pytest.raises(ValueError, match="a whole number from 1 to 8"):
            whole.parse(wrong)


@pytest.mark.parametrize("made", [{"type": str, "default": "a"}, {"type": float, "default": 9, "range": (0, 1)}])
def test_an_option_that_contradicts_itself_is_refused(made):
    with pytest.raises(ValueError, match=r"option of type str needs choices|a number from 0 to 1"):
        Option(**made, help="")
