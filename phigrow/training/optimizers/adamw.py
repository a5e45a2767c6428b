"""AdamW (I. Loshchilov, F. Hutter, 2019, arXiv:1711.05101): Adam with decoupled weight decay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phigrow.checkpoints.universal import ADAM_STATES
from phigrow.training.deepspeed_cleanup import free_compile_lock
from phigrow.training.optimizer_spec import Groups, OptimizerSpec

if TYPE_CHECKING:
    from phigrow.training.configuration import RunConfig


def _build(groups: Groups, config: RunConfig, on_host: bool) -> Any:
    """Build PyTorch's AdamW, fused on CPUs and CUDA; for state on the host DeepSpeed's, which compiles at first use."""
    betas = (config.beta1, config.beta2)
    if on_host:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        free_compile_lock("cpu_adam")
        return DeepSpeedCPUAdam(groups, lr=0.0, betas=betas, eps=config.eps, weight_decay=0.0, adamw_mode=True)
    import torch
    from deepspeed.accelerator import get_accelerator

    fused = get_accelerator().device_name() in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.eps, fused=True if fused else None)


OPTIMIZER = OptimizerSpec("adamw", "AdamW, fp32 moments", ADAM_STATES, _build)
