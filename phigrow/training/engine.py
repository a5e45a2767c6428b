"""The DeepSpeed engine of a run: its configuration as plain data, and its creation."""

from __future__ import annotations

from typing import Any

from phigrow.corpus.order import micro_batch_rows
from phigrow.errors import GrowthError, nearest_multiples
from phigrow.models.capacity import SELECTIVE
from phigrow.training.configuration import RunConfig
from phigrow.training.offload import check_disk, offload_sections, offloads_optimizer
from phigrow.training.optimizer_spec import find_optimizer


def micro_batch(config: RunConfig, world_size: int, seq_len: int) -> int:
    """Return the number of sequences that a rank processes at once.

    Raises:
        GrowthError: ranks and micro-batch do not divide the batch.
    """
    share, rest = divmod(config.batch, world_size)
    if rest:
        raise GrowthError(
            f"a batch of {config.batch} sequences cannot be shared by {world_size} ranks",
            where="batch",
            fix=f"choose {nearest_multiples(config.batch, world_size)}",
        )
    micro = config.micro_batch or micro_batch_rows(share, seq_len)
    if share % micro:
        raise GrowthError(
            f"a rank's {share} sequences cannot be cut into micro-batches of {micro}",
            where="micro_batch",
            fix=f"choose a divisor of {share}",
        )
    return micro


def check_dtype(config: RunConfig) -> None:
    """Refuse a data type that this accelerator cannot train in.

    Raises:
        GrowthError: fp16 on a CPU, or bf16 on an old GPU.
    """
    from deepspeed.accelerator import get_accelerator

    from phigrow.training.automatic import has_bf16

    accelerator = get_accelerator()
    supported = {"fp16": accelerator.is_fp16_supported(), "bf16": has_bf16()}  # without emulation
    if not supported.get(config.dtype, True):
        others = [name for name, works in supported.items() if works]
        raise GrowthError(
            f"dtype {config.dtype} does not work on this device ({accelerator.device_name()})",
            where="dtype",
            fix=f"set dtype: {' or '.join([*others, 'fp32'])}, or dtype: auto",
        )


def engine_config(config: RunConfig, world_size: int, micro: int, device: str = "cpu") -> dict[str, Any]:
    """Return DeepSpeed's configuration: its JSON file, with the settings of the run in it.

    Args:
        config: the settings as asked.
        world_size: number of ranks.
        micro: sequences that a rank processes at once.
        device: type of the device, such as ``cuda``.

    Gradients are summed over ranks in ``reduce_dtype``, and over micro-batches in fp32 at ZeRO 1 to 3. At stage 0 with
    bf16 weights micro-batches are summed in bf16, because DeepSpeed supports nothing else there. A gradient itself has
    the data type of its weight.

    Raises:
        GrowthError: the file contradicts the run, or has an optimizer or a scheduler.
    """
    from phigrow.training.monitors import SECTIONS

    # Without its sections, DeepSpeed's engine does not write to monitors; `Monitors` does.
    out = {key: value for key, value in config.deepspeed_file().items() if key not in SECTIONS.values()}
    for key in ("optimizer", "scheduler"):
        if key in out:
            raise GrowthError(
                f"the DeepSpeed file has a section {key!r}",
                where=str(config.deepspeed),
                fix="remove it, and set lr, schedule, beta1, beta2 and weight_decay in the recipe",
            )
    stage, spec = config.stage, find_optimizer(config.optimizer)
    if spec.check is not None:
        spec.check(config)
    if stage == 0 and config.dtype == "fp16":
        raise GrowthError(
            "dtype fp16 requires ZeRO stage 1, 2 or 3 (got 0)",
            where="zero",
            why="gradient norms would include the loss scale",
            fix="set zero: 1",
        )
    if stage == 3 and config.compile:
        raise GrowthError(
            "compile requires ZeRO stage 0, 1 or 2 (got 3)",
            where="compile",
            why="hooks gather the weights of every layer at stage 3, and torch.compile cannot trace them",
            fix="set zero: 2, or remove compile",
        )
    if stage == 3 and config.activation_checkpointing == SELECTIVE:
        raise GrowthError(
            "activation_checkpointing: selective requires ZeRO stage 0, 1 or 2 (got 3)",
            where="activation_checkpointing",
            why="stage 3 releases the weights of a layer, and the recomputation would compare their shapes",
            fix="set activation_checkpointing: true, or zero: 2",
        )
    if stage in (1, 2) and out.get("zero_optimization", {}).get("round_robin_gradients"):
        raise GrowthError(
            "round_robin_gradients in the DeepSpeed file is not supported",
            where=str(config.deepspeed),
            why="DeepSpeed then mixes up the masters and moments of different parameters, in memory and in universal "
            "checkpoints",
            fix="remove it from the file",
        )
    own: dict[str, Any] = {
        "train_batch_size": config.batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": config.batch // (micro * world_size),
        "gradient_clipping": config.grad_clip,
    }
    for key, value in own.items():
        _agree(config, key, out.get(key, "auto"), value)
    for key, dtype in (("bf16", "bf16"), ("fp16", "fp16")):
        section = dict(out.get(key, {}))
        _agree(config, f"{key}.enabled", section.get("enabled", "auto"), config.dtype == dtype)
        if key in out or config.dtype == dtype:
            out[key] = section | {"enabled": config.dtype == dtype}
    _agree(config, "communication_data_type", out.get("communication_data_type", "auto"), config.reduce_dtype)
    out["communication_data_type"] = config.reduce_dtype
    if config.dtype == "bf16":
        _agree(config, "bf16.check_grad_overflow", out["bf16"].get("check_grad_overflow", "auto"), True)
    out["zero_optimization"] = offload_sections(config, {**out.get("zero_optimization", {}), "stage": stage})
    if overlaps_communication(config, world_size, device, offloads=offloads_optimizer(out)):
        out["zero_optimization"].setdefault("overlap_comm", True)
    if stage == 3:
        for key, value in spec.zero3.items():
            _agree(config, f"zero_optimization.{key}", out["zero_optimization"].get(key, "auto"), value)
            out["zero_optimization"][key] = value
    if config.dtype == "bf16" and stage > 0:
        out.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    out.setdefault("zero_allow_untested_optimizer", True)
    out.setdefault("steps_per_print", None)
    return out | own


