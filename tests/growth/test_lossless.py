"""Function preservation over many random shapes; the numbers of phigrow.verify.TOLERANCE come from here."""

import random

import pytest
import torch
from tiny_models import logits, phi_config, phi_model, probe, random_growth

import phigrow
from phigrow.expansion.verify import TOLERANCE

SHAPES = 40


def difference(src, dst, dtype, method="lossless", storage=None, **options):
    """max |dlogit| over the source's vocabulary, arithmetic in ``dtype``, weights stored in ``storage``."""
    model = phi_model(src, dtype)
    if storage is not None:  # the source is what is stored; only the grown weights are rounded anew
        model = model.to(storage)
    grown = phigrow.expand_model(model, dst, method=method, **options)
    ids = probe(src["vocab_size"])
    old, new = logits(model.to(dtype), ids), logits(grown.to(dtype), ids)
    return float((old - new[..., : src["vocab_size"]]).abs().max()), old, new


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_lossless_preserves_the_function_at_any_shape(dtype, most):
    rng = random.Random(0)
    ratios = set()
    for _ in range(SHAPES):
        src, dst = random_growth(rng)
        worst, old, new = difference(src, dst, dtype)
        assert worst <= most, (src, dst)
        vocab = src["vocab_size"]
        log_difference = old.log_softmax(-1) - new.log_softmax(-1)[..., :vocab]
        assert float(log_difference.abs().max()) <= most, (src, dst)
        ratios.add(dst["hidden_size"] % src["hidden_size"] == 0)
    assert ratios == {True, False}  # whole and uneven factors were both among them


@pytest.mark.parametrize(("storage", "name"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")])
def test_rounding_of_stored_weights_is_within_the_certificate_tolerance(storage, name):
    rng = random.Random(1)
    worst = max(difference(*random_growth(rng), torch.float32, storage=storage)[0] for _ in range(SHAPES))
    # Pinned from both sides: the tolerance is neither exceeded nor so wide that it checks nothing.
    assert TOLERANCE[name] / 20 < worst < TOLERANCE[name]


def test_preserving_tile_is_exact_at_whole_factors_of_hidden():
    rng = random.Random(2)
    for _ in range(SHAPES // 2):
        src, dst = random_growth(rng, whole=True)
        noise = rng.choice([0.0, 0.3])
        plan_of = {"method": "tile", "scale": "preserve", "depth": "identity", "anchor": rng.choice(["edge", "center"])}
        made = phigrow.plan(src, dst, noise=noise, **plan_of)
        worst, *_ = difference(src, dst, torch.float64, noise=noise, **plan_of)
        assert made.exact, made.approximations
        assert worst <= 1e-10, (src, dst)


def test_plans_that_claim_nothing_do_change_the_function():
    # Negative control: the same measurement on the approximate methods, and on a lossless model with one altered value.
    src, dst = phi_config(32, 4, 48, 2, 4), phi_config(48, 6, 60, 3, 4)
    for method in ("wr", "tile"):
        assert not phigrow.plan(src, dst, method).exact
        assert difference(src, dst, torch.float64, method)[0] > 1e-2
    assert not phigrow.plan(src, dst, "tile", scale="preserve", depth="identity").exact
    assert difference(src, dst, torch.float64, "tile", scale="preserve", depth="identity")[0] > 1e-3
    model = phi_model(src)
    grown = phigrow.expand_model(model, dst, method="lossless")
    ids = probe(61)
    with torch.no_grad():
        grown.model.layers[0].mlp.fc2.weight[40, 0] += 1e-3  # a row of the mean: part of what keeps the statistics
    assert float((logits(model, ids) - logits(grown, ids)).abs().max()) > 1e-6


def test_dropout_breaks_equality_in_training_mode_and_the_plan_says_so():
    src, dst = phi_config(), phi_config(48, 6, resid_pdrop=0.1)
    assert phigrow.plan(src, dst, "lossless").notes == (
        "resid_pdrop 0.1 acts in training mode: equality holds in evaluation mode",
    )
    assert difference(src, dst, torch.float64)[0] <= 1e-10
    grown = phigrow.expand_model(phi_model(src), dst, method="lossless").train()
    torch.manual_seed(0)
    assert float((logits(phi_model(src), probe(61)) - logits(grown, probe(61))).abs().max()) > 1e-3


def test_new_width_is_trainable():
    """No new row of a reader gets the gradient of another, and new columns get one: no symmetry, no dead units."""
    src, dst = phi_config(32, 4, 48, 1, 4), phi_config(48, 6, 60, 2, 4)
    grown = phigrow.expand_model(phi_model(src), dst, method="lossless", dtype="float64").train()
    ids = probe(61)
    grown(ids, labels=ids).loss.backward()
    gradients = {name: parameter.grad for name, parameter in grown.named_parameters()}
    new_columns = gradients["model.layers.0.self_attn.dense.weight"][:, 32:]
    assert bool((new_columns.abs().sum(0) > 0).all())
    new_units = gradients["model.layers.0.mlp.fc2.weight"][:, 48:]
    assert bool((new_units.abs().sum(0) > 0).all())
    assert torch.linalg.matrix_rank(new_units) == new_units.shape[1]
    assert bool(gradients["model.layers.1.mlp.fc2.weight"].abs().sum() > 0)  # an inserted layer learns
