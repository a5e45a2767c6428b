"""Read the DeepSpeed file of a run, strictly: DeepSpeed itself ignores keys that it does not know."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.files.untrusted import read_json_strict

KNOWN = frozenset(
    {
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
        "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level", "disable_python_gc",
        "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "bf16", "fp16",
        "data_types", "communication_data_type", "seq_parallel_communication_data_type", "prescale_gradients",
        "gradient_predivide_factor", "disable_allgather", "activation_checkpointing", "aio", "flops_profiler",
        "comms_logger", "csv_monitor", "tensorboard", "wandb", "comet", "checkpoint", "compile", "optimizer",
        "scheduler", "dataloader_drop_last", "timers",
    }
)  # fmt: skip
"""Keys of the file that DeepSpeed reads and that leave the training as phigrow's settings describe it."""

UNSEEN = {
    "sparse_gradients": "gradients of embeddings would be reduced as sparse tensors",
    "progressive_layer_drop": "layers would be left out at random",
    "curriculum_learning": "blocks would be cut to other lengths",
    "data_efficiency": "blocks would be chosen and cut by difficulty, or tokens left out",
    "quantize_training": "weights would be quantised",
    "weight_quantization": "weights would be quantised",
    "compression_training": "weights would be quantised or pruned",
    "eigenvalue": "it belongs to quantised training",
    "amp": "the data type is the setting dtype",
    "torch_autocast": "the data type is the setting dtype",
    "gradient_allreduce_op": "gradients would be summed over ranks and not averaged",
    "managed_gradient_accumulation": "phigrow accumulates gradients by the setting micro_batch",
    "elasticity": "the batch size would change with the number of ranks",
    "autotuning": "runs of other settings would be started",
    "pipeline": "phigrow trains with data parallelism only",
    "tensor_parallel": "phigrow trains with data parallelism only",
    "expert_parallel": "phigrow trains with data parallelism only",
    "hybrid_engine": "phigrow trains with data parallelism only",
    "data_parallel_group": "phigrow trains with data parallelism only",
    "use_data_before_expert_parallelism": "phigrow trains with data parallelism only",
    "datastates_ckpt": "checkpoints would still be written while phigrow hashes their files",
    "nebula": "DeepSpeed has removed it, and phigrow hashes files of checkpoints as soon as they are saved",
}
"""Keys that would break checkpoints, or change the training without a trace in the records, and their effects."""

SECTIONS = frozenset(
    {
        "zero_optimization", "bf16", "fp16", "data_types", "activation_checkpointing", "optimizer", "scheduler", "aio",
        "flops_profiler", "comms_logger", "csv_monitor", "tensorboard", "wandb", "comet", "checkpoint", "compile",
        "timers",
    }
)  # fmt: skip
"""Keys whose value is an object."""

INNER_SECTIONS = ("offload_optimizer", "offload_param")
"""Keys of ``zero_optimization`` whose value is an object or null."""

STAGES = (0, 1, 2, 3, "auto", None)

_FEWER_BITS = "masters, gradients or optimizer state would have fewer bits than the records say"
UNSEEN_INSIDE = {
    "bf16": dict.fromkeys(("bf16_master_weights_and_grads", "bf16_optimizer_states"), _FEWER_BITS),
    "fp16": {"fp16_master_weights_and_grads": _FEWER_BITS},
    "zero_optimization": dict.fromkeys(("zero_quantized_weights", "zero_quantized_gradients", "zenflow"), _FEWER_BITS),
    "checkpoint": {
        "writer": "phigrow hashes files of a checkpoint as soon as DeepSpeed has saved them, but a decoupled writer is "
        "still writing them then, a mock writer never does, and others split them among ranks",
        "load_universal": "the setting universal decides this for each checkpoint",
    },
}
"""Keys of sections that would do the same, and their effects."""

ON_IF_EMPTY = ("datastates_ckpt", "writer")
"""Keys whose feature an empty object switches on."""

ALIASES = {"bfloat16": "bf16"}
"""Names that DeepSpeed reads as others."""


def read_deepspeed_file(path: Path) -> dict[str, Any]:
    """Return the content of a DeepSpeed file, under the names that phigrow uses.

    Keys that begin with an underscore are comments.

    Raises:
        GrowthError: the file cannot be read, or is no JSON object; a key stands twice, is unknown to DeepSpeed, or
            would change the training unseen.
    """
    content: dict[str, Any] = {}
    for key, value in read_json_strict(path, "the DeepSpeed file").items():
        name = ALIASES.get(key, key)
        if name in content:
            raise GrowthError(f"{name} stands twice, as {name} and {key}", where=str(path), fix="remove one of them")
        if key.startswith("_"):
            continue
        if name in UNSEEN:
            if _is_on(key, value):
                raise GrowthError(
                    f"{key} in the DeepSpeed file is not supported", where=str(path), why=UNSEEN[name],
                    fix="remove it from the file",
                )  # fmt: skip
            continue
        if name not in KNOWN:
            near = difflib.get_close_matches(key, KNOWN, n=2)
            raise GrowthError(
                f"DeepSpeed has no key {key!r}",
                where=str(path),
                why="it would be ignored",
                fix=f"did you mean {' or '.join(near)}?" if near else "remove it, or begin its name with an underscore",
            )
        if name in SECTIONS:
            _check_object(key, value, path)
        content[name] = value
    for section, keys in UNSEEN_INSIDE.items():
        for key, why in keys.items():
            if _is_on(key, content.get(section, {}).get(key)):
                raise GrowthError(
                    f"{key} in the DeepSpeed file is not supported", where=f"{section} in {path}", why=why,
                    fix="remove it from the file",
                )  # fmt: skip
    zero = content.get("zero_optimization", {})
    for key in INNER_SECTIONS:
        if zero.get(key) is not None:
            _check_object(key, zero[key], path)
    stage = zero.get("stage")
    if isinstance(stage, bool) or stage not in STAGES:
        raise GrowthError(
            f"stage in the DeepSpeed file is {stage!r}", where=f"zero_optimization in {path}", fix="give 0, 1, 2 or 3"
        )
    return content


def _check_object(key: str, value: Any, path: Path) -> None:
    if not isinstance(value, dict):
        raise GrowthError(
            f"{key} in the DeepSpeed file is {value!r}, but must be an object",
            where=str(path),
            fix=f'write it as {{"{key}": {{...}}}}, or remove it',
        )


def _is_on(key: str, value: Any) -> bool:
    """Return True unless a value switches its feature off."""
    if isinstance(value, dict) and key not in ON_IF_EMPTY:
        return bool(value) and value.get("enabled") is not False
    return value not in (None, False, "mean" if key == "gradient_allreduce_op" else None)
