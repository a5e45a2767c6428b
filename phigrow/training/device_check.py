"""Check what a run needs of its devices before any data is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from phigrow.errors import GrowthError
from phigrow.models.capacity import GIB, ZeroLayout, model_states, muon_parameters
from phigrow.models.config import Config, load_config
from phigrow.models.cost import count_cost
from phigrow.training.configuration import DEMO_MODEL, RunConfig
from phigrow.training.settings import DEMO, SCRATCH

if TYPE_CHECKING:
    from phigrow.training.process import World


def check_device(config: RunConfig, world: World) -> None:
    """Refuse a run for which its devices lack the attention that it asks for, NCCL, or memory.

    Raises:
        GrowthError: flash-attn does not work here, several GPUs cannot communicate, or the weights, gradients and
            optimizer state are larger than the memory of a GPU.
    """
    import torch

    from phigrow.training.attention_choice import check_flash_attention

    if config.attention == "flash_attention_2":
        check_flash_attention(config.dtype, world.device)
    if world.device.type != "cuda":
        return
    if world.size > 1 and not torch.distributed.is_nccl_available():
        raise GrowthError(
            f"{world.size} GPUs cannot communicate",
            where="torch.distributed",
            why="this build of PyTorch has no NCCL",
            fix="install PyTorch from pytorch.org for your version of CUDA, or train on one GPU",
        )
    model = _model_before_data(config)
    if model is not None:
        memory = torch.cuda.get_device_properties(world.device).total_memory
        check_memory(config, model, world.size, memory)


def check_memory(config: RunConfig, model: Config, ranks: int, memory: int) -> None:
    """Refuse a run whose model states alone exceed the memory of a GPU; activations need more.

    Args:
        config: the run.
        model: the configuration of the model.
        ranks: number of GPUs.
        memory: bytes of a GPU.

    Raises:
        GrowthError: they do.
    """
    from phigrow.training.offload import optimizer_device

    offloaded = optimizer_device(config) != "device"
    layout = ZeroLayout(config.stage, offload_optimizer=offloaded, offload_param=config.offload_param is not None)
    parameters = count_cost(model).parameters
    muon = muon_parameters(model) if config.optimizer == "muon" else 0
    dtype = "fp32" if config.dtype == "fp32" else "bf16"
    states = model_states(parameters, ranks, layout, dtype=dtype, muon=muon)
    if states.held > memory:
        raise GrowthError(
            f"{parameters / 1e9:.2f}B parameters do not fit into the memory of a GPU",
            where=f"zero {config.stage}, {ranks} {'GPU' if ranks == 1 else 'GPUs'} of {memory / GIB:.0f} GiB",
            why=f"weights, gradients and optimizer state take {states.held / GIB:.0f} GiB on each, without activations",
            fix="choose a higher ZeRO stage, offload_optimizer: cpu, or more GPUs; `phigrow capacity` shows what fits",
        )


def _model_before_data(config: RunConfig) -> Config | None:
    """Return the configuration of the run's model where it is known before the data; None for other families."""
    if config.init != SCRATCH:
        if not Path(config.init).is_dir():
            return None  # it is reported, or taken from the run's own checkpoint, later
        model = load_config(config.init)
    else:
        named = config.model or DEMO
        model = dict(DEMO_MODEL) if named == DEMO else load_config(named)
        if config.vocab_size is not None:
            model["vocab_size"] = config.vocab_size
    return model if model.get("model_type") == "phi" and "vocab_size" in model else None
