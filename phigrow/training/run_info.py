"""Description of a run: the opening lines, and the ``run`` record."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from phigrow.corpus.blocks import DataSource
from phigrow.corpus.feed import Feed
from phigrow.corpus.fingerprint import data_fingerprint
from phigrow.models.config import Config
from phigrow.models.cost import count_cost
from phigrow.training.automatic import choice_lines
from phigrow.training.configuration import RunConfig, comparison_keys
from phigrow.training.data import data_line
from phigrow.training.initial_state import InitialState
from phigrow.training.process import World
from phigrow.training.resolved import ResolvedRun
from phigrow.training.settings import SCRATCH
from phigrow.training.teacher import TeacherInfo
from phigrow.training.training_cost import InitSource

PACKAGES = ("phigrow", "torch", "transformers", "deepspeed", "datasets", "numpy")


def run_record(
    run: ResolvedRun,
    source: InitSource,
    model_dict: Config,
    blocks: DataSource,
    feed: Feed,
    teacher: TeacherInfo | None = None,
) -> dict[str, Any]:
    """Return the content of the ``run`` record; docs/measuring.md describes its fields."""
    config, world = run.config, run.world
    cost = count_cost(model_dict, blocks.seq_len)
    tokens, flops, seconds = source.cost.values()
    return {
        "arm": source.arm,
        "seed": config.seed,
        "config": _settings(config) | {"zero": run.stage, "seq_len": blocks.seq_len},
        **({"auto_choices": config.auto_choices} if config.auto_choices else {}),
        "attention": run.attention.record(),
        "compare": comparison_keys(),
        **({"trunk": config.trunk, "budget": None if config.is_trunk else config.steps} if config.trunk else {}),
        "model": model_dict,
        "parameters": cost.parameters,
        "non_embedding_parameters": cost.non_embedding_parameters,
        "flops_per_token": cost.training_flops,
        "seq_len": blocks.seq_len,
        **({"teacher": teacher.record()} if teacher else {}),
        "growth": source.growth,
        "source_tokens": tokens,
        "source_flops": flops,
        "source_seconds": seconds,
        "expand_seconds": source.expand_seconds,
        **(
            {"expand_tokens": source.expand_tokens, "expand_flops": source.expand_flops} if source.expand_tokens else {}
        ),
        **({"study": config.study} if config.study is not None else {}),
        **blocks.describe(),
        **({"content_fingerprint": content} if (content := data_fingerprint(blocks)) else {}),
        "world_size": world.size,
        "device": device_name(world),
        "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "commit": _commit(),
    }


def _settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings for the ``run`` record, without ``auto_choices``."""
    settings = config.as_dict()
    del settings["auto_choices"]  # a field of its own
    return settings


def opening(
    run: ResolvedRun,
    source: InitSource,
    model_dict: Config,
    blocks: DataSource,
    feed: Feed,
    initial: InitialState,
    teacher: TeacherInfo | None = None,
) -> str:
    """Return the lines that describe a run before its first step."""
    from phigrow.training.loss import chosen_path

    config, world = run.config, run.world
    cost = count_cost(model_dict, blocks.seq_len)
    tokens = config.steps * run.step_tokens
    start = "from scratch" if config.init == SCRATCH else f"from {config.init}"
    if source.growth:
        start += f" (grown by {source.growth.get('method')})"
    gradients = "bf16" if config.dtype == "bf16" and run.stage == 0 else "fp32"
    loss = chosen_path(config.loss, run.micro_batch * blocks.seq_len, model_dict["vocab_size"])
    read = feed.epochs(config.steps) or {}
    epochs = f" ({read['all']:.2f} epochs)" if "all" in read else ""
    kept = ", kept within documents" if config.documents == "within" else ""
    lines = [
        f"{model_dict.get('model_type')} of {cost.parameters / 1e6:,.1f}M parameters, {start}, into {run.out}",
        *goes_on(config, initial),
        data_line(config, blocks, feed),
        f"training: {config.steps} steps of {config.batch} sequences, {tokens / 1e6:,.2f}M tokens{epochs}, "
        f"{tokens * cost.training_flops:.2e} FLOPs",
        f"ranks: {world.size} on {device_name(world)}; micro-batch {run.micro_batch}, accumulation {run.accumulation}",
        f"engine: DeepSpeed ZeRO {run.stage}, {config.dtype} weights, {gradients} gradients"
        f"{f', summed over ranks in {config.reduce_dtype}' if world.size > 1 else ''}, fp32 masters",
        f"attention: {run.attention.reason}{kept}; loss: {loss}",
        *teacher_lines(teacher, run),
        *choice_lines(config.auto_choices),
    ]
    return "\n".join(lines)


def teacher_lines(teacher: TeacherInfo | None, run: ResolvedRun) -> list[str]:
    """Return the line that describes a run's teacher."""
    if teacher is None:
        return []
    flops = teacher.flops(teacher.steps, run.step_tokens)
    return [
        f"teacher: {run.config.teacher}, in the first {teacher.steps} steps, {teacher.weight:g} of the loss; "
        f"{flops:.2e} further FLOPs"
    ]


def goes_on(config: RunConfig, initial: InitialState) -> list[str]:
    """Return the line about the optimizer state, data position and schedule that a run takes from an earlier one."""
    parts, first = [], config.schedule_start or 0
    if initial.optimizer is not None and initial.state == "reset":
        parts.append(f"fp32 masters of {initial.optimizer} (step {initial.step}), Adam's moments at zero")
    elif initial.optimizer is not None:
        parts.append(f"Adam's state of {initial.optimizer} (step {initial.step}, {initial.state})")
    if parts or initial.first:
        parts.append(f"data from block {initial.first * config.batch}")
    if parts or first:
        parts.append(f"schedule from step {first} of {config.whole_schedule}")
    return [f"continues from: {', '.join(parts)}"] if parts else []


def device_name(world: World) -> str:
    """Return the name of the ranks' device; for a CPU with the number of threads per rank."""
    import torch

    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    return f"{_cpu()} ({torch.get_num_threads()} threads a rank)"


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the checkout that phigrow runs from, with ``-dirty`` if it was changed; else None."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
