"""Grow a checkpoint on disk, tensor by tensor, or a live model in memory."""

from __future__ import annotations

import copy
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.checkpoints.companions import Companions, generation_settings, make_companions
from phigrow.checkpoints.configuration import ResolvedConfig, check_live_config, resolve_config
from phigrow.checkpoints.fingerprint import checkpoint_fingerprint
from phigrow.checkpoints.hub import display_name, locate, source_config
from phigrow.checkpoints.origin import Origin, origin_of
from phigrow.checkpoints.provenance import PROVENANCE_FILE
from phigrow.checkpoints.reader import DTYPES, ITEM_BYTES
from phigrow.checkpoints.stored_model import StoredModel, as_stored
from phigrow.checkpoints.token_ids import choose_token_ids, tokenizer_ids
from phigrow.checkpoints.writer import CheckpointWriter
from phigrow.errors import GrowthError
from phigrow.expansion.provenance import command_line, growth_card, installed_version, provenance, sha256_of
from phigrow.expansion.write_tensors import write_tensors
from phigrow.files.atomic import atomic_json
from phigrow.files.output import check_replaceable
from phigrow.files.paths import user_path
from phigrow.files.staged_folder import StagedFolder
from phigrow.growth.growth_spec import GrowthSpec
from phigrow.growth.lift import InMemory, lift
from phigrow.growth.matrices import FILE, read_maps
from phigrow.growth.method import Method
from phigrow.growth.plan import Plan
from phigrow.growth.planner import make_plan
from phigrow.models.config import Config, load_config
from phigrow.models.families import family_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def expand(
    src: str | Path,
    dst_config: str | Path | Config,
    out: str | Path | None = None,
    *,
    method: str | Method = "wr",
    dtype: str | None = None,
    revision: str | None = None,
    shard_size: str = "5GB",
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    sync: bool = True,
    progress: bool = False,
    **growth: Any,
) -> Path:
    """Grow a checkpoint folder into a new one, tensor by tensor; neither model is ever in memory.

    Args:
        src: a Hugging Face folder, ``phi-1``, ``phi-1_5``, ``phi-2``, or a hub id.
        dst_config: destination configuration: a file, a shipped name (``phi2.json``) or a dictionary.
        out: the new folder; by default `default_out`. It is written completely or not at all. The hidden folder of a
            killed run, beside it, is continued.
        method: width method, as in `phigrow.plan`.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``float64``; by default the source's.
        revision: hub revision of the source.
        shard_size: most bytes a safetensors file, such as ``5GB``.
        overwrite: replace an existing ``out``.
        allow_nonfinite: let NaN and infinities through, which are refused otherwise.
        sync: wait until the values have reached the disk.
        progress: show a progress bar.
        growth: other settings of the growth and options of the method, as in `phigrow.plan`. Learned ``maps`` are
            copied beside the weights.

    Returns:
        The new folder: weights, config, generation config, the source's tokenizer, a model card and ``phigrow.json``.

    Raises:
        GrowthError: a growth that a plan refuses; a source that does not fit its configuration; a destination that
            transformers would not load as phigrow reads it, or with a special token outside the vocabulary; an ``out``
            that exists; values that are not finite.
    """
    output = OutputSpec(out, dtype, shard_size, overwrite, allow_nonfinite, sync, progress)
    return expand_checkpoint(src, dst_config, GrowthSpec.of(method, **growth), output, revision=revision)


@dataclass(frozen=True)
class OutputSpec:
    """Options of the output of `expand`.

    Attributes:
        out: the new folder; None for `default_out`.
        dtype: of the weights, one of `phigrow.checkpoints.reader.DTYPES`; None for the source's.
        shard_size: largest size of a safetensors file, such as ``5GB``.
        overwrite: replace an existing ``out``.
        allow_nonfinite: accept NaN and infinities, which are refused otherwise.
        sync: wait until the values have reached the disk.
        progress: show a progress bar.
    """

    out: str | Path | None = None
    dtype: str | None = None
    shard_size: str = "5GB"
    overwrite: bool = False
    allow_nonfinite: bool = False
    sync: bool = True
    progress: bool = False


