"""`OptimizerSpec`: the description of an optimizer for the training loop, checkpoints and grown state."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from phigrow.training.optimizers import check_optimizer

if TYPE_CHECKING:
    from torch import nn

    from phigrow.training.configuration import RunConfig

Groups = list[dict[str, Any]]


def decay_matrices(model: nn.Module, config: RunConfig) -> Groups:
    """Split parameters in two groups: matrices (embeddings and lm_head included) decay, biases and norms do not.

    With ``lr_base_width`` there are three groups, see `phigrow.training.width_aware_lr`.
    """
    from phigrow.training.width_aware_lr import width_aware_groups
    from phigrow.training.zero import full_shape

    if config.lr_base_width is not None:
        return width_aware_groups(model, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if len(full_shape(p)) >= 2]
    vectors = [p for p in parameters if len(full_shape(p)) < 2]
    return [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer, as a run builds it.

    Attributes:
        name: value of the setting ``optimizer``, which is the name of the optimizer's file.
        summary: description in one line.
        states: names of its state tensors, each of the shape of its parameter, with the power of the gradient that it
            averages: 1 for a first moment, 2 for a second. Checkpoints are converted and grown by them.
        build: makes the optimizer from parameter groups, the settings, and true if its state is on the host.
            It must set the learning rate to 0; the schedule sets it later.
        groups: splits a model's parameters into groups with options of their own.
        states_in: names the states that a parameter has, from the options of its group or from its attributes.
        check: refuses settings that the optimizer cannot work with.
        grad_clip: default of the setting ``grad_clip``.
        zero3: values that DeepSpeed's ``zero_optimization`` must have at stage 3.
    """

    name: str
    summary: str
    states: Mapping[str, int]
    build: Callable[[Groups, RunConfig, bool], Any]
    groups: Callable[[nn.Module, RunConfig], Groups] = decay_matrices
    states_in: Callable[[Mapping[str, Any]], Mapping[str, int]] | None = None
    check: Callable[[RunConfig], None] | None = None
    grad_clip: float = 1.0
    zero3: Mapping[str, Any] = field(default_factory=dict)

    def states_of(self, marks: Mapping[str, Any]) -> Mapping[str, int]:
        """Return the states that a parameter has; ``marks`` are the options of its group, or its attributes."""
        return self.states if self.states_in is None else self.states_in(marks)


def find_optimizer(name: str) -> OptimizerSpec:
    """Return the optimizer of a name: ``OPTIMIZER`` of its file in `phigrow.training.optimizers`.

    Raises:
        GrowthError: there is no optimizer of this name.

    >>> dict(find_optimizer("adamw").states)
    {'exp_avg': 1, 'exp_avg_sq': 2}
    """
    check_optimizer(name)
    spec: OptimizerSpec = importlib.import_module(f"phigrow.training.optimizers.{name}").OPTIMIZER
    return spec
