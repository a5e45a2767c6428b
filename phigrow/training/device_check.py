"""Check what a run needs of its devices before any data is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from phigrow.errors import GrowthError
from phigrow.models.capacity import GIB, ZeroLayout, model_states, muon_parameters
from phigrow.models.config import Config, load_config
from phigrow.models.cost import count_cost
from phigrow.training.configuration import DEMO_MODEL, RunConfig
from phigrow.training.gpu_setup import Gpu, check_together, gpu_of
from phigrow.training.settings import DEMO, SCRATCH

if TYPE_CHECKING:
    from phigrow.training.process import World


def check_device(config: RunConfig, world: World, gpus: Sequence[Gpu | None] | None = None) -> None:
    """Refuse a run for which its devices lack the attention that it asks for, or memory, or do not fit together.

    Args:
        config: the run.
        world: the ranks.
        gpus: the GPU of every rank; None looks at this rank alone.

    Raises:
        GrowthError: flash-attn does not work here, the GPUs cannot train together, or the weights, gradients and
            optimizer state are larger than the memory of a GPU, or than its free memory.
    """
    from phigrow.training.attention_choice import check_flash_attention

    if config.attention == "flash_attention_2":
        check_flash_attention(config.dtype, world.device)
    found = [gpu for gpu in (gpus if gpus is not None else [gpu_of(world.device)]) if gpu is not None]
    if not found:
        return
    if (line := check_together(found, config.dtype)) is not None:
        print(line, flush=True)
    model = _model_before_data(config)
    if model is not None:
        check_memory(config, model, world.size, min(gpu.memory for gpu in found))
        least = min(range(len(found)), key=lambda rank: found[rank].free)
        check_memory(config, model, world.size, found[least].free, of=found[least], rank=least)


def check_memory(
    config: RunConfig, model: Config, ranks: int, memory: int, *, of: Gpu | None = None, rank: int = 0
) -> None:
    """Refuse a run whose model states alone exceed the memory of a GPU; activations need more.

    Args:
        config: the run.
        model: the configuration of the model.
        ranks: number of GPUs.
        memory: bytes of a GPU.
        of: the GPU, if ``memory`` is only its free part.
        rank: its rank.

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
    if states.held > memory and of is not None:
        raise GrowthError(
            f"only {memory / GIB:.1f} GiB of the {of.memory / GIB:.0f} GiB of a GPU are free",
            where=f"rank {rank}, {of.name} on {of.host}",
            why="other processes use the rest, and weights, gradients and optimizer state take "
            f"{states.held / GIB:.1f} GiB on each GPU, without activations",
            fix="end the processes that nvidia-smi shows there, such as another notebook, or choose another GPU with "
            "CUDA_VISIBLE_DEVICES",
        )
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
