"""Next-token cross entropy that need not hold all logits, computed inside the model's own forward."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from phigrow.models.capacity import loss_path
from phigrow.training.documents import attention_inputs

CHUNK_LOGITS = 2**24
"""Logits that the fallback holds at once."""


def attach_loss(model: Any, mode: str = "auto", *, within: int | None = None) -> None:
    """Make ``model(blocks)`` return the mean cross entropy of int64 blocks ``[n, seq_len + 1]``, a float32 scalar.

    With ``by_row`` it returns that of every block, float32 ``[n]``. ``within`` is the end-of-text token where attention
    is kept within documents; None lets it reach over the whole block.

    ``lm_head`` still runs as a module, so ZeRO-3's hooks gather its weight where it is used, forward and backward;
    and the model is not wrapped, so parameters keep their names in checkpoints.
    """
    head = model.get_output_embeddings()
    varlen = getattr(model.config, "_attn_implementation", None) == "flash_attention_2"

    def head_loss(self: nn.Linear, hidden: Tensor, targets: Tensor, by_token: bool = False) -> Tensor:
        return token_loss(hidden, self.weight, self.bias, targets, mode, by_token=by_token)

    def forward(self: Any, blocks: Tensor, by_row: bool = False) -> Tensor:
        ids = blocks[:, :-1]
        given = {"input_ids": ids} if within is None else attention_inputs(ids, within, varlen=varlen)
        hidden = self.base_model(**given, use_cache=False).last_hidden_state
        loss: Tensor = head(hidden.flatten(0, 1), blocks[:, 1:].flatten(), by_row)
        return loss.view(len(blocks), -1).mean(dim=1) if by_row else loss

    head.forward = types.MethodType(head_loss, head)
    model.forward = types.MethodType(forward, model)


def token_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, mode: str = "auto", *, by_token: bool = False
) -> Tensor:
    """Return the mean cross entropy of ``hidden @ weight.T + bias``, reduced in float32 or wider.

    Args:
        hidden: ``[tokens, hidden]``.
        weight, bias: of the output layer, ``[vocab, hidden]`` and ``[vocab]``.
        targets: int64 ``[tokens]``.
        mode: ``full``, ``chunked``, or ``auto``: chunked above `phigrow.models.capacity.FULL_LOGITS`.
        by_token: return the cross entropy of every token, ``[tokens]``, instead of the mean.
    """
    if chosen_path(mode, len(targets), len(weight)) == "full logits":
        return F.cross_entropy(_wide(F.linear(hidden, weight, bias)), targets, reduction="none" if by_token else "mean")
    if hasattr(F, "linear_cross_entropy"):
        # reduction "mean" would round the loss to bf16, to 0.016 near 3; the mean of rounded tokens is 1e-5 away.
        losses = F.linear_cross_entropy(
            hidden,
            weight,
            targets,
            linear_bias=bias,
            reduction="none",
            options=nn.LinearCrossEntropyOptions(),
        )
        return _wide(losses) if by_token else _wide(losses).mean()
    return recomputed_loss(hidden, weight, bias, targets, by_token=by_token)


def chosen_path(mode: str, tokens: int, vocab: int) -> str:
    """Name the way `token_loss` computes: ``full logits``, or chunks by PyTorch's function or this module's."""
    if loss_path(mode, tokens, vocab) == "full":
        return "full logits"
    return "chunked linear_cross_entropy" if hasattr(F, "linear_cross_entropy") else "chunked, recomputed"


def recomputed_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, by_token: bool = False
) -> Tensor:
    """The chunked loss for PyTorch before 2.13: each chunk's logits are recomputed in the backward pass."""
    rows = max(1, CHUNK_LOGITS // len(weight))
    parts = [
        checkpoint(_chunk, part, weight, bias, wanted, by_token, use_reentrant=False)
        for part, wanted in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
    ]
    return torch.cat(parts) if by_token else torch.stack(parts).sum() / len(targets)


def _chunk(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, by_token: bool) -> Tensor:
    logits = _wide(F.linear(hidden, weight, bias))
    return F.cross_entropy(logits, targets, reduction="none" if by_token else "sum")


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
