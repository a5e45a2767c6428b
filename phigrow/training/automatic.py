"""Choose the settings that a run leaves to the hardware (``auto``): data type and compilation.

A choice is made once and stored in the ``run`` record. A run that resumes or branches keeps it, on any machine. A study
and a recipe of stages choose once for all of their runs.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.models.config import Config
from phigrow.models.cost import count_cost
from phigrow.records.readers.phigrow import first_record
from phigrow.training.configuration import RunConfig
from phigrow.training.settings import AUTO

if TYPE_CHECKING:
    import torch

    from phigrow.training.process import World

PASS_FLOPS = 1e8
"""Most FLOPs of one timed pass: 50 ms on a core that emulates bf16."""

ROUNDS, SECONDS = 9, 0.4
"""Most timed passes of each data type, and the seconds after which no further pass begins."""

LARGEST_SIDE = 1024
"""Most rows and columns of a timed matrix. In larger ones the ratio of two data types no longer depends on the size."""

COMPILE_SECONDS = 60.0
"""Assumed seconds of one compilation."""

COMPILE_SAVES = 0.3
"""Largest assumed saving of compilation, as a part of the training time. If it does not pay, nothing is timed."""

PASS_TOKENS = 4096
"""Tokens of a pass that is timed both plain and compiled. A pass has at least one block."""


@dataclass(frozen=True)
class Choice:
    """A setting that was ``auto``.

    Attributes:
        chosen: the value that takes effect.
        reason: the reason as one clause, for printing.
        seconds: seconds of one timed pass, for each variant that was timed.
    """

    chosen: str | bool
    reason: str
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Return the choice as an entry of a record."""
        return {"asked": AUTO, **dataclasses.asdict(self)}


Choices = dict[str, dict[str, Any]]
"""The recorded choices of a run or a study, by the name of the setting."""


def choose(config: RunConfig, world: World, out: Path, model: Callable[[], Config], seq_len: int) -> RunConfig:
    """Return the settings with values in place of ``auto``, and with the reasons in ``auto_choices``.

    Rank 0 chooses for all ranks. A recorded value of the run or its trunk comes first, then a choice that was made for
    the whole study, then the hardware.

    Args:
        config: the settings as asked.
        world: the ranks.
        out: folder of the run.
        model: makes the configuration of the model.
        seq_len: tokens per block.

    Raises:
        GrowthError: the records or the DeepSpeed file cannot be read.
    """
    from phigrow.training.process import on_rank_zero

    asked = [name for name in ("dtype", "compile") if getattr(config, name) == AUTO]
    if not asked:
        return dataclasses.replace(config, auto_choices=None)

    def decide() -> Choices:
        kept = recorded_choices(out, Path(config.branch_from) if config.branch_from else None)
        chosen: Choices = {name: choice for name, choice in kept.items() if name in asked}
        chosen = {name: c for name, c in (config.auto_choices or {}).items() if name in asked} | chosen
        if missing := [name for name in asked if name not in chosen]:
            flops = config.steps * config.batch * seq_len * count_cost(model(), seq_len).training_flops / world.size
            chosen |= choices_of(missing, config, model(), seq_len, world.device, flops)
        return {name: chosen[name] for name in asked}

    chosen = on_rank_zero(world, decide, patient=True)  # a compilation is timed where training is long
    values = {name: choice["chosen"] for name, choice in chosen.items()}
    return dataclasses.replace(config, **values, auto_choices=chosen)


def choices_of(
    names: list[str],
    config: RunConfig,
    model: Config,
    seq_len: int,
    device: torch.device,
    flops: float,
    models: int = 1,
) -> Choices:
    """Choose values for settings by the hardware.

    Args:
        names: settings to choose, out of ``dtype`` and ``compile``.
        config: the settings as asked.
        model: the model's configuration.
        seq_len: tokens per block.
        device: the device of the run.
        flops: FLOPs on one rank of all training that shares these compilations.
        models: number of compilations.
    """
    out: Choices = {}
    dtype: str = config.dtype
    seconds: dict[str, float] = {}
    if "dtype" in names:
        choice = choose_dtype(config, model, seq_len, device)
        out["dtype"], dtype, seconds = choice.record(), str(choice.chosen), choice.seconds
    if "compile" in names:
        if device.type == "cpu" and dtype not in seconds:
            seconds = time_passes(model, seq_len, (dtype,))
        rate = pass_flops(model, seq_len) / seconds[dtype] if dtype in seconds else math.inf
        probe = functools.partial(time_compiled, model, seq_len, dtype)
        out["compile"] = choose_compile(config, device, flops / rate, models, probe).record()
    return out


