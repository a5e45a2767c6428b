"""The contract: every method in every family, over random shapes, keeps what its plan claims. All found by name."""

import random

import pytest
import torch
from tiny_models import logits, model_of, probe, random_pair

import phigrow
from phigrow.errors import GrowthError
from phigrow.growth.registry import all_methods
from phigrow.models.families import all_families
from phigrow.testing import check_method

SHAPES = 6
EXACT = 1e-10
FAMILIES = all_families()


def measured(src, dst, method, dtype=torch.float64, **options):
    """max |dlogit|, and of log-probabilities, over the source's vocabulary."""
    model = model_of(src, dtype)
    grown = phigrow.expand_model(model, dst, method=method, **options)
    widen(grown)
    ids, vocab = probe(src["vocab_size"]), src["vocab_size"]
    old, new = logits(model, ids), logits(grown, ids)
    chances = old.log_softmax(-1) - new.log_softmax(-1)[..., :vocab]
    return float((old - new[..., :vocab]).abs().max()), float(chances.abs().max())


def widen(model):
    from phigrow.expansion.logits import widen_norms

    widen_norms(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", all_methods())
def test_every_method_keeps_its_claim_in_every_family(method, family):
    """Exact where the plan says so and only there, with legs that agree; or refused with a reason."""
    check_method(method, families=[family], shapes=SHAPES)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_lossless_is_exact_in_every_family_at_uneven_ratios(family, tied):
    rng, ratios = random.Random(5), set()
    taken = 0
    while taken < 2 * SHAPES:
        src, dst = random_pair(FAMILIES[family], rng, tie_word_embeddings=tied)
        old, new = (FAMILIES[family].sizes_of(config) for config in (src, dst))
        if new["rotary"] % old["rotary"]:
            with pytest.raises(GrowthError, match="lossless cannot grow the rotary part of a head"):
                phigrow.plan(src, dst, "lossless")
            continue
        worst, chances = measured(src, dst, "lossless")
        assert max(worst, chances) <= EXACT, (src, dst)
        ratios |= {axis for axis in ("hidden", "kv", "group", "mlp") if new.get(axis, 0) % old.get(axis, 1)}
        taken += 1
    assert ratios >= {"hidden", "kv", "mlp"}  # uneven, and key/value heads among them


@pytest.mark.parametrize("family", FAMILIES)
def test_one_altered_gain_is_noticed(family):
    # Negative control: the last normalisation without its part of the gain.
    rng = random.Random(7)
    src, dst = random_pair(FAMILIES[family], rng, whole=True, tie_word_embeddings=True)
    model = model_of(src)
    grown = phigrow.expand_model(model, dst, method="lossless")
    widen(grown)
    ids = probe(src["vocab_size"])
    assert float((logits(model, ids) - logits(grown, ids)).abs().max()) <= EXACT
    last = [parameter for name, parameter in grown.named_parameters() if "norm" in name and parameter.ndim == 1][-1]
    with torch.no_grad():
        last[: src["hidden_size"]] *= 2**0.5
    assert float((logits(model, ids) - logits(grown, ids)).abs().max()) > 1e-3


def test_a_vocabulary_without_bias_is_refused_and_with_one_is_exact():
    for name, family in FAMILIES.items():
        src, dst = random_pair(family, random.Random(9), whole=True)
        dst["vocab_size"] += 5
        if family.has_vocab_bias:
            for tied in (False, True):
                flag = {"tie_word_embeddings": tied}
                assert max(measured(src | flag, dst | flag, "lossless")) <= EXACT
        else:
            with pytest.raises(GrowthError, match=rf"cannot grow the vocabulary of a {name} model"):
                phigrow.plan(src, dst, "lossless")


def test_grouped_heads_that_become_fewer_a_group_are_refused_by_name():
    src, _ = random_pair(FAMILIES["llama"], random.Random(1), whole=True)
    src |= {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "head_dim": 8}
    with pytest.raises(GrowthError, match=r"smaller: group 2 -> 1\n.*axis heads: group, met first in .*q_proj"):
        phigrow.plan(src, src | {"num_key_value_heads": 4}, "lossless")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_every_family_is_grown_and_certified(family, tied, save_model, tmp_path):
    src, dst = random_pair(FAMILIES[family], random.Random(11), whole=True, tie_word_embeddings=tied)
    dst |= {"intermediate_size": src["intermediate_size"] + 7}
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**src), dtype=torch.float64)
    folder = save_model(model)
    out = phigrow.expand(folder, dst, tmp_path / "out", method="lossless")
    certificate = phigrow.verify(folder, out, dtype="float64")
    assert certificate.passed
    assert certificate.max_abs_dlogit <= EXACT
    # Negative control: the certificate of a method that claims nothing is apart.
    other = phigrow.expand(folder, dst, tmp_path / "wr", method="wr")
    assert phigrow.verify(folder, other, dtype="float64").max_abs_dlogit > 1e-6


@pytest.mark.parametrize("flag", ["attention_bias", "mlp_bias"])
def test_optional_biases_of_llama(flag):
    src, dst = random_pair(FAMILIES["llama"], random.Random(2), whole=True, **{flag: True})
    assert max(measured(src, dst, "lossless")) <= EXACT


@pytest.mark.parametrize("parallel", [False, True])
def test_both_residuals_of_gpt_neox(parallel):
    src, dst = random_pair(FAMILIES["gpt_neox"], random.Random(2), use_parallel_residual=parallel)
    assert max(measured(src, dst, "lossless")) <= EXACT
    with pytest.raises(GrowthError, match="use_parallel_residual"):
        phigrow.plan(src, dst | {"use_parallel_residual": not parallel}, "lossless")
