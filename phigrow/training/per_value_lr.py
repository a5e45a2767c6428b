"""Separate learning rates for copied and for new values of a grown checkpoint. Off by default.

A grown model is part trained and part random. ``fresh_warmup`` warms the new values up by themselves, after which they
learn at ``fresh_lr`` times the schedule's rate; the copied ones learn at ``copied_lr`` times it (asymmetric re-warmup,
SPARKLING, arXiv:2602.02472). Most tensors hold both kinds, so this is done value by value: after AdamW's update of w
to v the weight is set to ``w + factor * (v - w)``, which is AdamW at ``factor`` times the learning rate, its decoupled
weight decay included. The moments see every gradient either way. This takes 4 bytes a value for w while AdamW steps,
and one bit a value for the mask; everything else is done in blocks.

The checkpoint's ``phigrow.json`` lists the copied values, so training needs no other knowledge of growth.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.checkpoints.provenance import PROVENANCE_FILE, read_provenance
from phigrow.errors import GrowthError
from phigrow.training.configuration import RunConfig
from phigrow.training.settings import SCRATCH

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer


BLOCK = 1 << 22
"""Values that are scaled at once, a multiple of 8. The temporary tensors of a block take about 50 MB."""


class PerValueLR:
    """Hooks on an optimizer that scale its updates, value by value.

    While both factors are 1, the hooks do nothing and hold no memory.

    Attributes:
        step: number of the present step, from 0; `Stepper` sets it.
        copied: share of copies among the values of this rank.
    """

    def __init__(self, optimizer: Optimizer, masks: dict[int, Tensor], config: RunConfig) -> None:
        self.step, self._config = 0, config
        self._bits = {key: packed(mask) for key, mask in masks.items()}
        self._former: dict[int, Tensor] = {}
        self.copied = sum(int(mask.sum()) for mask in masks.values()) / max(1, sum(m.numel() for m in masks.values()))
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def factors(self) -> tuple[float, float]:
        """Return the factors of the updates of copied and of fresh values at this step."""
        warmup = self._config.fresh_warmup
        risen = min(1.0, self.step / warmup) if warmup else 1.0
        return self._config.copied_lr, self._config.fresh_lr * risen

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        if self.factors() != (1.0, 1.0):
            self._former = {id(p): p.detach().clone() for p in _stepped(optimizer)}

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        import torch

        if not self._former:
            return
        copied, fresh = self.factors()
        for parameter in _stepped(optimizer):
            former, bits = self._former.pop(id(parameter)).view(-1), on_device(self._bits, parameter)
            values = parameter.detach().view(-1)
            for start in range(0, len(values), BLOCK):
                now = values[start : start + BLOCK]
                mask = unpacked(bits[start // 8 : start // 8 + -(-len(now) // 8)], len(now))
                factor = torch.where(mask, copied, fresh).to(former.dtype)
                torch.lerp(former[start : start + BLOCK], now, factor, out=now)


def on_device(masks: dict[int, Tensor], parameter: Tensor) -> Tensor:
    """Return the mask of a parameter on its device; a model may move to a GPU after the hooks were attached."""
    mask = masks[id(parameter)]
    if mask.device != parameter.device:
        mask = masks[id(parameter)] = mask.to(parameter.device)
    return mask


def packed(mask: Tensor) -> Tensor:
    """Return a mask as bits, uint8 of an eighth of its values; `unpacked` is the inverse."""
    import torch

    flat = mask.flatten()
    bits = torch.empty(-(-len(flat) // 8), dtype=torch.uint8, device=mask.device)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    for start in range(0, len(flat), BLOCK):
        part = flat[start : start + BLOCK].to(torch.uint8)
        eights = torch.nn.functional.pad(part, (0, -len(part) % 8)).view(-1, 8)
        bits[start // 8 : start // 8 + len(eights)] = (eights * weights).sum(1, dtype=torch.uint8)
    return bits


def unpacked(bits: Tensor, count: int) -> Tensor:
    """Return the first ``count`` values of a mask, bool [count].

    >>> import torch
    >>> unpacked(packed(torch.tensor([True, False, True])), 3).tolist()
    [True, False, True]
    """
    import torch

    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> places) & 1).bool().view(-1)[:count]


def _stepped(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def has_per_value_lr(config: RunConfig) -> bool:
    """Return true if a run sets learning rates for copied or fresh values."""
    return bool(config.fresh_warmup) or (config.fresh_lr, config.copied_lr) != (1.0, 1.0)


def copied_values(config: RunConfig) -> dict[str, Any]:
    """Return the entry of the checkpoint's provenance that lists its copied values.

    Raises:
        GrowthError: the checkpoint was not grown, or does not record its copied values.
    """
    folder = Path(config.init)
    made = None if config.init == SCRATCH else read_provenance(folder)
    if made is None:
        raise GrowthError(
            "learning rates for copied and fresh values require a grown checkpoint",
            where="fresh_lr, fresh_warmup, copied_lr",
            why=f"there is no {PROVENANCE_FILE} in {config.init}"
            if config.init != SCRATCH
            else "the run starts from scratch",
            fix="leave these keys out, or start from a folder of 'phigrow expand'",
        )
    if made.copied is None:
        raise GrowthError(
            "the grown checkpoint does not record which values are copies",
            where=str(folder / PROVENANCE_FILE),
            why="an older version of phigrow wrote it",
            fix="expand again: the same plan gives the same weights",
        )
    return made.copied


def copied_mask(copies: dict[str, Any], name: str, shape: tuple[int, ...]) -> Tensor:
    """Return a mask of the copied values of a tensor, bool of its shape, from the result of `copied_values`.

    >>> copied_mask({"spans": {"h.{layer}.w": [[[0, 1]], [[1, 3]]]}, "fresh": []}, "h.7.w", (2, 3)).int().tolist()
    [[0, 1, 1], [0, 0, 0]]
    """
    import torch

    if name in copies["fresh"]:
        return torch.zeros(shape, dtype=torch.bool)
    line = re.sub(r"\.\d+\.", ".{layer}.", name, count=1)
    spans = copies["spans"].get(line, copies["spans"].get(name))
    if spans is None or len(spans) != len(shape):
        raise GrowthError(
            "the growth does not record which values of a parameter are copies",
            where=f"{name} in {PROVENANCE_FILE}",
            fix="expand again: the same plan gives the same weights",
        )
    out = torch.ones(shape, dtype=torch.bool)
    for axis, (size, ranges) in enumerate(zip(shape, spans, strict=True)):
        side = torch.zeros(size, dtype=torch.bool)
        for start, stop in ranges:
            side[start:stop] = True
        out &= side.view([-1 if k == axis else 1 for k in range(len(shape))])
    if blocks := copies.get("blocks", {}).get(line):
        row, column = (torch.arange(size) * blocks // size for size in shape)
        out &= row[:, None] == column
    return out


def make_per_value_lr(engine: Any, config: RunConfig) -> PerValueLR | None:
    """Attach the run's learning rates for copied and fresh values to the engine's optimizer; None without such rates.

    Args:
        engine: DeepSpeed's engine on every rank, with its checkpoint loaded.
        config: the run.

    Raises:
        GrowthError: as `copied_values`; or the masters are not in memory.
    """
    import torch

    if not has_per_value_lr(config):
        return None
    copies = copied_values(config)
    with torch.no_grad():
        return PerValueLR(engine.basic_optimizer, _masks(engine, copies), config)


def _masks(engine: Any, copies: dict[str, Any]) -> dict[int, Tensor]:
    """Return the masks of the tensors that AdamW steps, by identity: parameters, their masters, or flat masters.

    For flat masters, DeepSpeed's own functions write each mask in place of its weights. Then the weights are restored.
    """
    from phigrow.training import zero

    optimizer, masks = engine.optimizer, {}
    flats, masters = zero.flat_masters(optimizer), zero.plain_masters(optimizer)
    former = [flat.detach().clone() for flat in flats]
    for flat in flats:
        flat.zero_()
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        mask = copied_mask(copies, name, zero.full_shape(parameter))
        if flats:
            zero.write_master_part(parameter, mask.flatten())
        else:
            master = masters.get(id(parameter))
            masks[id(parameter if master is None else master)] = mask.to(parameter.device)
    for flat, values in zip(flats, former, strict=True):
        masks[id(flat)] = flat.detach() > 0.5
        flat.copy_(values)
    return masks