def choose_dtype(config: RunConfig, model: Config, seq_len: int, device: torch.device) -> Choice:
    """Choose the data type of a run: the DeepSpeed file's, else the best of the GPU, else the faster one on this CPU.

    fp16 needs a loss scale, which DeepSpeed applies at ZeRO 1 to 3 only. A run at ZeRO 0 gets fp32 instead.
    """
    file = config.deepspeed_file()
    for name in ("bf16", "fp16"):
        if file.get(name, {}).get("enabled") is True:
            return Choice(name, "as in the DeepSpeed file")
    off = [name for name in ("bf16", "fp16") if file.get(name, {}).get("enabled") is False]
    if device.type == "cpu":
        if "bf16" in off:
            return Choice("fp32", "bf16 is off in the DeepSpeed file")
        seconds = time_passes(model, seq_len, ("bf16", "fp32"))
        times = " and ".join(f"{name} {1000 * value:.3g} ms" for name, value in seconds.items())
        return Choice(min(seconds, key=lambda name: seconds[name]), f"the faster in a timing: {times} a pass", seconds)
    if "bf16" not in off and has_bf16():
        return Choice("bf16", "the device computes in bf16")
    if "fp16" not in off and config.stage > 0:
        return Choice("fp16", "the device has no bf16")
    return Choice("fp32", "the device has no bf16, and fp16 requires ZeRO stage 1, 2 or 3")


