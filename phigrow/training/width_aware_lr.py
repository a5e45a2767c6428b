"""Learning rates that follow the width of the model, as in muP (arXiv:2203.03466). Off by default.

With AdamW every value of a matrix moves by about the learning rate in a step, and the moves of one row add up over its
inputs. So the output of a matrix moves more the wider the model is, and the best rate of a narrow model is too large
for a wide one. With ``lr_base_width`` the matrices inside layers and ``lm_head`` learn at ``lr`` times the base width
over the width; embeddings, biases and norms learn at ``lr``. Their weight decay becomes that much larger, so that a
step decays all matrices alike, as in the authors' code.

This is muP's table for Adam without multipliers in the forward pass, so that exported models stay ordinary ones.
Initial values and the scale of attention stay as they are. Growth in muP (arXiv:2602.10545) takes these rates, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phigrow.errors import GrowthError

if TYPE_CHECKING:
    from torch import nn

    from phigrow.training.configuration import RunConfig


def width_aware_groups(model: Any, config: RunConfig) -> list[dict[str, Any]]:
    """Split parameters in three groups: embeddings, matrices that follow the width, and vectors.

    The first group learns at ``lr``, so the rate in the records is ``lr``. ``lr_multiple`` of a group multiplies it.

    Raises:
        GrowthError: the embedding and the head are one matrix, for which muP has two rates.
    """
    from torch import nn

    from phigrow.training.zero import full_shape

    assert config.lr_base_width is not None
    if model.config.tie_word_embeddings:
        raise GrowthError(
            "lr_base_width is set, but the model has tied embeddings",
            where="lr_base_width",
            why="the embedding learns at lr and lm_head at another rate, and here they are one matrix",
            fix="remove lr_base_width, or set tie_word_embeddings: false in the model",
        )
    multiple = config.lr_base_width / model.config.hidden_size
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    embeddings: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if len(full_shape(parameter)) < 2:
            vectors.append(parameter)
        else:
            (embeddings if id(parameter) in embedded else matrices).append(parameter)
    decay = config.weight_decay
    return [
        {"params": embeddings, "weight_decay": decay},
        {"params": matrices, "weight_decay": decay / multiple, "lr_multiple": multiple},
        {"params": vectors, "weight_decay": 0.0},
    ]
