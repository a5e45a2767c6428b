"""The forward pass of the families in numpy: logits without torch and transformers, whose imports take seconds.

Each family file puts its layers together from these functions and names the result in `Family.forward`. A test holds it
against transformers' model of the family. Arrays are float32 or float64, [rows, length, ...]; as in transformers,
rotary tables are computed in float32 in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from phigrow.models.rotary import Turn

Values = npt.NDArray[np.floating[Any]]
Weights = Mapping[str, Values]
Ids = npt.NDArray[np.integer[Any]]


def _gelu(x: Values) -> Values:
    from scipy.special import erf

    return 0.5 * x * (1 + erf(x / np.sqrt(2).astype(x.dtype)))  # type: ignore[no-any-return]


def _gelu_new(x: Values) -> Values:
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x * x * x)))  # type: ignore[no-any-return]


def _silu(x: Values) -> Values:
    return x / (1 + np.exp(-x))  # type: ignore[no-any-return]


def _relu(x: Values) -> Values:
    return np.maximum(x, 0)


ACTIVATIONS: dict[str, Callable[[Values], Values]] = {
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_new": _gelu_new,
    "gelu_pytorch_tanh": _gelu_new,
    "gelu_python_tanh": _gelu_new,
    "gelu_accurate": _gelu_new,
    "relu": _relu,
    "silu": _silu,
    "swish": _silu,
}
"""``hidden_act`` -> function, the same one for every alias; a configuration with another one runs in transformers."""

MOST_SCORES = 1 << 25
"""Most attention scores in memory at once (256 MB in float64); longer sequences attend block by block."""


def linear(x: Values, weights: Weights, name: str) -> Values:
    """Multiply [..., inputs] by ``NAME.weight`` [outputs, inputs], and add ``NAME.bias`` where there is one."""
    out: Values = x @ weights[f"{name}.weight"].T
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def layer_norm(x: Values, weights: Weights, name: str, eps: float) -> Values:
    """Apply a LayerNorm over the last axis."""
    centred = x - x.mean(axis=-1, keepdims=True)
    normed = centred / np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + eps)
    return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]  # type: ignore[no-any-return]


def rms_norm(x: Values, weights: Weights, name: str, eps: float) -> Values:
    """Apply an RMSNorm over the last axis, in the dtype of ``x``."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weights[f"{name}.weight"]  # type: ignore[no-any-return]


def split_heads(x: Values, size: int) -> Values:
    """Return [rows, length, heads * size] as [rows, heads, length, size]."""
    return x.reshape(*x.shape[:2], -1, size).swapaxes(1, 2)


def rotate(x: Values, turn: Turn) -> Values:
    """Turn the first coordinates of [rows, heads, length, size] by their positions (RoPE)."""
    half = len(turn.inverse)
    angles = np.arange(x.shape[2], dtype=np.float32)[:, None] * turn.inverse
    scaling = np.float32(turn.scaling)
    cos, sin = (np.cos(angles) * scaling).astype(x.dtype), (np.sin(angles) * scaling).astype(x.dtype)
    first, second = x[..., :half], x[..., half : 2 * half]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :]], axis=-1)


def attention(q: Values, k: Values, v: Values) -> Values:
    """Attend causally.

    Args:
        q: [rows, heads, length, size]; each key/value head serves as many query heads, one after the other.
        k, v: [rows, key/value heads, length, size].

    Returns:
        [rows, length, heads * size].
    """
    rows, heads, length, size = q.shape
    grouped = q.reshape(rows, k.shape[1], -1, length, size)
    mixed = np.empty((*grouped.shape[:-1], v.shape[-1]), dtype=q.dtype)
    step = max(1, MOST_SCORES // (rows * heads * length))
    for start in range(0, length, step):
        stop = min(start + step, length)
        scores = grouped[..., start:stop, :] @ k[:, :, None, :stop].swapaxes(-1, -2) * size**-0.5
        scores = np.where(np.tri(stop - start, stop, start, dtype=bool), scores, -np.inf)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed[..., start:stop, :] = scores @ v[:, :, None, :stop]
    return mixed.reshape(rows, heads, length, -1).swapaxes(1, 2).reshape(rows, length, -1)


def gated_forward(config: Mapping[str, Any], head: int, turn: Turn, weights: Weights, ids: Ids, last: int) -> Values:
    """Return the logits of a Llama or a Qwen2, which differ by their biases alone.

    Args:
        config: the configuration, with one spelling and every function key set.
        head: coordinates of a head, all of which turn.
        turn: the rotary embedding.
        last: number of positions whose logits are computed.
    """
    act, eps = ACTIVATIONS[config["hidden_act"]], config["rms_norm_eps"]
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        normed = rms_norm(x, weights, f"{at}.input_layernorm", eps)
        q, k, v = (split_heads(linear(normed, weights, f"{at}.self_attn.{name}_proj"), head) for name in "qkv")
        mixed = attention(rotate(q, turn), rotate(k, turn), v)
        x = x + linear(mixed, weights, f"{at}.self_attn.o_proj")
        normed = rms_norm(x, weights, f"{at}.post_attention_layernorm", eps)
        gated = act(linear(normed, weights, f"{at}.mlp.gate_proj")) * linear(normed, weights, f"{at}.mlp.up_proj")
        x = x + linear(gated, weights, f"{at}.mlp.down_proj")
    x = rms_norm(x[:, -last:], weights, "model.norm", eps)
    return linear(x, weights, "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head")
