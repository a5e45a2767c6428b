"""Stored bits against torch, which converts and multiplies the same values its own way."""

import numpy as np
import pytest
import torch

from phigrow.checkpoints.bits import LARGEST, STORED, bits_of, is_finite, narrow, scaled, tensor_of, widen

DTYPES = tuple(STORED)
EDGES = [0.0, -0.0, 1.0, -1.0, 1e-45, 1e-41, 1e-8, 6e-8, 65504.0, 65519.0, 65520.0, 3.389e38, 3.4e38, float("inf")]
EDGES += [-value for value in EDGES] + [float("nan"), 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-23, 1 + 2**-11]


def every(dtype: str) -> torch.Tensor:
    """All bit patterns of a 16-bit dtype; of a wider one, edges and random patterns."""
    if STORED[dtype] is np.uint16:
        return tensor_of(np.arange(1 << 16, dtype=np.uint16), dtype)
    random = np.random.default_rng(0).integers(0, 2 ** (8 * np.dtype(STORED[dtype]).itemsize), 1 << 16, STORED[dtype])
    return torch.cat([tensor_of(random, dtype), torch.tensor(EDGES, dtype=getattr(torch, dtype))])


def equal(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Same values, signs of zeros included; any NaN is any other."""
    same = (ours == theirs) & (torch.signbit(ours) == torch.signbit(theirs)) | (ours.isnan() & theirs.isnan())
    return ours.dtype == theirs.dtype and bool(same.all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_survives_widening_and_narrowing(dtype):
    values = every(dtype)
    bits = bits_of(values)
    for compute in (np.float32, np.float64):
        if compute is np.float32 and dtype == "float64":
            continue
        wide = widen(bits, dtype, compute)
        assert wide.dtype == compute
        np.testing.assert_array_equal(wide, values.to(torch.float64).numpy().astype(compute))
        assert equal(tensor_of(narrow(wide, dtype), dtype), values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_narrowing_rounds_as_torch_does(dtype, compute):
    values = every(compute)
    near = (torch.randn(1 << 16, dtype=torch.float64) * 0.02).to(values.dtype)
    for each in (values, near):
        ours = tensor_of(narrow(each.numpy(), dtype), dtype)
        assert equal(ours, each.to(getattr(torch, dtype)))
    # Negative control: cutting the low bits off is not rounding.
    if dtype == "bfloat16":
        cut = (near.float().numpy().view(np.uint32) >> 16).astype(np.uint16)
        assert not equal(tensor_of(cut, dtype), near.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gain", [1.118033988749895, 0.5, 1e-3, 3e4])
def test_scaling_is_one_rounding_of_the_product(dtype, gain):
    values = every(dtype)
    compute = torch.float64 if dtype == "float64" else torch.float32
    expected = (values.to(compute) * torch.tensor(gain, dtype=compute)).to(values.dtype)
    few, many = bits_of(values[:100]), bits_of(values)  # computed, and looked up where there are 16 bits
    assert equal(tensor_of(scaled(few, dtype, gain), dtype), expected[:100])
    assert equal(tensor_of(scaled(many, dtype, gain), dtype), expected)
    columns = np.array([gain, 1.0, 0.25])
    table = many[:300].reshape(100, 3)
    by_column = scaled(table, dtype, columns)
    for k in range(3):
        np.testing.assert_array_equal(by_column[:, k], scaled(np.ascontiguousarray(table[:, k]), dtype, columns[k]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_finiteness_is_seen_in_the_exponent(dtype):
    kind = getattr(torch, dtype)
    fine = torch.tensor([LARGEST[dtype], -LARGEST[dtype], 0.0, 1e-7], dtype=kind)
    assert fine.isfinite().all()
    assert torch.finfo(kind).max == LARGEST[dtype]
    assert is_finite(bits_of(fine), dtype)
    assert is_finite(bits_of(fine[:0]), dtype)
    for bad in (float("inf"), float("-inf"), float("nan"), -float("nan")):
        assert not is_finite(bits_of(torch.cat([fine, torch.tensor([bad], dtype=kind)])), dtype)
