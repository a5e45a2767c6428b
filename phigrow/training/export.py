"""Write the trained model as an ordinary Hugging Face folder."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from phigrow.training.accounts import TRAINING_FILE
from phigrow.training.model import DTYPES
from phigrow.training.weights import full_value

if TYPE_CHECKING:
    from phigrow.training.process import World


def export_model(
    engine: Any, folder: Path, dtype: str, world: World, *, tokenizer_dir: Path | None, training: dict[str, Any]
) -> None:
    """Gather the weights parameter by parameter and write config, safetensors, tokenizer and ``training.json``.

    The folder is written beside its place and renamed: complete or not there; an older one is replaced.

    Args:
        engine: DeepSpeed's engine, on every rank.
        folder: where the export goes.
        dtype: ``bf16``, ``fp16`` or ``fp32``; fp32 writes the masters.
        tokenizer_dir: files to copy into the folder.
        training: the content of ``training.json``: what the model cost in all.
    """
    import torch.distributed as dist

    model = engine.module
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        value = full_value(parameter, engine.optimizer, master=dtype == "fp32")
        if world.first and value is not None:
            tensors[name] = value.to(DTYPES[dtype]).contiguous()
    if world.first:
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if tokenizer_dir is not None and tokenizer_dir.is_dir():
            shutil.copytree(tokenizer_dir, partial, dirs_exist_ok=True)
        _write(model, partial, tensors, dtype)
        (partial / TRAINING_FILE).write_text(json.dumps(training, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    dist.barrier()


def _write(model: Any, folder: Path, tensors: dict[str, torch.Tensor], dtype: str) -> None:
    from huggingface_hub import save_torch_state_dict
    from transformers import GenerationConfig

    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = DTYPES[dtype]
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    save_torch_state_dict(tensors, folder, max_shard_size="5GB", metadata={"format": "pt"})
