"""Choose the attention of a run: by calling what is installed, and on a GPU by a short timing."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from phigrow.errors import GrowthError
from phigrow.models.config import Config
from phigrow.training.attention import FUNCTIONS
from phigrow.training.settings import AUTO

ROUNDS = 7
"""Timed passes of each implementation; the median counts."""

TIMED_TOKENS = 16_384
"""Most tokens of a timed pass; a pass has at least one block."""

MARGIN = 0.9
"""PyTorch's attention is chosen instead of flash-attn if it takes less than this share of the time."""

TOLERANCE = 0.05
"""Largest difference from fp32 attention in a trial. Its values are near 1, and bf16 rounds them by up to 0.004."""


@dataclass(frozen=True)
class Shape:
    """The attention of one layer and one micro-batch.

    Attributes:
        rows: blocks of a micro-batch.
        heads: query heads.
        kv_heads: key and value heads.
        tokens: tokens of a block.
        head_dim: size of a head.
        within: attention stays inside documents.
        dropout: attention has dropout.
    """

    rows: int
    heads: int
    kv_heads: int
    tokens: int
    head_dim: int
    within: bool = False
    dropout: bool = False


@dataclass(frozen=True)
class AttentionChoice:
    """The attention of a run.

    Attributes:
        name: ``flash_attention_2``, ``varlen``, ``sdpa`` or ``eager``.
        reason: one clause for printing, with the kernel.
        seconds: seconds of a forward and backward pass of one layer, for each implementation that was timed.
    """

    name: str
    reason: str
    seconds: Mapping[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Return the choice as a field of the run record."""
        return {"name": self.name, "reason": self.reason, "seconds": dict(self.seconds)}


def shape_of(model: Config, *, rows: int, tokens: int, within: bool) -> Shape:
    """Return the attention shape of a model's configuration."""
    heads = int(model["num_attention_heads"])
    return Shape(
        rows=rows,
        heads=heads,
        kv_heads=int(model.get("num_key_value_heads") or heads),
        tokens=tokens,
        head_dim=int(model.get("head_dim") or model["hidden_size"] // heads),
        within=within,
        dropout=float(model.get("attention_dropout") or 0.0) > 0,
    )


def choose_attention(
    asked: str, dtype: str, device: torch.device, shape: Shape, recorded: str | None = None
) -> AttentionChoice:
    """Choose the attention of a run.

    On a GPU ``auto`` tries flash-attn 2 and PyTorch's attention, and takes PyTorch's if it is clearly faster. An
    implementation counts as available if it computes the right values in a trial, because broken installations can be
    imported.

    Args:
        asked: the setting ``attention``.
        dtype: the setting ``dtype``, without ``auto``.
        device: the device of this rank.
        shape: the attention of one layer.
        recorded: what the run, or its trunk, recorded before; ``auto`` keeps it where it works.

    Raises:
        GrowthError: the run asks for an implementation that does not work here.
    """
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    if asked == "eager":
        return AttentionChoice(asked, "as asked")
    if asked != AUTO:
        if (problem := problem_of(asked, kind, device, shape)) is not None:
            raise GrowthError(
                f"attention {asked} does not work here",
                where=f"attention, device {device.type}, {dtype}, documents {'within' if shape.within else 'plain'}",
                why=problem,
                fix="install what is missing, or set attention: auto",
            )
        return AttentionChoice(asked, f"{kernel(asked, kind, device, shape)}, as asked")
    if recorded in FUNCTIONS and problem_of(recorded, kind, device, shape) is None:
        return AttentionChoice(recorded, f"{kernel(recorded, kind, device, shape)} (as in the records of this run)")
    if device.type != "cuda" or dtype == "fp32":
        return AttentionChoice("sdpa", f"{kernel('sdpa', kind, device, shape)} (device {device.type}, {dtype})")
    candidates = ("flash_attention_2", "varlen" if shape.within else "sdpa")
    problems = {name: problem_of(name, kind, device, shape) for name in candidates}
    usable = [name for name in candidates if problems[name] is None]
    failed = [f"{name}: {problem}" for name, problem in problems.items() if problem is not None]
    if not usable:
        return AttentionChoice("sdpa", f"{kernel('sdpa', kind, device, shape)} ({'; '.join(failed)})")
    seconds = {name: timed(name, kind, device, shape) for name in usable} if len(usable) > 1 else {}
    best = usable[0]
    if seconds:
        best = usable[1] if seconds[usable[1]] < MARGIN * seconds[usable[0]] else best
        failed = [
            f"a timing, PyTorch's if it takes less than {100 * MARGIN:.0f} %: "
            + ", ".join(f"{n} {1000 * s:.3g} ms" for n, s in seconds.items())
        ]
    return AttentionChoice(best, f"{kernel(best, kind, device, shape)} ({'; '.join(failed)})", seconds)


def check_flash_attention(dtype: str, device: torch.device) -> None:
    """Refuse flash-attn 2 where it does not work, at any shape.

    Args:
        dtype: the setting ``dtype``; ``auto`` is tried in bf16.
        device: the device of this rank.

    Raises:
        GrowthError: it is not installed, is broken, or does not run here.
    """
    choose_attention("flash_attention_2", "bf16" if dtype == AUTO else dtype, device, Shape(1, 1, 1, 32, 64))


def problem_of(name: str, dtype: torch.dtype, device: torch.device, shape: Shape) -> str | None:
    """Return the reason for which an implementation cannot serve a run, or None if it can.

    Two short rows are computed forward and backward, and compared with attention in fp32.
    """
    if name == "varlen" and not shape.within:
        return "it is for documents: within; plain blocks have sdpa"
    if name == "varlen" and shape.dropout:
        return "it has no dropout"
    if name == "sdpa":
        return None
    return _trial(name, dtype, device, shape.heads // shape.kv_heads, shape.head_dim, shape.within)


@functools.cache
def _trial(name: str, dtype: torch.dtype, device: torch.device, group: int, head_dim: int, within: bool) -> str | None:
    shape = Shape(2, 2 * group, 2, 32, head_dim, within)
    try:
        query, key, value = (x.requires_grad_() for x in random_inputs(shape, dtype, device))
        found = attend(name, (query, key, value), shape)
        gradients = torch.autograd.grad(found.float().square().sum(), (query, key, value))
        wide = [x.detach().float().requires_grad_() for x in (query, key, value)]
        expected = attend("sdpa", wide, shape)
        others = torch.autograd.grad(expected.square().sum(), wide)
        pairs = [(found.detach(), expected.detach()), *zip(gradients, others, strict=True)]
        off = max(float((one.float() - other).abs().max() / other.abs().max()) for one, other in pairs)
    except Exception as error:  # whatever a broken installation raises
        text = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {text[0][:200]}"
    return None if off < TOLERANCE else f"its values are off by {off:.2g} in a trial"


def forget_trials() -> None:
    """Try and time every implementation anew; results are otherwise kept for the life of the process. For tests."""
    _trial.cache_clear()
    _timed.cache_clear()


def timed(name: str, dtype: torch.dtype, device: torch.device, shape: Shape) -> float:
    """Return the median seconds of a forward and backward pass of one layer, after passes that do not count."""
    rows = min(shape.rows, max(1, TIMED_TOKENS // shape.tokens))
    return _timed(name, dtype, device, Shape(**{**vars(shape), "rows": rows}))


@functools.cache
def _timed(name: str, dtype: torch.dtype, device: torch.device, shape: Shape) -> float:
    inputs = [x.requires_grad_() for x in random_inputs(shape, dtype, device)]
    seconds = []
    for _ in range(3 + ROUNDS):
        _wait(device)
        began = time.perf_counter()
        torch.autograd.grad(attend(name, inputs, shape).float().sum(), inputs)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[3:])


def random_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return random queries, keys and values, heads first."""
    random = torch.Generator().manual_seed(0)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    return [
        torch.randn(shape.rows, number, shape.tokens, shape.head_dim, generator=random).to(device, dtype)
        for number in heads
    ]


def attend(name: str, inputs: Sequence[Tensor], shape: Shape) -> Tensor:
    """Attend as in a run, ``[rows, tokens, heads, head_dim]``; with ``within`` each row is two documents.

    Args:
        name: ``flash_attention_2``, ``varlen`` or ``sdpa``.
        inputs: queries, keys and values, as `random_inputs` returns them.
        shape: their sizes.
    """
    function: Any = FUNCTIONS[name]
    scale = shape.head_dim**-0.5
    if not shape.within:
        whole: Tensor = function(None, *inputs, None, scaling=scale)[0]
        return whole
    half = shape.tokens // 2
    if name == "sdpa":
        parts = [
            function(None, *(x[:, :, part] for x in inputs), None, scaling=scale)[0]
            for part in (slice(0, half), slice(half, None))
        ]
        return torch.cat(parts, dim=1)
    lengths = [half, shape.tokens - half] * shape.rows
    borders = torch.tensor([0, *lengths], device=inputs[0].device).cumsum(0).to(torch.int32)
    row = [x.transpose(0, 1).flatten(1, 2)[None] for x in inputs]
    out: Tensor = function(None, *row, None, scaling=scale, cu_seq_lens_q=borders, max_length_q=max(lengths))[0]
    return out.view(shape.rows, shape.tokens, shape.heads, shape.head_dim)


def kernel(name: str, dtype: torch.dtype, device: torch.device, shape: Shape) -> str:
    """Return the implementation and its kernel in words; PyTorch chooses among its kernels by shape and data type."""
    if name == "flash_attention_2":
        return "flash-attn 2"
    if name == "varlen":
        return "PyTorch's attention over document lengths"
    if device.type == "cpu":
        products = "matrix products in blocks of up to 512 tokens, else " if dtype == torch.bfloat16 else ""
        return f"PyTorch SDPA, {products}flash or math kernel"
    choice: Any = getattr(torch, "_fused_sdp_choice", None)
    if choice is None or shape.within:  # a mask excludes the flash kernel
        return "PyTorch SDPA with a mask" if shape.within else "PyTorch SDPA"
    from torch.nn.attention import SDPBackend

    query, key, value = random_inputs(Shape(**{**vars(shape), "rows": 1}), dtype, device)
    found: Any = SDPBackend
    chosen = found(choice(query, key, value, is_causal=True, enable_gqa=shape.heads != shape.kv_heads)).name
    return f"PyTorch SDPA, {chosen.lower().replace('_', ' ').removesuffix(' attention')} kernel"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
