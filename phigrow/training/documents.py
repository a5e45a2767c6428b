"""Attention kept within documents: positions that start again at each, and nothing seen across their borders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def document_positions(ids: Tensor, eos_token_id: int) -> Tensor:
    """Return each token's position in its document, int64 like ``ids``, ``[n, tokens]``.

    The end-of-text token is the first of the document that follows: in Phi it is the beginning-of-text token too. So
    the first word of a document is predicted from it alone, as in generation, and the end-of-text token itself from
    the document it ends. Every token keeps its loss.

    >>> document_positions(torch.tensor([[5, 6, 0, 7, 8, 0, 0, 9]]), 0).tolist()
    [[0, 1, 0, 1, 2, 0, 0, 1]]
    """
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    starts = torch.where(ids == eos_token_id, places, 0).cummax(dim=1).values
    return places - starts


def attention_inputs(ids: Tensor, eos_token_id: int, *, varlen: bool) -> dict[str, Any]:
    """Return what a transformers model takes to keep attention within documents.

    transformers builds the block-diagonal causal mask from positions that start again (``packed sequences``); SDPA
    then gets a mask, for which it has no flash kernel. flash-attn takes ``varlen``: all blocks as one row of documents
    with their cumulative lengths, for which its kernel never looks across a border.

    Args:
        ids: ``[n, tokens]``.
        eos_token_id: what separates documents.
        varlen: for flash-attn 2: one row, lengths instead of a mask.
    """
    positions = document_positions(ids, eos_token_id)
    if not varlen:
        return {"input_ids": ids, "position_ids": positions}
    flat = positions.flatten()  # every block starts at 0, so blocks are as separate as documents
    starts = (flat == 0).nonzero().flatten().to(torch.int32)
    lengths = torch.cat([starts, starts.new_tensor([len(flat)])])
    longest = int(lengths.diff().max())
    return {
        "input_ids": ids.reshape(1, -1),
        "position_ids": flat[None],
        "cu_seq_lens_q": lengths,
        "cu_seq_lens_k": lengths,
        "max_length_q": longest,
        "max_length_k": longest,
    }
