"""Write the trained model as an ordinary Hugging Face folder."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.checkpoints.bits import bits_of
from phigrow.checkpoints.provenance import TRAINING_FILE
from phigrow.checkpoints.writer import CheckpointWriter
from phigrow.training.model import DTYPES
from phigrow.training.weights import full_value

if TYPE_CHECKING:
    from phigrow.training.process import World

SHARD_BYTES = 5 * 10**9
"""Most bytes of values in one file of an export, as transformers has it."""


def export_model(
    engine: Any,
    folder: Path,
    dtype: str,
    world: World,
    *,
    tokenizer_dir: Path | None,
    training: dict[str, Any],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Gather the weights parameter by parameter and write config, safetensors, tokenizer and ``training.json``.

    Every value goes to its place in its file before the next is gathered: rank 0 holds one parameter, never the model.
    The folder is written beside its place and renamed: complete or not there; an older one is replaced.

    Args:
        engine: DeepSpeed's engine, on every rank.
        folder: where the export goes.
        dtype: ``bf16``, ``fp16`` or ``fp32``; fp32 writes the masters.
        tokenizer_dir: files to copy into the folder.
        training: the content of ``training.json``: what the model cost in all.
        shard_bytes: most bytes of values in one safetensors file, unless one tensor alone has more.
    """
    import torch.distributed as dist

    model = engine.module
    # Sorted, as the safetensors library lays a file out.
    parameters = sorted(model.named_parameters(), key=lambda item: item[0])
    partial = folder.with_name(folder.name + ".partial")
    writer: CheckpointWriter | None = None
    if world.first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if tokenizer_dir is not None and tokenizer_dir.is_dir():
            shutil.copytree(tokenizer_dir, partial, dirs_exist_ok=True)
        shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters}
        writer = CheckpointWriter(partial, shapes, str(DTYPES[dtype]).removeprefix("torch."), shard_bytes)
    for name, parameter in parameters:
        value = full_value(parameter, engine.optimizer, master=dtype == "fp32")
        if writer is not None and value is not None:
            writer.write(name, 0, bits_of(value.to(DTYPES[dtype])))
    if writer is not None:
        writer.close(sync=True)
        _write_configuration(model, partial, dtype)
        (partial / TRAINING_FILE).write_text(json.dumps(training, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    dist.barrier()


def _write_configuration(model: Any, folder: Path, dtype: str) -> None:
    from transformers import GenerationConfig

    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = DTYPES[dtype]
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
