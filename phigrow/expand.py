"""Grow a checkpoint on disk, streaming, or a live model in memory."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.checkpoint import DTYPES, ITEM_BYTES, CheckpointReader, CheckpointWriter
from phigrow.config import Config, load_config
from phigrow.errors import GrowthError
from phigrow.hub import TOKENIZER_FILES, display_name, locate
from phigrow.lift import InMemory, Lift, span_rows
from phigrow.plan import Plan
from phigrow.provenance import command_line, model_card, provenance
from phigrow.resolve import plan as make_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def expand(
    src: str | Path,
    dst_config: str | Path | Config,
    out: str | Path | None = None,
    *,
    method: str = "tile",
    depth: str | None = None,
    rounding: str = "half-even",
    seed: int = 0,
    noise: float = 0.0,
    dtype: str | None = None,
    revision: str | None = None,
    shard_size: str = "5GB",
    overwrite: bool = False,
    progress: bool = False,
    **options: Any,
) -> Path:
    """Grow a checkpoint folder into a new one, tensor by tensor; neither model is ever in memory.

    Args:
        src: a Hugging Face folder, ``phi-1``, ``phi-1_5``, ``phi-2``, or a hub id.
        dst_config: destination configuration: a file, a shipped name (``phi2.json``) or a dictionary.
        out: the new folder; by default `default_out`. It is there complete, or not at all.
        method, depth, rounding, seed, noise, options: as in `phigrow.plan`.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``float64``; by default the source's.
        revision: hub revision of the source.
        shard_size: most bytes a safetensors file, such as ``5GB``.
        overwrite: replace an existing ``out``.
        progress: show a progress bar.

    Returns:
        The new folder: weights, config, generation config, the source's tokenizer, a model card and ``phigrow.json``.

    Raises:
        GrowthError: what a plan refuses; a source that does not fit its configuration; an ``out`` that exists.
    """
    started = time.perf_counter()
    plan = make_plan(
        src, dst_config, method, depth=depth, rounding=rounding, seed=seed, noise=noise, revision=revision, **options
    )
    folder = locate(src, revision)
    out = Path(out) if out is not None else default_out(src, dst_config, method)
    shard_bytes = parse_size(shard_size)
    if out.exists() and not overwrite:
        raise GrowthError("the output folder exists", where=str(out), fix="choose another --out, or --overwrite")
    with CheckpointReader(folder) as reader:
        check_source(plan, reader)
        dtype = resolve_dtype(dtype, reader)
        partial = out.parent / f".{out.name}.partial"
        _remove(partial)
        try:
            partial.mkdir(parents=True)
            writer = CheckpointWriter(partial, {g.name: g.shape for g in plan.tensors()}, dtype, shard_bytes)
            try:
                _stream(plan, reader, writer, dtype, progress)
            finally:
                writer.close()
            _write_companions(plan, folder, partial, dtype, base_model=display_name(src))
            record = provenance(
                plan,
                source_name=display_name(src),
                revision=revision,
                source=folder,
                files=reader.files,
                dtype=dtype,
                command=command_line(plan, src, dst_config, out, dtype, revision),
                seconds=time.perf_counter() - started,
            )
            (partial / "phigrow.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            if overwrite:
                _remove(out)
            partial.rename(out)
        except BaseException as error:
            _remove(partial)
            if isinstance(error, OSError):
                raise GrowthError("the output cannot be written", where=str(out), why=str(error)) from error
            raise
    return out


def expand_model(
    model: PreTrainedModel,
    dst_config: str | Path | Config,
    *,
    method: str = "tile",
    depth: str | None = None,
    rounding: str = "half-even",
    seed: int = 0,
    noise: float = 0.0,
    dtype: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Grow a live transformers model into a new one on the CPU, by the same lift as `expand`, bit for bit.

    Args:
        model: the source model; it is not changed.
        dst_config: destination configuration: a file, a shipped name or a dictionary.
        method, depth, rounding, seed, noise, options: as in `phigrow.plan`.
        dtype: of the new model; by default the source's.

    Returns:
        The new model, in evaluation mode, with the source's attention implementation.

    Raises:
        GrowthError: what a plan refuses, or a model whose tensors do not fit its configuration.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = model.config.to_dict()
    plan = make_plan(config, dst_config, method, depth=depth, rounding=rounding, seed=seed, noise=noise, **options)
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    present = set(plan.table.state_shapes(config))
    tied = {"lm_head.weight"} - present
    plan.table.check_tensors(
        config, {name: tuple(t.shape) for name, t in state.items() if name not in tied}, where="the live model"
    )
    torch_dtype = getattr(torch, check_dtype(dtype)) if dtype else model.dtype
    grown = {g.name: Lift(g, InMemory(state[g.source]), plan, torch_dtype).all() for g in plan.tensors()}
    settings = {k: v for k, v in plan.dst_config.items() if k not in ("torch_dtype", "dtype", "auto_map")}
    new_config = AutoConfig.for_model(**settings)
    with init_empty_weights(include_buffers=False):
        new = AutoModelForCausalLM.from_config(
            new_config, dtype=torch_dtype, attn_implementation=model.config._attn_implementation
        )
    new.load_state_dict(grown, strict=not tied, assign=True)
    new.tie_weights()
    return new.eval()


def preview(
    src: str | Path, dst_config: str | Path | Config, *, dtype: str | None = None, **shape: Any
) -> tuple[Plan, int, str]:
    """Everything that `expand` checks, without writing: the plan, the bytes of weights, and their dtype.

    Raises:
        GrowthError: whatever `expand` would refuse.
    """
    plan = make_plan(src, dst_config, **shape)
    with CheckpointReader(locate(src, shape.get("revision"))) as reader:
        check_source(plan, reader)
        dtype = resolve_dtype(dtype, reader)
    return plan, sum(math.prod(g.shape) for g in plan.tensors()) * ITEM_BYTES[dtype], dtype


def default_out(src: str | Path, dst_config: str | Path | Config, method: str) -> Path:
    """Where `expand` writes when it is not told: ``phi-1_5-to-phi2-tile`` in the current folder."""
    name = display_name(src).split("/")[-1]
    if isinstance(dst_config, dict):
        target = "grown"
    else:
        path = Path(dst_config)
        target = path.stem if path.name != "config.json" else path.absolute().parent.name
    return Path(f"{name}-to-{target}-{method}")


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB``, ``500MB`` or ``2GiB``.

    Raises:
        GrowthError: not a size.
    """
    upper = text.strip().upper()
    unit = next((unit for unit in sorted(_UNITS, key=len, reverse=True) if upper.endswith(unit)), "")
    try:
        size = int(float(upper.removesuffix(unit)) * _UNITS.get(unit, 1))
    except ValueError:
        size = 0
    if size <= 0:
        raise GrowthError(f"shard size {text!r} is no size", fix="write it as 5GB, 500MB or 2GiB")
    return size


