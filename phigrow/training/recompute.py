"""Recomputation of activations in the backward pass: whole layers, or only the operations that take little time."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from phigrow.models.capacity import SELECTIVE

ATTENTION = ("_scaled_dot_product_", "_flash_attn_forward", "_flash_attn_varlen_forward", "_varlen_attn")
"""Parts of the names of operations that compute attention as one kernel: PyTorch's, and those of flash-attn."""


def recompute_layers(model: Any, setting: bool | str, *, partitioned: bool) -> None:
    """Let a transformers model recompute activations, as the setting ``activation_checkpointing`` asks.

    Args:
        model: a transformers model.
        setting: true, false or ``selective``.
        partitioned: the run is at ZeRO 3.
    """
    if setting == SELECTIVE:
        recompute_cheap_operations(model)
    elif setting:
        enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        # Under ZeRO-3 only the reentrant kind works: the other compares shapes of weights after they were released.
        enable({"use_reentrant": partitioned})


def recompute_cheap_operations(model: Any) -> None:
    """Keep of each layer its input, the products with its weights and attention's output; recompute the rest.

    The rest are normalisations, rotary embeddings, activations, and attention that runs as several operations. They
    take memory for every token and little time. The product with the last matrix of the mlp is not kept either, and
    not computed again, because nothing in the backward pass reads it.
    """
    config = model.config
    # Attention with dropout draws random numbers. If its output were kept, later dropout would repeat other draws.
    keeps_attention = not float(getattr(config, "attention_dropout", 0.0) or 0.0)
    policy = functools.partial(_policy, (config.intermediate_size, config.hidden_size), keeps_attention)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    # Under torch.compile every rank would warn of operations in place. Layers of transformers' models have none.
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_is_no_warning)
    for layer in model.base_model.layers:
        _checkpoint(layer, contexts)


def _is_no_warning(record: logging.LogRecord) -> bool:
    return "context_fn is passed" not in record.getMessage()


def _checkpoint(layer: nn.Module, contexts: Any) -> None:
    plain: Any = layer.forward

    def forward(*given: Any, **more: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return plain(*given, **more)
        return checkpoint(plain, *given, use_reentrant=False, context_fn=contexts, **more)

    layer.forward = forward


def _policy(
    last: tuple[int, int], keeps_attention: bool, context: Any, operation: Any, *given: Any, **more: Any
) -> CheckpointPolicy:
    """Decide on the output of an operation; ``last`` is the shape of the mlp's last matrix, input axis first."""
    if operation == torch.ops.aten.addmm.default:
        kept = tuple(given[2].shape) != last
    elif operation == torch.ops.aten.mm.default:
        kept = tuple(given[1].shape) != last
    else:
        kept = keeps_attention and _is_attention(operation)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def _is_attention(operation: Any) -> bool:
    return any(name in str(operation) for name in ATTENTION)
