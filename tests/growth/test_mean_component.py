"""Estimates, from the source's moments, of the gradient that a mean-filled stream adds to old rows, and their accuracy.

With D' coordinates instead of D and c = sqrt(D'/D), old rows of a writer of the stream get ``(G + 1 r^T) / c``. Of a
bias, r is a sum over the normalisations that read the stream: ``k ((1 - D/D') mean(g B) - c/D' sum(w))``, with B the
gradient of the normalisation's bias, w those of its new biases (known: new columns times the readers' bias gradients),
and 1/k the deviation of the stream there. k follows by regression of the difference of two writers' bias gradients on
the centred g B. For a matrix, r is at best that of its bias times the mean of its input, which regression gives too.
"""

from __future__ import annotations

import numpy as np
from state_table import moments_of, sizes
from tiny_models import model_of, probe

import phigrow

READERS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"]


def errors(hidden):
    """fc2's bias and weight -> (without, with the estimate): norm of the error over that of the gradient, by layer."""
    src, dst = (sizes("phi", size, 4 * size) for size in (hidden, hidden * 5 // 4))
    plan, model = phigrow.plan(src, dst, "lossless"), model_of(src)
    large = phigrow.expand_model(model, dst, method="lossless")
    batches = list(probe(src["vocab_size"], rows=8, length=32).split(4))
    source, grown = (moments_of(plan, each, batches)["exp_avg"] for each in (model, large))
    weights, wide = ({n: p.detach().numpy() for n, p in each.named_parameters()} for each in (model, large))
    old, new, layers = hidden, dst["hidden_size"], src["num_hidden_layers"]
    gain, estimate = (new / old) ** 0.5, 0.0
    found = {"bias": [], "weight": []}
    for layer in reversed(range(layers)):
        last = layer + 1 == layers
        norm = "model.final_layernorm" if last else f"model.layers.{layer + 1}.input_layernorm"
        readers = ["lm_head"] if last else [f"model.layers.{layer + 1}.{name}" for name in READERS]
        behind = weights[f"{norm}.weight"] * source[f"{norm}.bias"]
        fresh = sum(wide[f"{r}.weight"][: len(source[f"{r}.bias"]), old:].T @ source[f"{r}.bias"] for r in readers)
        here = source[f"model.layers.{layer}.mlp.fc2.bias"]
        difference = here if last else here - source[f"model.layers.{layer + 1}.mlp.fc2.bias"]
        centred = behind - behind.mean()
        slope = centred @ difference / (centred @ centred)
        estimate = estimate + slope * ((1 - old / new) * behind.mean() - gain / new * fresh.sum())
        mean_input = source[f"model.layers.{layer}.mlp.fc2.weight"].T @ here / (here @ here)
        for part, guess in (("bias", estimate), ("weight", estimate * mean_input)):
            name = f"model.layers.{layer}.mlp.fc2.{part}"
            rows = tuple(slice(0, size) for size in source[name].shape)
            true = gain * grown[name][rows]
            added = (true - source[name]).mean(axis=0)
            assert np.abs(true - source[name] - added).max() < 1e-10  # it is one row, the same for all old rows
            size = np.linalg.norm(true)
            found[part].append([np.linalg.norm(r) * old**0.5 / size for r in (added, added - guess)])
    return {part: np.array(values).T for part, values in found.items()}


def test_an_estimate_of_the_mean_component_misses_much_of_it():
    """Factors by which the estimate multiplies the error: docs/stages.md names their ranges."""
    factors = {"bias": [], "weight": []}
    for hidden in (32, 64, 128):
        for part, (before, after) in errors(hidden).items():
            factors[part] += (after / before).tolist()
    assert [round(min(factors["bias"]), 1), round(max(factors["bias"]), 1)] == [0.1, 1.4]
    assert [round(min(factors["weight"]), 1), round(max(factors["weight"]), 1)] == [0.4, 1.0]
