"""Parameters and floating-point operations of a model, counted from its configuration and its family's table."""

from __future__ import annotations

import math
from dataclasses import dataclass

from phigrow.models.config import Config, context_of
from phigrow.models.families import family_of


@dataclass(frozen=True)
class ModelCost:
    """Size and arithmetic of a model. FLOPs are per token; a multiply-add counts as two.

    Attributes:
        parameters: of the whole model.
        non_embedding_parameters: those without a vocabulary axis.
        forward_flops: of the forward pass.
        training_flops: of forward and backward pass.
    """

    parameters: int
    non_embedding_parameters: int
    forward_flops: float
    training_flops: float


def count_cost(config: Config, seq_len: int | None = None) -> ModelCost:
    """Count parameters and FLOPs per token at a context of ``seq_len`` tokens.

    Forward, per token: ``2 * (weights of all linear layers, lm_head included)`` plus attention's two products with
    the whole context, ``2 * 2 * layers * heads * head_dim * seq_len`` (not halved for causality, as in PaLM,
    appendix B, and as ``torch.utils.flop_counter`` counts). The embedding look-up, biases, normalisations, softmax and
    activations are left out. Training is three times forward: the backward pass makes two products for each one.

    Args:
        config: a Hugging Face configuration, as a dictionary.
        seq_len: tokens in context; by default ``max_position_embeddings``.

    Returns:
        The cost of the model.

    Raises:
        GrowthError: phigrow has no table for the model type, or the sizes are impossible.

    >>> from phigrow.models.config import load_config
    >>> count_cost(load_config("phi2.json")).parameters
    2779683840
    """
    family = family_of(config, "a configuration")
    sizes = family.sizes_of(config)
    seq_len = seq_len or context_of(config)
    layers, heads = sizes["layer"], math.prod(sizes[axis] for axis in family.heads)
    parameters = embedding = forward = 0
    for parameter in family.parameters:
        size = math.prod(parameter.shape(sizes)) * (layers if parameter.in_layer else 1)
        is_embedding = (family.vocab,) in parameter.axes and len(parameter.axes) == 2
        if parameter.present(config):
            parameters += size
            embedding += size if (family.vocab,) in parameter.axes else 0
        # A tied head has no parameters of its own, but its matrix product is computed.
        if parameter.kind == "matrix" and not (is_embedding and parameter.written != (family.vocab,)):
            forward += 2 * size
    forward += 2 * layers * heads * (sizes[family.query] + sizes[family.value]) * seq_len
    return ModelCost(
        parameters=parameters,
        non_embedding_parameters=parameters - embedding,
        forward_flops=float(forward),
        training_flops=3.0 * forward,
    )
