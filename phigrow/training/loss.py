"""Next-token cross entropy inside the model's own forward, with or without all logits in memory."""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from phigrow.models.capacity import loss_path
from phigrow.training.attention import reads_lengths
from phigrow.training.documents import attention_inputs

CHUNK_LOGITS = 2**24
"""Most logits that the chunked fallback holds at once."""


class TeacherOutput(NamedTuple):
    """A teacher's hidden states ``[tokens, hidden]``, and the weight and bias of its output layer.

    It has no logits, because a chunked loss never holds all of them.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def attach_loss(model: Any, mode: str = "auto", *, within: int | None = None) -> None:
    """Make ``model(blocks)`` return the mean cross entropy of int64 blocks ``[n, seq_len + 1]``, a float32 scalar.

    With ``by_row`` it returns the cross entropy of every block, float32 ``[n]``. With the output of a ``teacher`` it
    returns three scalars, see `distilled_loss`. ``within`` is the end-of-text token, and keeps attention inside
    documents; with None, attention reaches over the whole block.

    ``lm_head`` still runs as a module, so ZeRO-3's hooks gather its weight in forward and backward passes. The model is
    not wrapped, so parameters keep their names in checkpoints.
    """
    head = model.get_output_embeddings()

    def head_loss(
        self: nn.Linear,
        hidden: Tensor,
        targets: Tensor,
        by_token: bool = False,
        teacher: TeacherOutput | None = None,
        share: float = 0.0,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        if teacher is not None:
            return distilled_loss(hidden, self.weight, self.bias, targets, teacher, share, mode)
        return token_loss(hidden, self.weight, self.bias, targets, mode, by_token=by_token)

    def forward(
        self: Any, blocks: Tensor, by_row: bool = False, teacher: TeacherOutput | None = None, share: float = 0.0
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        hidden = hidden_states(self, blocks[:, :-1], within).flatten(0, 1)
        targets = blocks[:, 1:].flatten()
        if teacher is not None:
            distilled: tuple[Tensor, Tensor, Tensor] = head(hidden, targets, False, teacher, share)
            return distilled
        loss: Tensor = head(hidden, targets, by_row)
        return loss.view(len(blocks), -1).mean(dim=1) if by_row else loss

    head.forward = types.MethodType(head_loss, head)
    model.forward = types.MethodType(forward, model)


def hidden_states(model: Any, ids: Tensor, within: int | None = None) -> Tensor:
    """Return the last hidden states of a transformers model, ``[n, tokens, hidden]``.

    Args:
        model: a transformers model, with or without the training loss.
        ids: ``[n, tokens]``.
        within: as in `attach_loss`.
    """
    given = {"input_ids": ids} if within is None else attention_inputs(ids, within, varlen=reads_lengths(model))
    hidden: Tensor = model.base_model(**given, use_cache=False).last_hidden_state
    return hidden


def distilled_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    teacher: TeacherOutput,
    share: float,
    mode: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of a distilled step, and its two parts without gradients, in float32 or wider.

    The loss is ``(1 - share) CE + share KL``: the mean cross entropy of the targets, and the mean divergence
    ``KL(teacher || model)`` of the next-token distributions at temperature 1, both in nats per token.

    Args:
        hidden, weight, bias, targets, mode: as in `token_loss`.
        teacher: the teacher's output for the same tokens, with the same vocabulary.
        share: weight of the divergence, from 0 to 1.
    """
    if loss_path(mode, len(targets), len(weight)) == "full":
        sums = _distilled_chunk(hidden, weight, bias, targets, *teacher)
    else:
        rows = max(1, CHUNK_LOGITS // len(weight))
        parts = [
            checkpoint(_distilled_chunk, part, weight, bias, wanted, taught, *teacher[1:], use_reentrant=False)
            for part, wanted, taught in zip(*(torch.split(x, rows) for x in (hidden, targets, teacher[0])), strict=True)
        ]
        sums = torch.stack(parts).sum(dim=0)
    entropy, divergence = sums / len(targets)
    return (1 - share) * entropy + share * divergence, entropy.detach(), divergence.detach()


def _distilled_chunk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    taught: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
) -> Tensor:
    """Return the sum of cross entropies and the sum of divergences, as a tensor [2]."""
    own = _wide(F.linear(hidden, weight, bias)).log_softmax(dim=-1)
    with torch.no_grad():
        wanted = _wide(F.linear(taught, teacher_weight, teacher_bias)).log_softmax(dim=-1)
    entropy = F.nll_loss(own, targets, reduction="sum")
    return torch.stack([entropy, F.kl_div(own, wanted, reduction="sum", log_target=True)])


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
        # reduction "mean" would round the loss to bf16, by up to 0.016 near 3. The mean of rounded losses of tokens
        # differs from the exact mean by 1e-5.
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
    """Name the implementation that `token_loss` chooses: full logits, PyTorch's chunks, or chunks of this module."""
    if loss_path(mode, tokens, vocab) == "full":
        return "full logits"
    return "chunked linear_cross_entropy" if hasattr(F, "linear_cross_entropy") else "chunked, recomputed"


def recomputed_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, by_token: bool = False
) -> Tensor:
    """Return the chunked loss for PyTorch before 2.13; the logits of a chunk are recomputed in the backward pass."""
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