def overlaps_communication(config: RunConfig, world_size: int, device: str, *, offloads: bool) -> bool:
    """Return true where gradients can be sent while the backward pass computes, and DeepSpeed does not by itself.

    On a CPU a collective ends before the call returns. Without ZeRO, and at stage 1 in bf16, DeepSpeed 0.19 sends
    gradients after the last backward pass of a step, and does not read ``overlap_comm``. At stage 1 in fp16 or fp32 it
    sends them during the last backward pass, and at stage 2 during each. At stage 3 it overlaps by default.

    Args:
        config: the settings as asked.
        world_size: number of ranks.
        device: type of the device.
        offloads: the optimizer's state is on the host, so that stage 1 works in bf16 as in fp16.
    """
    if device == "cpu" or world_size == 1:
        return False
    return config.stage == 2 or (config.stage == 1 and (config.dtype != "bf16" or offloads))


def _agree(config: RunConfig, key: str, in_file: Any, value: Any) -> None:
    """Refuse a value of the DeepSpeed file that differs from the run's."""
    if in_file not in ("auto", value):
        raise GrowthError(
            f"{key} is {in_file} in the DeepSpeed file, but {value} in the run",
            where=str(config.deepspeed),
            fix=f'write "auto" for {key} in the file, or remove it there',
        )


def make_engine(model: Any, config: RunConfig, engine_dict: dict[str, Any]) -> Any:
    """Make DeepSpeed's engine from a model, with the optimizer and the schedule of the run.

    Raises:
        GrowthError: the optimizer or the parameters are offloaded to a disk, which DeepSpeed cannot use on this host;
            or DeepSpeed refuses a value of its configuration.
    """
    import deepspeed
    from pydantic import ValidationError

    from phigrow.training import zero
    from phigrow.training.lost_ranks import groups_with_timeout
    from phigrow.training.process import quiet
    from phigrow.training.schedule import learning_rate_schedule

    check_disk(engine_dict)
    # At some stages DeepSpeed takes one step with zero gradients, to allocate the moments. At lr 0 this step does not
    # decay the weights. The schedule is made afterwards and sets the real lr.
    spec = find_optimizer(config.optimizer)
    optimizer = spec.build(spec.groups(model, config), config, offloads_optimizer(engine_dict))
    try:
        with quiet(), groups_with_timeout():
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=engine_dict,
                lr_scheduler=lambda base: learning_rate_schedule(base, config),
            )
    except ValidationError as error:
        first = error.errors()[0]
        raise GrowthError(
            f"DeepSpeed refuses {'.'.join(map(str, first['loc']))} = {first.get('input')!r}",
            where=str(config.deepspeed),
            why=first["msg"],
            fix="correct this value in the DeepSpeed file",
        ) from error
    forget_empty_step(engine)
    if config.optimizer == "muon":
        zero.check_muon(engine)
        if not config.compile or engine.device.type == "cpu":
            zero.run_muon_eagerly(engine)
    if config.compile:
        from phigrow.training.compilation import compile_layers, compile_training

        if engine.device.type == "cpu" and config.dtype == "bf16":
            # PyTorch 2.13 gives two sums of bf16 gradients in one fused kernel the same name, and g++ refuses it
            # ("conflicting declaration"). Without horizontal fusion each sum has its own kernel.
            from torch._inductor import config as inductor

            inductor.cpp.max_horizontal_fusion_size = 1
        if config.compile == "layers":
            compile_layers(engine.module)
        else:
            compile_training(engine.module, plain_positions=config.documents == "plain")
    return engine


def forget_empty_step(engine: Any) -> None:
    """Reset Adam's step counters to 0, because DeepSpeed's empty step would halve the first bias corrections."""
    import torch

    for state in engine.basic_optimizer.state.values():
        step = state.get("step")
        if isinstance(step, torch.Tensor):
            step.zero_()
        elif step is not None:
            state["step"] = 0
