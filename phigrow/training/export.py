"""Write the trained model as an ordinary Hugging Face folder."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.checkpoints.bits import bits_of
from phigrow.checkpoints.companions import Companions
from phigrow.checkpoints.provenance import TRAINING_FILE
from phigrow.checkpoints.writer import CheckpointWriter
from phigrow.files.atomic import atomic_json
from phigrow.files.output import check_replaceable
from phigrow.files.staged_folder import staged_folder
from phigrow.models.families import family_of
from phigrow.training.model import DTYPES
from phigrow.training.process import on_rank_zero
from phigrow.training.zero import full_shape, full_value

if TYPE_CHECKING:
    from phigrow.training.process import World

SHARD_BYTES = 5 * 10**9
"""Most bytes of values in one file of an export; transformers has the same limit."""


def export_model(
    engine: Any,
    folder: Path,
    dtype: str,
    world: World,
    *,
    companions: Companions,
    training: dict[str, Any],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Gather the weights parameter by parameter and write safetensors, their companions and ``training.json``.

    Every parameter is written before the next one is gathered, so rank 0 holds one parameter and never the model. The
    folder is written under another name and renamed at the end, so the export is complete or absent. An older export is
    replaced.

    Args:
        engine: DeepSpeed's engine, on every rank.
        folder: folder of the export.
        dtype: ``bf16``, ``fp16`` or ``fp32``; fp32 writes the masters.
        world: the ranks.
        companions: the files beside the weights, see `phigrow.training.export_files.export_files`.
        training: the content of ``training.json``, with the whole cost of the model.
        shard_bytes: most bytes of values in one safetensors file, unless one tensor alone has more.
    """
    import torch.distributed as dist

    on_rank_zero(world, lambda: check_replaceable(folder, [TRAINING_FILE], "an export of a run"))
    model = engine.module
    family = family_of(model.config.to_dict(), "the model")
    # By stored names, which every version of transformers reads, and sorted, as the safetensors library does.
    named = {family.stored_name(name): parameter for name, parameter in model.named_parameters()}
    parameters = sorted(named.items(), key=lambda item: item[0])
    stored_dtype = str(DTYPES[dtype]).removeprefix("torch.")
    with ExitStack() as stack:
        unfinished, writer = folder, None
        if world.first:
            unfinished = stack.enter_context(staged_folder(folder))
            shapes = {name: full_shape(p) for name, p in parameters}
            writer = CheckpointWriter(unfinished, shapes, stored_dtype, shard_bytes)
        for name, parameter in parameters:
            value = full_value(parameter, engine.optimizer, master=dtype == "fp32")
            if writer is not None and value is not None:
                writer.write(name, 0, bits_of(value.to(DTYPES[dtype])))
        if writer is not None:
            writer.close(sync=True)
            companions.write(unfinished)
            atomic_json(unfinished / TRAINING_FILE, training)
    dist.barrier()