def check_dtype(dtype: str) -> str:
    """The dtype's name, if weights can have it.

    Raises:
        GrowthError: they cannot.
    """
    if dtype not in DTYPES.values():
        raise GrowthError(f"dtype {dtype!r} is unknown", fix=f"choose one of {', '.join(DTYPES.values())}")
    return dtype


def resolve_dtype(dtype: str | None, reader: CheckpointReader) -> str:
    """The output dtype: as asked for, else that of the source's largest tensor."""
    if dtype is not None:
        return check_dtype(dtype)
    largest = max(reader.tensors.values(), key=lambda tensor: tensor.shape)
    return largest.dtype_name


def check_source(plan: Plan, reader: CheckpointReader) -> None:
    """Hold the source's tensors against the family table.

    Raises:
        GrowthError: missing or extra tensors, or a shape that is not the configuration's.
    """
    shapes = reader.shapes
    if plan.src_config.get("tie_word_embeddings"):
        shapes.pop("lm_head.weight", None)  # some writers store the tied tensor under both names
    plan.table.check_tensors(plan.src_config, shapes, where=str(reader.folder))


def _stream(plan: Plan, reader: CheckpointReader, writer: CheckpointWriter, dtype: str, progress: bool) -> None:
    import torch

    lifts = [Lift(g, reader.tensors[g.source], plan, getattr(torch, dtype)) for g in plan.tensors()]
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            jobs = [pool.submit(_block, writer, each, *rows) for each in lifts for rows in _blocks(each.growth.shape)]
            bar = _progress_bar(f"{plan.method}: writing {writer.total_bytes / 1e9:.2f} GB", len(jobs), progress)
            with bar as advance:
                for job in jobs:
                    job.add_done_callback(advance)
                wait(jobs, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
    for job in jobs:
        if not job.cancelled():
            job.result()


def _block(writer: CheckpointWriter, lift: Lift, start: int, stop: int) -> None:
    import torch

    lift.prepare()
    values = lift.rows(start, stop)
    if lift.dtype is torch.float16 and not bool(torch.isfinite(values).all()):
        raise GrowthError(
            "values that do not fit float16",
            where=lift.growth.name,
            why="its largest finite value is 65504",
            fix="use --dtype bfloat16 or float32",
        )
    writer.write(lift.growth.name, start, values)


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    if len(shape) == 1:
        yield 0, shape[0]
        return
    step = span_rows(shape)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


class _progress_bar:
    """A rich progress bar whose ``with`` gives a callback that advances it, or a silent one."""

    def __init__(self, description: str, total: int, shown: bool) -> None:
        self.description, self.total, self.shown = description, total, shown

    def __enter__(self) -> Any:
        if not self.shown:
            return lambda _: None
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))
        self._bar.start()
        task = self._bar.add_task(self.description, total=self.total)
        return lambda _: self._bar.advance(task)

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self._bar.stop()


def _write_companions(plan: Plan, source: Path, folder: Path, dtype: str, base_model: str) -> None:
    config = {key: value for key, value in plan.dst_config.items() if key != "auto_map"}
    config["architectures"] = config.get("architectures") or [plan.table.architecture]
    # The spelling that is there is kept; both versions of transformers read the older one.
    config["dtype" if "dtype" in config and "torch_dtype" not in config else "torch_dtype"] = dtype
    generation_file = source / "generation_config.json"
    generation = load_config(generation_file) if generation_file.is_file() else {}
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
    for name, content in (("config.json", config), ("generation_config.json", {**generation, **ids})):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    (folder / "README.md").write_text(model_card(plan, base_model, dtype), encoding="utf-8")


def _remove(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    elif folder.exists() or folder.is_symlink():
        folder.unlink()