def expand_checkpoint(
    src: str | Path,
    dst_config: str | Path | Config,
    growth: GrowthSpec,
    output: OutputSpec,
    *,
    revision: str | None = None,
) -> Path:
    """Grow a checkpoint folder into a new one, as `expand` does, from a `GrowthSpec` and an `OutputSpec`.

    Raises:
        GrowthError: as `expand`.
    """
    started = time.perf_counter()
    spelled, label, growth = growth.spelled(), growth.label, growth.pinned()
    plan = make_plan(config_of_source(src, dst_config, revision), dst_config, growth)
    folder = locate(src, revision)
    out = user_path(output.out) if output.out is not None else default_out(src, dst_config, label)
    shard_bytes = parse_size(output.shard_size)
    if out.exists() and not output.overwrite:
        raise GrowthError("the output folder exists", where=str(out), fix="choose another --out, or --overwrite")
    if out.resolve() == folder.resolve():
        raise GrowthError(
            "the output is the source itself", where=str(out), why="it would be replaced by its growth",
            fix="choose another --out",
        )  # fmt: skip
    check_replaceable(out, [PROVENANCE_FILE], "a grown checkpoint")
    with StoredModel(folder) as reader:
        plan = plan_of_weights(plan, reader, dst_config, growth)
        dtype = resolve_dtype(output.dtype, reader)
        origin = origin_of(src, folder)
        companions = _companions(plan, folder, origin, dtype)
        identity = {
            "phigrow": installed_version("phigrow"),
            "plan": plan.hash,
            "dtype": dtype,
            "shard_bytes": shard_bytes,
            "source": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in reader.files],
            "content": checkpoint_fingerprint(folder),
        }
        with StagedFolder(out, identity) as partial:
            try:
                hashes = _write_weights(plan, reader, partial, dtype, shard_bytes, output)
                companions.write(partial.path)
                record = provenance(
                    plan,
                    method_summary=growth.resolve()[0].summary,
                    source_name=origin.name,
                    revision=origin.commit or revision,
                    source=folder,
                    hashes=hashes,
                    dtype=dtype,
                    command=command_line(plan, src, dst_config, out, dtype, revision, spelled, growth.maps),
                    seconds=time.perf_counter() - started,
                    learning=_keep_maps(plan, partial.path),
                )
                atomic_json(partial.path / PROVENANCE_FILE, record.to_json())
                partial.finish(overwrite=output.overwrite)
            except KeyboardInterrupt:
                raise  # finished blocks stay for the next run, as after a kill
            except OSError as error:
                partial.discard()
                raise GrowthError(
                    "the output cannot be written",
                    where=str(out),
                    why=str(error),
                    fix="choose an --out where you may write and that has enough space",
                ) from error
            except BaseException:
                partial.discard()
                raise
    return out


def _companions(plan: Plan, source: Path, origin: Origin, dtype: str) -> Companions:
    """Return the files beside the grown weights, after transformers has accepted the configuration.

    Raises:
        GrowthError: transformers would not load the grown model, or a special token is outside the vocabulary.
    """
    generation = generation_settings(source)
    ids = choose_token_ids(
        plan.dst_config, vocab=plan.dst_sizes["vocab"], where=_DESTINATION, source=plan.src_config,
        generation=generation, tokenizer=tokenizer_ids(source), source_place=str(source),
    )  # fmt: skip
    card = growth_card(plan, source, origin, dtype)
    return make_companions(_resolved(plan), dtype, ids, generation, card=card, tokenizer=source)


_DESTINATION = "the destination configuration"


def _resolved(plan: Plan) -> ResolvedConfig:
    """Let transformers build the destination's configuration and its empty model, and compare them with the plan."""
    resolved = resolve_config(plan.dst_config, _DESTINATION)
    resolved.check_tensors({recipe.name: recipe.shape for recipe in plan.recipes()})
    return resolved


def _write_weights(
    plan: Plan, reader: StoredModel, partial: StagedFolder, dtype: str, shard_bytes: int, output: OutputSpec
) -> dict[str, Any]:
    """Write every tensor, and hash the source's files meanwhile: file name -> sha256."""
    _check_space(plan, dtype, partial)
    writer = CheckpointWriter(partial.path, {r.name: r.shape for r in plan.recipes()}, dtype, shard_bytes)
    try:
        return write_tensors(
            plan, reader, writer, partial, dtype,
            allow_nonfinite=output.allow_nonfinite, progress=output.progress, beside=sha256_of,
        )  # fmt: skip
    finally:
        writer.close(sync=output.sync)


