"""Move, check and scale weights as stored bits, without converting them to floats.

numpy has no bfloat16, so values travel as unsigned integers of the dtype's width, [rows, columns], and become floats
only where something is computed. Rounding is to the nearest, ties to even, as torch rounds.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Bits = npt.NDArray[np.unsignedinteger[Any]]
Values = npt.NDArray[np.floating[Any]]

STORED: dict[str, type[np.unsignedinteger[Any]]] = {
    "float64": np.uint64,
    "float32": np.uint32,
    "bfloat16": np.uint16,
    "float16": np.uint16,
}
"""dtype, as torch names it -> the unsigned integer of its width."""

_EXPONENT = {"float64": 0x7FF << 52, "float32": 0xFF << 23, "bfloat16": 0xFF << 7, "float16": 0x1F << 10}
LARGEST = {
    "float64": float(np.finfo(np.float64).max),
    "float32": float(np.finfo(np.float32).max),
    "bfloat16": 3.3895313892515355e38,
    "float16": 65504.0,
}
"""Largest finite value."""


def widen(bits: Bits, dtype: str, compute: type[np.floating[Any]]) -> Values:
    """Return stored values as float32 or float64, exactly, because ``compute`` is at least as wide."""
    with np.errstate(invalid="ignore"):
        if dtype == "bfloat16":
            return (bits.astype(np.uint32) << 16).view(np.float32).astype(compute, copy=False)
        return bits.view(np.dtype(dtype)).astype(compute, copy=False)


def narrow(values: Values, dtype: str) -> Bits:
    """Return values as stored bits. Values that are too large become infinite.

    >>> narrow(np.array([1.0, 3.0e-3], dtype=np.float32), "bfloat16").tolist()
    [16256, 15173]
    """
    with np.errstate(over="ignore", invalid="ignore"):  # infinities and NaN are the business of is_finite
        if dtype in ("float32", "float64"):
            return values.astype(np.dtype(dtype), copy=False).view(STORED[dtype])
        single = np.ascontiguousarray(values, dtype=np.float32)
        if dtype == "float16":
            return single.astype(np.float16).view(np.uint16)
    bits = single.view(np.uint32)
    rounded = (bits >> 16) & 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    out = rounded.astype(np.uint16)
    if (nan := np.isnan(single)).any():  # the carry would make a number of it
        out[nan] = 0x7FC0
    return out


def is_finite(bits: Bits, dtype: str) -> bool:
    """Return True if all values are finite.

    As integers, NaN and infinities come after all finite values of their sign, so two maxima suffice: that of signed
    integers for the positive values, that of unsigned ones for the negative.
    """
    sign = 1 << (8 * bits.itemsize - 1)
    infinity = _EXPONENT[dtype]
    if not bits.size:
        return True
    return int(bits.view(f"i{bits.itemsize}").max()) < infinity and int(bits.max()) < sign + infinity


def scaled(bits: Bits, dtype: str, gain: float | Values) -> Bits:
    """Multiply stored values by a gain, or one gain for each column, in float32 or wider, with one rounding."""
    if np.ndim(gain) == 0 and bits.itemsize == 2 and bits.size >= _TABLE_PAYS:
        return looked_up(_products(dtype, float(gain)), bits)
    compute = np.float64 if dtype == "float64" else np.float32
    with np.errstate(invalid="ignore", over="ignore"):
        return narrow(widen(bits, dtype, compute) * np.asarray(gain, dtype=compute), dtype)


def looked_up(table: np.ndarray, places: Bits, out: np.ndarray | None = None) -> np.ndarray:
    """Return ``table[places]`` for 16-bit places, several times as fast, without holding up other threads."""
    out = np.empty(places.shape, dtype=table.dtype) if out is None else out
    step = max(1, _IN_CACHE * len(places) // max(1, places.size))  # numpy widens the places to 8 bytes each
    for start in range(0, len(places), step):
        np.take(table, places[start : start + step], out=out[start : start + step], mode="wrap")
    return out


def as_bytes(bits: Bits) -> memoryview:
    """Return the memory of stored bits."""
    return memoryview(np.ascontiguousarray(bits).reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def bits_of(tensor: torch.Tensor) -> Bits:
    """Return the stored bits of a torch tensor, which share its memory if it is contiguous."""
    name = str(tensor.dtype).removeprefix("torch.")
    unsigned = np.dtype(STORED[name])
    import torch

    signed: npt.NDArray[Any] = tensor.detach().contiguous().view(getattr(torch, f"int{8 * unsigned.itemsize}")).numpy()
    return signed.view(unsigned)


def tensor_of(bits: Bits, dtype: str) -> torch.Tensor:
    """Return the torch tensor of stored bits, which shares their memory."""
    import torch

    signed = bits.view(np.dtype(f"int{8 * bits.itemsize}"))
    tensor: torch.Tensor = torch.from_numpy(signed).view(getattr(torch, dtype))
    return tensor


_TABLE_PAYS = 1 << 14
_IN_CACHE = 1 << 16


@lru_cache(maxsize=64)
def _products(dtype: str, gain: float) -> Bits:
    """Return the products of every 16-bit value and a gain; a look-up is faster than converting to floats and back."""
    with np.errstate(invalid="ignore", over="ignore"):
        return narrow(widen(np.arange(1 << 16, dtype=np.uint16), dtype, np.float32) * np.float32(gain), dtype)
