"""Layer maps: which source layer every destination layer starts from, and which layers are identity layers.

| depth method | source of destination layer k of L', from L | function-preserving |
|---|---|---|
| interpose | min(L - 1, round(k L / L')); Gopher (2112.11446) and Phi, clamped because the formula overflows | no |
| stack | k mod L; G_stack (2405.15319) | no |
| identity | copies spread evenly, every inserted copy an identity layer | yes |
| solar | one half from the bottom of the source, one from its top; SOLAR (2312.15166) | no |
| llama-pro | groups of layers, each followed by an identity copy of its last; LLaMA-Pro (2401.02415) | yes |
| midas | the middle block once more; MIDAS (2409.19044) | no |
| random | copies spread evenly, every inserted layer of new random values; 2511.04981 | no |

In an identity layer every parameter that writes the residual stream is zero, weights and biases. The LayerNorm is
not: a zero there stops all gradients of the layer. LLaMA-Pro zeroes output projections alone, the identity only
without biases; here biases that write the stream are zero too. SOLAR leaves m layers off each of two copies, so it at
most doubles; MIDAS grows by one block at a time, so it at most doubles too, and was meant to be repeated in training.

`random` is for sources of one or a few layers that are grown late in the budget (zero/one-layer progressive training,
2511.04981). Its copies lie where `identity` has them, each before the new layers that follow it; the place of copies of
more than one layer is a choice made here. A new layer is as a model from scratch has it: matrices are
N(0, initializer_range), biases 0, LayerNorm weights 1. It is fresh in `phigrow.json` (so `--fresh-lr` reaches it), and
its Adam moments start at zero. Learned growth (`ligo`) refuses it, because every layer of `ligo` is a sum of source
layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from phigrow.errors import GrowthError
from phigrow.growth.method import NEW, LayerMap

ROUNDINGS: dict[str, Callable[[Fraction], int]] = {
    "half-even": round,
    "half-up": lambda x: math.floor(x + Fraction(1, 2)),
    "floor": math.floor,
}
"""Roundings of k L / L' in `interpose`. The published formula leaves this open; the first is the default."""


def _interpose(src: int, dst: int, rounding: str) -> LayerMap:
    rounded = ROUNDINGS[rounding]
    return tuple(min(src - 1, rounded(Fraction(k * src, dst))) for k in range(dst)), frozenset()


def _stack(src: int, dst: int, rounding: str) -> LayerMap:
    return tuple(k % src for k in range(dst)), frozenset()


def _identity(src: int, dst: int, rounding: str) -> LayerMap:
    layers = tuple(k * src // dst for k in range(dst))
    return layers, frozenset(k for k in range(1, dst) if layers[k] == layers[k - 1])


def _solar(src: int, dst: int, rounding: str) -> LayerMap:
    _at_most_twice("solar", src, dst)
    first = (dst + 1) // 2
    return (*range(first), *range(src - (dst - first), src)), frozenset()


def _llama_pro(src: int, dst: int, rounding: str) -> LayerMap:
    layers: list[int] = []
    inserted: set[int] = set()
    for layer in range(src):
        layers.append(layer)
        for _ in range((layer + 1) * (dst - src) // src - layer * (dst - src) // src):
            inserted.add(len(layers))
            layers.append(layer)
    return tuple(layers), frozenset(inserted)


def _midas(src: int, dst: int, rounding: str) -> LayerMap:
    _at_most_twice("midas", src, dst)
    start = (src - (dst - src)) // 2
    stop = start + dst - src
    return (*range(stop), *range(start, src)), frozenset()


def _random(src: int, dst: int, rounding: str) -> LayerMap:
    layers, inserted = _identity(src, dst, rounding)
    return tuple(NEW if k in inserted else layer for k, layer in enumerate(layers)), frozenset()


def _at_most_twice(method: str, src: int, dst: int) -> None:
    if dst > 2 * src:
        raise GrowthError(
            f"depth method {method} at most doubles the layers: {src} -> {dst}",
            where="num_hidden_layers",
            fix=f"set num_hidden_layers to at most {2 * src}, grow twice, or use --depth interpose or stack",
        )


DEPTHS: dict[str, Callable[[int, int, str], LayerMap]] = {
    "interpose": _interpose,
    "stack": _stack,
    "identity": _identity,
    "solar": _solar,
    "llama-pro": _llama_pro,
    "midas": _midas,
    "random": _random,
}


def layer_map(method: str, src: int, dst: int, rounding: str = "half-even") -> LayerMap:
    """Source layer of each of ``dst`` layers (`NEW` for a layer of new values), and the set of identity layers.

    Raises:
        GrowthError: an unknown method or rounding, or fewer layers than the source has.

    >>> layer_map("identity", 3, 5)
    ((0, 0, 1, 1, 2), frozenset({1, 3}))
    >>> layer_map("random", 1, 3)
    ((0, -1, -1), frozenset())
    """
    for what, value, known in (("depth method", method, DEPTHS), ("rounding", rounding, ROUNDINGS)):
        if value not in known:
            key = "depth" if known is DEPTHS else "rounding"
            raise GrowthError(f"{what} {value!r} is unknown", where=key, fix=f"choose one of {', '.join(known)}")
    if dst < src:
        raise GrowthError(
            f"the destination has fewer layers: {src} -> {dst}",
            where="num_hidden_layers",
            why="growth never drops layers",
            fix=f"set num_hidden_layers to at least {src}",
        )
    return DEPTHS[method](src, dst, rounding)
