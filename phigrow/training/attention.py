"""Causal attention over whole blocks, without a mask, for transformers' models.

By default transformers searches the positions of every batch for packed sequences, which reads from the device at every
forward pass. Under torch.compile it builds a mask instead, for which PyTorch's attention has no flash kernel. Blocks
have no padding, so phigrow registers attention functions under its own names, for which transformers makes no mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def without_mask(attention: str) -> str:
    """Register the variant of an attention that needs no mask, and return its name; ``eager`` has no such variant.

    >>> without_mask("sdpa"), without_mask("eager")
    ('phigrow_sdpa', 'eager')
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if attention not in _FUNCTIONS:
        return attention
    name = f"phigrow_{attention}"
    ALL_ATTENTION_FUNCTIONS.register(name, _FUNCTIONS[attention])
    return name


def _sdpa(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: None,
    dropout: float = 0.0,
    scaling: Any = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend with heads first, ``[n, heads, tokens, head_dim]``; the result has tokens first, as in transformers."""
    if by_products_is_faster(query, key, dropout):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attention_by_products(query, key, value, scale).transpose(1, 2).contiguous(), None
    out = F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None


def by_products_is_faster(query: Tensor, key: Tensor, dropout: float) -> bool:
    """Return true if plain matrix products are faster than PyTorch's attention: on CPUs in bf16 for short blocks.

    Measured for forward and backward of 4,096 tokens in 4 heads of 64, on two cores of an EPYC with torch 2.13:
    products took 8 ms in blocks of 256, 25 ms in 512 and 64 ms in 1,024; PyTorch's attention took 23, 54 and 48 ms.
    In fp32 the products were slower.
    """
    return (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and query.shape[2] <= 512
        and query.shape[:3] == key.shape[:3]
        and not dropout
    )


def attention_by_products(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Compute causal attention with plain matrix products.

    Args:
        query, key, value: ``[n, heads, tokens, head_dim]``, all with the same number of heads.
        scale: factor of the scores.

    Returns:
        ``[n, heads, tokens, head_dim]``.
    """
    n, heads, tokens, _ = query.shape
    query, key, value = (each.reshape(n * heads, tokens, -1) for each in (query, key, value))
    future = torch.full((tokens, tokens), float("-inf"), dtype=query.dtype).triu(1).expand(n * heads, -1, -1)
    scores = torch.baddbmm(future, query, key.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), value).view(n, heads, tokens, -1)


def _flash_attention_2(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: None,
    dropout: float = 0.0,
    scaling: Any = None,
    **_: Any,
) -> tuple[Tensor, None]:
    from flash_attn import flash_attn_func

    tokens_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return flash_attn_func(*tokens_first, dropout_p=dropout, softmax_scale=scaling, causal=True), None


_FUNCTIONS = {"sdpa": _sdpa, "flash_attention_2": _flash_attention_2}