def choose_compile(
    config: RunConfig, device: torch.device, seconds: float, models: int, probe: Callable[[], dict[str, float]]
) -> Choice:
    """Choose compilation on a CPU if it saves more time than the compilations cost.

    The saving depends on the CPU, so it is timed, but only if the training is long enough to pay for the timing.

    Args:
        config: the settings as asked.
        device: the device of the run.
        seconds: estimated training time without compilation.
        models: number of compilations.
        probe: times a pass, ``plain`` and ``compiled``.
    """
    if device.type != "cpu":
        return Choice(False, "auto compiles on CPUs only")
    if config.stage == 3:
        return Choice(False, "compile requires ZeRO stage 0, 1 or 2")
    if not (shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")):
        return Choice(False, "there is no C++ compiler")
    cost = COMPILE_SECONDS * models
    if COMPILE_SAVES * seconds <= cost:
        return Choice(False, f"training of about {seconds:.0f} s is too short for {cost:.0f} s of compilation")
    timed = probe()
    share = 1 - timed["compiled"] / timed["plain"]
    times = " and ".join(f"{name} {1000 * value:.3g} ms" for name, value in timed.items())
    reason = f"a timing, {times} a pass; about {share * seconds:.0f} s saved and {cost:.0f} s of compilation expected"
    return Choice(share * seconds > cost, reason, timed)


def recorded_choices(out: Path, trunk: Path | None = None) -> Choices:
    """Return the recorded ``dtype`` and ``compile`` of a run; a run without records has those of its trunk."""
    for folder in (out, trunk):
        record = first_record(folder) if folder is not None else None
        if record is None or not isinstance(record.get("config"), dict):
            continue
        known = record.get("auto_choices") or {}
        return {
            name: known.get(name) or Choice(value, "as in the records of this run").record()
            for name in ("dtype", "compile")
            if (value := record["config"].get(name)) not in (None, AUTO)
        }
    return {}


def choice_lines(choices: Choices | None) -> list[str]:
    """Return one line for printing about each choice."""
    return [
        f"{name}: {json.dumps(c['chosen']).strip(chr(34))} chosen ({c['reason']})"
        for name, c in (choices or {}).items()
    ]


def time_passes(model: Config, seq_len: int, dtypes: tuple[str, ...]) -> dict[str, float]:
    """Return the seconds of a forward and backward pass of one layer and the output layer, on this CPU.

    The result is the shortest of several passes, and the data types take turns. So other work on the machine has little
    influence. The timing takes about half a second.
    """
    return _shortest({name: _layer_pass(model, seq_len, name) for name in dtypes}, ROUNDS, SECONDS)


def time_compiled(model: Config, seq_len: int, dtype: str) -> dict[str, float]:
    """Return the seconds of a training pass of the model with one layer, ``plain`` and ``compiled``, on this CPU.

    Compiling one layer takes ten to thirty seconds.
    """
    import torch

    from phigrow.training.compilation import compile_training
    from phigrow.training.model import DTYPES, build_model
    from phigrow.training.process import World

    one_layer = model | {"num_hidden_layers": 1}
    config = RunConfig(model=one_layer, zero=0, dtype=dtype)
    alone = World(0, 1, 0, 1, torch.device("cpu"))
    rows = max(1, PASS_TOKENS // seq_len)
    random = torch.Generator().manual_seed(0)
    blocks = torch.randint(model["vocab_size"], (rows, seq_len + 1), generator=random)

    def make(compiled: bool) -> Callable[[], None]:
        network = build_model(config, one_layer, alone, "sdpa", {}).to(DTYPES[dtype])
        if compiled:
            compile_training(network, plain_positions=True)

        def run() -> None:
            network.zero_grad()
            network(blocks).backward()

        return run

    with torch.random.fork_rng(devices=[]):
        return _shortest({"plain": make(False), "compiled": make(True)}, 3 * ROUNDS, 10 * SECONDS)


def _shortest(passes: dict[str, Callable[[], None]], rounds: int, seconds: float) -> dict[str, float]:
    """Return the shortest time of each pass; they take turns until the limit of rounds or of seconds is reached."""
    for run in passes.values():
        run()  # not timed: PyTorch chooses and prepares its kernels
    best = dict.fromkeys(passes, math.inf)
    began = time.perf_counter()
    for _ in range(rounds):
        for name, run in passes.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
        if time.perf_counter() - began > seconds:
            break
    return best


def pass_flops(model: Config, seq_len: int) -> float:
    """Return the FLOPs of the matrix products of a timed pass."""
    matrices, tokens = timed_shapes(model, seq_len)
    return 6.0 * tokens * sum(rows * columns for rows, columns in matrices)


def timed_shapes(model: Config, seq_len: int) -> tuple[list[tuple[int, int]], int]:
    """Return the matrices of one layer and the output layer, no side above `LARGEST_SIDE`, and the tokens of a pass."""
    from phigrow.models.families import family_of

    family = family_of(model, "the model's configuration")
    sizes = family.sizes_of(model)
    shapes = [p.shape(sizes) for p in family.parameters if p.in_layer]
    shapes.append((sizes["vocab"], sizes[family.final] if family.final in sizes else shapes[0][-1]))
    cut = [(min(s[0], LARGEST_SIDE), min(s[1], LARGEST_SIDE)) for s in shapes if len(s) == 2]
    tokens = int(PASS_FLOPS / (6 * sum(rows * columns for rows, columns in cut)))
    tokens = max(16, min(tokens, 4096))
    return cut, tokens - tokens % seq_len if tokens > seq_len else tokens


def _layer_pass(model: Config, seq_len: int, dtype: str) -> Callable[[], None]:
    """Return a function that makes one pass: normalisations, matrix products, GELU, attention and a loss."""
    import torch
    from torch.nn import functional as F

    from phigrow.training.attention import attention_by_products, by_products_is_faster
    from phigrow.training.model import DTYPES

    matrices, tokens = timed_shapes(model, seq_len)
    kind = DTYPES[dtype]
    random = torch.Generator().manual_seed(0)
    weights = [(torch.randn(s, generator=random) / s[1] ** 0.5).to(kind).requires_grad_() for s in matrices]
    inputs = [torch.randn(tokens, s[1], generator=random).to(kind).requires_grad_() for s in matrices]
    length = min(seq_len, tokens)
    heads = torch.randn(3, tokens // length, 4, length, 16, generator=random).to(kind).requires_grad_()

    def run() -> None:
        losses = [
            F.gelu(F.linear(F.layer_norm(x, x.shape[1:]), w), approximate="tanh").float().square().mean()
            for x, w in zip(inputs, weights, strict=True)
        ]
        query, key, value = heads
        if by_products_is_faster(query, key, 0.0):
            attended = attention_by_products(query, key, value, 0.25)
        else:
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        losses.append(attended.float().square().mean())
        torch.autograd.grad(torch.stack(losses).sum(), [*weights, *inputs, heads])

    return run


def has_bf16() -> bool:
    """Return true if the accelerator computes in bf16 itself, without emulation."""
    import torch
    from deepspeed.accelerator import get_accelerator

    if torch.cuda.is_available():  # by default PyTorch counts emulation, too
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(get_accelerator().is_bf16_supported())