def expand_model(
    model: PreTrainedModel,
    dst_config: str | Path | Config,
    *,
    method: str | Method = "wr",
    dtype: str | None = None,
    **growth: Any,
) -> PreTrainedModel:
    """Grow a live transformers model into a new one on the CPU, by the same lift as `expand`, bit for bit.

    Args:
        model: the source model; it is not changed.
        dst_config: destination configuration: a file, a shipped name or a dictionary.
        method, growth: the growth, as in `phigrow.plan`.
        dtype: of the new model; by default the source's.

    Returns:
        The new model, in evaluation mode, with the source's attention implementation and generation settings.

    Raises:
        GrowthError: a growth that a plan refuses; a model whose tensors do not fit its configuration, are quantised or
            have no values (the meta device).
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config, state = _live_state(model)
    plan = make_plan(config, dst_config, GrowthSpec.of(method, **growth))
    plan.table.check_tensors(config, {name: tuple(t.shape) for name, t in state.items()}, where=_LIVE)
    torch_dtype = getattr(torch, check_dtype(dtype)) if dtype else model.dtype
    resolved = _resolved(plan)
    generation = copy.deepcopy(model.generation_config)
    ids = choose_token_ids(
        plan.dst_config, vocab=plan.dst_sizes["vocab"], where=_DESTINATION, source=config,
        generation=generation.to_dict() if generation is not None else None, source_place=_LIVE,
    )  # fmt: skip
    sources = {name: InMemory(tensor) for name, tensor in state.items()}
    grown = {recipe.name: lift(recipe, sources, torch_dtype) for recipe in plan.recipes()}
    new_config = copy.deepcopy(resolved.hf_config)
    new_config.architectures = [plan.table.architecture]
    for key, value in ids.model.items():
        setattr(new_config, key, value)
    with init_empty_weights(include_buffers=False):
        new: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            new_config, dtype=torch_dtype, attn_implementation=model.config._attn_implementation
        )
    names = set(new.state_dict())
    grown = {plan.table.name_among(name, names): tensor for name, tensor in grown.items()}
    if plan.table.ties(plan.dst_config):
        head, embedding = (plan.table.name_among(str(n), names) for n in (plan.table.head_matrix, plan.table.embedding))
        grown[head] = grown[embedding]
    new.load_state_dict(grown, strict=True, assign=True)
    new.tie_weights()
    if generation is not None:
        for key in ids.model:
            setattr(generation, key, ids.generation.get(key))
        new.generation_config = generation
    new.train(mode=False)
    return new


_LIVE = "the live model"


def _live_state(model: PreTrainedModel) -> tuple[Config, dict[str, torch.Tensor]]:
    """Return the configuration and the tensors of a live model, the latter on the CPU and by the table's names.

    Raises:
        GrowthError: tensors without values, or that are no floating point numbers.
    """
    import torch

    if not hasattr(getattr(model, "config", None), "to_dict"):
        raise GrowthError(
            f"{_LIVE} has no configuration of transformers",
            where=f"a {type(model).__name__}",
            why="a wrapper hides it, or it is no model of transformers",
            fix="give the model inside of the wrapper, such as model.module",
        )
    config, live = model.config.to_dict(), model.state_dict()
    family = family_of(config, _LIVE)
    check_live_config(config, _LIVE)
    for name, tensor in live.items():
        if name.endswith(family.ignored_tensors):
            continue
        if tensor.device.type == "meta":
            raise GrowthError(
                "the live model has no values, because it is on the meta device",
                where=f"{name} of {_LIVE}",
                why="init_empty_weights or device_map='auto' leaves weights there",
                fix="load the model onto a device, or give its folder to phigrow.expand, which reads tensor by tensor",
            )
        if str(tensor.dtype).removeprefix("torch.") not in DTYPES.values():
            raise GrowthError(
                f"the live model has a tensor of {str(tensor.dtype).removeprefix('torch.')}",
                where=f"{name} of {_LIVE}",
                why=f"phigrow grows {', '.join(DTYPES.values())}",
                fix="load the model without quantisation",
            )
    state = {name: tensor.detach() for name, tensor in live.items()}
    config, state = as_stored(family, config, state, torch.equal, _LIVE)
    return config, {name: tensor.cpu() for name, tensor in state.items()}


def preview(
    src: str | Path,
    dst_config: str | Path | Config,
    growth: GrowthSpec,
    *,
    dtype: str | None = None,
    revision: str | None = None,
) -> tuple[Plan, int, str]:
    """Run all checks of `expand` without writing; return the plan, the bytes of the weights, and their dtype.

    Raises:
        GrowthError: `expand` would refuse, for the same reason.
    """
    growth = growth.pinned()
    plan = make_plan(config_of_source(src, dst_config, revision), dst_config, growth)
    folder = locate(src, revision)
    with StoredModel(folder) as reader:
        plan = plan_of_weights(plan, reader, dst_config, growth)
        dtype = resolve_dtype(dtype, reader)
    _companions(plan, folder, origin_of(src, folder), dtype)
    return plan, output_bytes(plan, dtype), dtype


def default_out(src: str | Path, dst_config: str | Path | Config, method: str) -> Path:
    """Return the default output of `expand`, such as ``phi-1_5-to-phi2-tile`` in the current folder."""
    name = display_name(src).split("/")[-1]
    if isinstance(dst_config, dict):
        target = "grown"
    else:
        path = user_path(dst_config)
        if path.is_dir():
            target = path.resolve().name
        else:
            target = path.stem if path.name != "config.json" else path.absolute().parent.name
    return Path(f"{name}-to-{target}-{method}")


def parse_size(text: str) -> int:
    """Return the bytes of a size such as ``5GB``, ``500MB`` or ``2GiB``.

    Raises:
        GrowthError: the text is not a size.
    """
    upper = text.strip().upper()
    unit = next((unit for unit in sorted(_UNITS, key=len, reverse=True) if upper.endswith(unit)), "")
    try:
        size = int(float(upper.removesuffix(unit)) * _UNITS.get(unit, 1))
    except (ValueError, OverflowError):  # no number, or one that is not finite
        size = 0
    if size <= 0:
        raise GrowthError(
            f"shard size {text!r} cannot be read", where="--shard-size", fix="write it as 5GB, 500MB or 2GiB"
        )
    return size


def check_dtype(dtype: str) -> str:
    """Return the name of a dtype in which weights can be stored.

    Raises:
        GrowthError: weights cannot be stored in it.
    """
    if dtype not in DTYPES.values():
        raise GrowthError(
            f"dtype {dtype!r} is unknown", where="--dtype", fix=f"choose one of {', '.join(DTYPES.values())}"
        )
    return dtype


def resolve_dtype(dtype: str | None, reader: StoredModel) -> str:
    """Return the output dtype: the given one, or that of the source."""
    return check_dtype(dtype) if dtype is not None else reader.dtype_name


def _check_space(plan: Plan, dtype: str, partial: StagedFolder) -> None:
    """Refuse an output that does not fit on the file system, before anything is written."""
    needed = output_bytes(plan, dtype)
    there = sum(file.stat().st_blocks * 512 for file in partial.path.iterdir())
    free = shutil.disk_usage(partial.path).free + there
    if needed > free:
        raise GrowthError(
            f"too little space is left for the output: it needs {needed / 1e9:.3f} GB, {free / 1e9:.3f} GB are free",
            where=str(partial.out),
            fix="choose another --out, or a smaller --dtype",
        )


def output_bytes(plan: Plan, dtype: str) -> int:
    """Return the bytes of all values of the destination."""
    return sum(math.prod(recipe.shape) for recipe in plan.recipes()) * ITEM_BYTES[dtype]


def config_of_source(src: str | Path, dst_config: str | Path | Config, revision: str | None) -> Config:
    """Return the configuration by which a source is planned.

    It comes without weights where the source is on the hub. If it ties the head and the destination does not, the
    weights decide, so they are downloaded.

    Raises:
        GrowthError: nothing has that name, or the hub cannot be reached.
    """
    config = source_config(src, revision)
    family = family_of(config, "the source configuration")
    if family.ties(config) and not family.ties(load_config(dst_config)):
        with StoredModel(locate(src, revision), config) as model:
            return model.config
    return config


def plan_of_weights(plan: Plan, model: StoredModel, dst_config: str | Path | Config, growth: GrowthSpec) -> Plan:
    """Return the plan of a source's weights, after checking their names and shapes.

    A source on the hub is planned by its configuration, before its weights are there. If their head turns out not to be
    tied, the growth is planned again.

    Raises:
        GrowthError: as `check_source`, or as `make_plan`.
    """
    if plan.table.ties(plan.src_config) != plan.table.ties(model.config):
        plan = make_plan(model.config, dst_config, growth)
    check_source(plan, model)
    return plan


def check_source(plan: Plan, reader: StoredModel) -> None:
    """Check the source's tensors against the family table.

    Raises:
        GrowthError: tensors are missing, unexpected, or of another shape than the configuration demands.
    """
    reader.check(plan.src_config)


def _keep_maps(plan: Plan, folder: Path) -> dict[str, Any] | None:
    """Copy the learned matrices of a plan beside the weights, and return the record of their learning."""
    if plan.maps is None or plan.maps.path is None:
        return None
    shutil.copyfile(plan.maps.path, folder / FILE)
    record = read_maps(folder)[1]
    return {key: value for key, value in record.items() if key != "losses"}
