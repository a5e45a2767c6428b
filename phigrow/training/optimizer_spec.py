"""`OptimizerSpec`: what the training loop, checkpoints and grown state must know of an optimizer."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phigrow.training.optimizers import check_optimizer

if TYPE_CHECKING:
    from torch import nn

    from phigrow.training.configuration import RunConfig

Groups = list[dict[str, Any]]


def decay_matrices(model: nn.Module, config: RunConfig) -> Groups:
    """Split parameters in two groups: matrices (embeddings and lm_head included) decay, biases and norms do not."""
    from phigrow.training.zero import full_shape

    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if len(full_shape(p)) >= 2]
    vectors = [p for p in parameters if len(full_shape(p)) < 2]
    return [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer, as a run builds it.

    Attributes:
        name: word of the setting ``optimizer``, the name of the file.
        summary: one line for people.
        states: names of its state tensors, each of the shape of its parameter, with the power of the gradient that it
            averages: 1 for a first moment, 2 for a second. Checkpoints are converted and grown by them.
        build: makes the optimizer from parameter groups, the settings and whether its state lies on the host.
            The learning rate must be 0: the schedule sets it.
        groups: splits a model's parameters into groups with options of their own.
    """

    name: str
    summary: str
    states: Mapping[str, int]
    build: Callable[[Groups, RunConfig, bool], Any]
    groups: Callable[[nn.Module, RunConfig], Groups] = decay_matrices


def find_optimizer(name: str) -> OptimizerSpec:
    """Return the optimizer of a name: ``OPTIMIZER`` of its file in `phigrow.training.optimizers`.

    Raises:
        GrowthError: there is none.

    >>> dict(find_optimizer("adamw").states)
    {'exp_avg': 1, 'exp_avg_sq': 2}
    """
    check_optimizer(name)
    spec: OptimizerSpec = importlib.import_module(f"phigrow.training.optimizers.{name}").OPTIMIZER
    return spec
