"""Causal attention over whole blocks or over documents, without a mask, for transformers' models.

By default transformers searches the positions of every batch for packed sequences, which reads from the device at every
forward pass. Under torch.compile it builds a mask instead, for which PyTorch's attention has no flash kernel. Blocks
have no padding, so phigrow registers attention functions under its own names, for which transformers makes no mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MASKED = ("sdpa", "eager")
"""Attention that can keep inside documents by a mask, which transformers makes."""


def registered_name(attention: str, *, within: bool) -> str:
    """Register an attention function with transformers, and return its name there.

    The name must not contain "flash": transformers takes every such name for a kernel that it should load.

    Args:
        attention: ``sdpa``, ``flash_attention_2``, ``varlen`` or ``eager``.
        within: attention stays inside documents. ``sdpa`` then requires transformers' own mask.

    >>> registered_name("sdpa", within=False), registered_name("sdpa", within=True)
    ('phigrow_sdpa', 'sdpa')
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if attention == "eager" or (attention in MASKED and within):
        return attention
    ALL_ATTENTION_FUNCTIONS.register(_NAMES[attention], FUNCTIONS[attention])
    return _NAMES[attention]


def reads_lengths(model: Any) -> bool:
    """Return true if a transformers model's attention keeps inside documents by their lengths, not by a mask."""
    return getattr(model.config, "_attn_implementation", None) in (_NAMES["flash_attention_2"], _NAMES["varlen"])


def sdpa(
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


def flash_attention_2(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: None,
    dropout: float = 0.0,
    scaling: Any = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend by flash-attn 2.4.1 or later, shapes as in `sdpa`; with ``cu_seq_lens_q`` inside documents of one row."""
    tokens_first = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    options: dict[str, Any] = {"dropout_p": dropout, "softmax_scale": scaling, "causal": True}
    options["deterministic"] = torch.are_deterministic_algorithms_enabled()  # of the backward pass
    if cu_seq_lens_q is None:
        from flash_attn import flash_attn_func

        return flash_attn_func(*tokens_first, **options), None
    from flash_attn import flash_attn_varlen_func

    out = flash_attn_varlen_func(
        *(tensor[0] for tensor in tokens_first),
        cu_seqlens_q=cu_seq_lens_q,
        cu_seqlens_k=cu_seq_lens_q,
        max_seqlen_q=max_length_q,
        max_seqlen_k=max_length_q,
        **options,
    )
    return out[None], None


def varlen(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: None,
    dropout: float = 0.0,
    scaling: Any = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend inside the documents of one row by PyTorch's own kernel, shapes as in `sdpa`; it has no dropout."""
    from torch.nn.attention.varlen import varlen_attn

    assert cu_seq_lens_q is not None, "`varlen` is chosen for documents: within only"
    assert not dropout, "`varlen` is not chosen for models with dropout"
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    attend: Any = varlen_attn  # its annotations name a tuple that it returns on request only
    out: Tensor = attend(
        queries,
        keys,
        values,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(-1, 0),  # all tokens before, none after
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return out[None], None


FUNCTIONS = {"sdpa": sdpa, "flash_attention_2": flash_attention_2, "varlen": varlen}
_NAMES = {"sdpa": "phigrow_sdpa", "flash_attention_2": "phigrow_fa2", "varlen": "phigrow_varlen"}
