"""Attention within documents: positions restart at every document, and no token attends across a border."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

FEWEST_DOCUMENTS = 31
"""Documents of a batch up to which the number of lengths is the same."""


def document_positions(ids: Tensor, eos_token_id: int) -> Tensor:
    """Return each token's position in its document, int64 like ``ids``, ``[n, tokens]``.

    The end-of-text token counts as the first token of the next document, because in Phi it also begins texts. So the
    first word of a document is predicted from this token alone, as in generation. The end-of-text token itself is
    predicted from the document before it. Every token keeps its loss.

    >>> document_positions(torch.tensor([[5, 6, 0, 7, 8, 0, 0, 9]]), 0).tolist()
    [[0, 1, 0, 1, 2, 0, 0, 1]]
    """
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    starts = torch.where(ids == eos_token_id, places, 0).cummax(dim=1).values
    return places - starts


def attention_inputs(ids: Tensor, eos_token_id: int, *, varlen: bool) -> dict[str, Any]:
    """Return the arguments that make a transformers model keep attention within documents.

    transformers builds the block-diagonal causal mask from positions that restart (packed sequences). SDPA has no flash
    kernel for masks. flash-attn reads all blocks as one row of documents with their cumulative lengths (``varlen``).

    The number of lengths is rounded up to a power of two by empty documents at the end, and the longest document counts
    as a whole block. So compiled layers meet a few shapes, and not another one in every batch.

    Args:
        ids: ``[n, tokens]``.
        eos_token_id: the token that separates documents.
        varlen: return one row and lengths, for flash-attn 2, instead of positions for a mask.
    """
    positions = document_positions(ids, eos_token_id)
    if not varlen:
        return {"input_ids": ids, "position_ids": positions}
    flat = positions.flatten()  # every block starts at 0, so blocks are as separate as documents
    starts = (flat == 0).nonzero().flatten().to(torch.int32)
    entries = 1 << max(len(starts), FEWEST_DOCUMENTS).bit_length()
    lengths = F.pad(starts, (0, entries - len(starts)), value=len(flat))
    longest = ids.shape[1]
    return {
        "input_ids": ids.reshape(1, -1),
        "position_ids": flat[None],
        "cu_seq_lens_q": lengths,
        "cu_seq_lens_k": lengths,
        "max_length_q": longest,
        "max_length_k": longest,
    }
