"""hypercloning against the construction of its authors' code, rewritten here from the formulas of that code.

github.com/apple/ml-hypercloning, ``hypercloning/common.py``, ``llama_cloning.py`` (with the attention of
``gemma_cloning.py``) and ``pythia_cloning.py``, read in a mirror at commit 51838ad. At a factor of n on every width:

- a linear layer is repeated n x n and divided by n, its bias repeated; the embedding is repeated and not divided;
- of queries, keys and values whole heads are repeated (Pythia's are fused, head by head);
- with noise, block columns 2k and 2k + 1 of every linear layer but the head get +N and -N, of the given power.

Noise goes onto the same matrices here, in the same pairs, at the same power; its values are drawn otherwise, and scaled
to their expected power, not each block to its own. Where key/value heads are fewer than heads the authors' code keeps
them and repeats the queries in order, so that queries meet another head's keys: see the last test.
"""

import random

import numpy as np
import pytest
import torch
from tiny_models import logits, model_of, probe, random_pair

import phigrow
from phigrow.expansion.logits import widen_norms
from phigrow.models.families import all_families

FAMILIES = all_families()


def linear(weight, n, snr=None, seed=0):
    """`clone_linear_layer`, a matrix."""
    repeated = np.tile(weight, (n, n)) / n
    if snr is None:
        return repeated
    rows, columns = weight.shape
    random_values = np.random.default_rng(seed)
    for down in range(n):
        for pair in range(n // 2):
            noise = random_values.normal(size=weight.shape)
            noise *= np.sqrt(np.square(weight / n).mean() / np.square(noise).mean() / 10 ** (snr / 10))
            at = slice(down * rows, (down + 1) * rows)
            repeated[at, 2 * pair * columns : (2 * pair + 1) * columns] += noise
            repeated[at, (2 * pair + 1) * columns : (2 * pair + 2) * columns] -= noise
    return repeated


def theirs(state, config, n, snr=None):
    """The state dict of the clone. Heads need no rule of their own: they are consecutive rows, fused ones too."""
    cloned = {}
    for name, tensor in state.items():
        values = tensor.numpy()
        if values.ndim == 1:
            cloned[name] = np.tile(values, n)
        elif "embed_tokens" in name or "embed_in" in name:
            cloned[name] = np.tile(values, (1, n))
        elif name.startswith(("lm_head", "embed_out")):
            cloned[name] = np.tile(values, (1, n)) / n
        elif "k_proj" in name or "v_proj" in name:
            kept = config["num_key_value_heads"] != config["num_attention_heads"]
            cloned[name] = np.tile(values, (1, n)) / n if kept else linear(values, n, snr)
        else:
            cloned[name] = linear(values, n, snr)
    return cloned


def sources(family, n, group=1):
    sizes = FAMILIES[family].sizes_of(random_pair(FAMILIES[family], random.Random(n), whole=True)[0])
    sizes |= {"group": group, "kv": 2, "q": 8, "rotary": 8 if family == "llama" else 4}
    sizes["hidden"] = 2 * group * 8
    src = FAMILIES[family].config_of(sizes) | {"max_position_embeddings": 64}
    factor = {"num_attention_heads", "intermediate_size", "hidden_size"}
    dst = src | {key: n * src[key] for key in factor}
    if group == 1 and family == "llama":
        dst["num_key_value_heads"] = n * src["num_key_value_heads"]
    return src, dst


def apart(one, other, ids):
    return float((logits(one, ids) - logits(other, ids)).abs().max())


def loaded(config, state):
    model = model_of(config)
    model.load_state_dict({name: torch.from_numpy(values) for name, values in state.items()}, strict=True)
    return model


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_authors_weights_and_function(family, n):
    src, dst = sources(family, n)
    model, ids = model_of(src), probe(src["vocab_size"])
    ours = phigrow.expand_model(model, dst, method="hypercloning", snr="none")
    wide = {name: tensor.numpy() for name, tensor in ours.state_dict().items()}
    clone = theirs(model.state_dict(), src, n)
    assert wide.keys() == clone.keys()
    differing = [name for name, values in clone.items() if not np.array_equal(values, wide[name])]
    assert n != 2 or differing == []  # every tensor, bit for bit; by 3 they divide and we multiply, which rounds apart
    for name, values in clone.items():
        np.testing.assert_allclose(wide[name], values, rtol=3e-16, err_msg=name)
    widen_norms(ours)
    assert apart(model, ours, ids) <= 1e-10
    assert apart(model, loaded(dst, clone), ids) <= 1e-10


def noise_of(noisy, clean, n):
    """Name -> noise as [rows, copy of what is read, source column], of every matrix that has any."""
    found = {name: noisy[name] - values for name, values in clean.items() if values.ndim == 2}
    return {name: each.reshape(len(each), n, -1) for name, each in found.items() if each.any()}


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_authors_noise(family, n):
    src, dst = sources(family, n)
    model, ids = model_of(src), probe(src["vocab_size"])
    state = model.state_dict()
    clean, noisy = theirs(state, src, n), theirs(state, src, n, snr=10)
    grown = phigrow.expand_model(model, dst, method="hypercloning")  # 10 dB
    ours = {name: tensor.numpy() for name, tensor in grown.state_dict().items()}
    quiet = phigrow.expand_model(model, dst, method="hypercloning", snr="none").state_dict()
    got = noise_of(noisy, clean, n)
    gets = noise_of(ours, {name: tensor.numpy() for name, tensor in quiet.items()}, n)
    assert got.keys() == gets.keys()  # every matrix of the layers, not the embedding and not the head
    for name, noise in gets.items():
        repeated = np.square(clean[name]).mean()
        for each in (noise, got[name]):
            assert np.abs(each[:, 0:2].sum(1)).max() <= 1e-15, name  # +N, -N
            assert not each[:, 2 * (n // 2) :].any(), name  # an odd copy has none
            rows = each.reshape(n, -1, *each.shape[1:])
            assert np.abs(rows[0] - rows[1]).max() > 1e-3  # every copy of what is written has its own
            power = np.square(each[:, : 2 * (n // 2)]).mean() / repeated
            assert power == pytest.approx(0.1, rel=1e-9 if each is got[name] else 0.25), name
    mean = [np.square(noise[:, :2]).mean() / np.square(clean[name]).mean() for name, noise in gets.items()]
    assert np.mean(mean) == pytest.approx(0.1, rel=0.05)
    widen_norms(grown)
    for wide in (grown, loaded(dst, noisy)):
        assert apart(model, wide, ids) <= 1e-10
    values = ours | {name: ours[name] + (0.01 if name in gets else 0) for name in ours}
    assert apart(model, loaded(dst, values), ids) > 1e-3  # negative control: noise that does not cancel


def test_grouped_heads_are_kept_right_here_and_not_by_the_authors():
    src, dst = sources("llama", 2, group=2)  # 4 heads in 2 groups become 8 heads in the same 2 groups
    model, ids = model_of(src), probe(src["vocab_size"])
    clone = theirs(model.state_dict(), src, 2)
    assert apart(model, loaded(dst, clone), ids) > 1e-3
    ours = phigrow.expand_model(model, dst, method="hypercloning", snr="none")
    wide = {name: tensor.numpy() for name, tensor in ours.state_dict().items()}
    widen_norms(ours)
    assert apart(model, ours, ids) <= 1e-10
    differing = {name.split(".")[-2] for name, values in clone.items() if not np.array_equal(values, wide[name])}
    assert differing == {"q_proj", "o_proj"}
