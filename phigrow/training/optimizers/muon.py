"""Muon (K. Jordan et al., 2024): orthogonalised momentum for matrices inside layers, and AdamW for the rest.

A matrix W of shape [rows, columns] with momentum M becomes ``W - lr * (sqrt(max(1, rows / columns)) * O + decay * W)``,
where O is M with its singular values brought near 1 by five Newton-Schulz iterations (0.7 to 1.2 for most of them; tiny
ones stay smaller). This is DeepSpeed's implementation. So the spectral norm of an update is ``lr``, whatever the size
of the gradients.

DeepSpeed orthogonalises inside its ZeRO optimizers, so Muon requires ZeRO. Its clipping applies to the orthogonalised
update, and would divide the learning rate by the norm of all updates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from phigrow.checkpoints.universal import ADAM_STATES
from phigrow.errors import GrowthError
from phigrow.training.optimizer_spec import Groups, OptimizerSpec, decay_matrices

if TYPE_CHECKING:
    from torch import nn

    from phigrow.training.configuration import RunConfig

MOMENTUM = {"momentum_buffer": 1}
_IN_LAYER = re.compile(r"\.\d+\.")


def _groups(model: nn.Module, config: RunConfig) -> Groups:
    """Split parameters in three groups: matrices inside layers for Muon, other matrices, and biases and norms.

    DeepSpeed also reads the attribute ``use_muon`` of each parameter.
    """
    from phigrow.training.zero import full_shape

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices, vectors = decay_matrices(model, config)
    hidden: list[Any] = []
    outer: list[Any] = []
    for parameter in matrices["params"]:
        use_muon = len(full_shape(parameter)) == 2 and _IN_LAYER.search(names[id(parameter)]) is not None
        (hidden if use_muon else outer).append(parameter)
        parameter.use_muon = use_muon
    for parameter in vectors["params"]:
        parameter.use_muon = False
    muon = {"params": hidden, "use_muon": True, "momentum": config.momentum, "weight_decay": config.weight_decay}
    adam = {"use_muon": False, "betas": (config.beta1, config.beta2), "eps": config.eps, "lr_multiple": config.adam_lr}
    return [muon, {**matrices, "params": outer, **adam}, {**vectors, **adam}]


def _build(groups: Groups, config: RunConfig, on_host: bool) -> Any:
    """Build DeepSpeed's optimizer, with PyTorch's AdamW for the parameters that Muon does not train."""
    import torch
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    fused = get_accelerator().device_name() in ("cpu", "cuda")
    groups = [{**group, "lr": 0.0} for group in groups if group["params"]]
    return MuonWithAuxAdam(groups, torch.optim.AdamW, {"fused": True if fused else None})


def _states_in(marks: Mapping[str, Any]) -> Mapping[str, int]:
    return MOMENTUM if marks.get("use_muon") else ADAM_STATES


def _check(config: RunConfig) -> None:
    """Refuse settings under which DeepSpeed's Muon would not orthogonalise, or would train in another way.

    Raises:
        GrowthError: the ZeRO stage, the data type, offload or clipping does not work with Muon.
    """
    if config.stage == 0:
        raise GrowthError(
            "Optimizer muon requires ZeRO stage 1, 2 or 3 (got 0).",
            where="zero",
            why="Without ZeRO, DeepSpeed's Muon steps even where gradients are not finite, and refuses bf16 gradients.",
            fix="Set zero: 1.",
        )
    if config.dtype == "fp16" or (config.dtype == "bf16" and config.stage == 2):
        raise GrowthError(
            f"Optimizer muon cannot be combined with dtype {config.dtype} at ZeRO stage {config.stage}.",
            where="dtype, zero",
            why="DeepSpeed then loses the gradients of some biases on two ranks."
            if config.dtype == "bf16"
            else "phigrow has not tested DeepSpeed's Muon with a loss scale.",
            fix="Set zero: 1 or zero: 3, or dtype: fp32." if config.dtype == "bf16" else "Set dtype: bf16 or fp32.",
        )
    if config.offload_optimizer is not None or config.deepspeed_file().get("zero_optimization", {}).get(
        "offload_optimizer"
    ):
        raise GrowthError(
            "Optimizer muon cannot be combined with offload_optimizer.",
            where="offload_optimizer",
            why="The matrix products of an update would run on the host.",
            fix="Remove offload_optimizer, or use optimizer: adamw.",
        )
    if config.grad_clip:
        raise GrowthError(
            f"Optimizer muon cannot be combined with grad_clip {config.grad_clip:g}.",
            where="grad_clip",
            why="DeepSpeed clips updates after it has orthogonalised them, which would change the learning rate. "
            "The size of gradients has no influence on Muon's updates.",
            fix="Remove grad_clip, or set it to 0.",
        )


OPTIMIZER = OptimizerSpec(
    "muon",
    "Muon for matrices inside layers, AdamW for the rest",
    {**MOMENTUM, **ADAM_STATES},
    _build,
    _groups,
    states_in=_states_in,
    check=_check,
    grad_clip=0.0,
    zero3={"reduce_scatter": False},
)
