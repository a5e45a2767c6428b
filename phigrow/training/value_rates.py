"""Learning rates for copied and new values of a grown model, with any torch optimizer in any training loop.

`fresh_lr` and `freeze_copied` attach hooks to an optimizer. The loop stays as it is. ``phigrow pretrain`` has the same
arithmetic as settings (`phigrow.training.per_value_lr`).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.errors import GrowthError
from phigrow.files.paths import user_path
from phigrow.training.configuration import RunConfig
from phigrow.training.per_value_lr import PerValueLR, copied_mask, copied_values, on_device

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel and torch.compile add to names of parameters."""


class FreshLR(PerValueLR):
    """Hooks on an optimizer that train copied and new values at rates of their own, and count its updates.

    Attributes:
        step: number of updates so far. Set it after a resumption if there is a warm-up, which counts from it.
        copied: share of copies among the values that the optimizer trains.
    """

    _removed = False

    def factors(self) -> tuple[float, float]:
        """Return the factors of the updates of copied and of new values at this step."""
        return (1.0, 1.0) if self._removed else super().factors()

    def remove(self) -> None:
        """Train all values alike from the next update on."""
        self._removed = True

    def _after(self, optimizer: Optimizer, *arguments: Any) -> None:
        super()._after(optimizer, *arguments)
        self.step += 1


class FrozenCopies:
    """Hooks on an optimizer that keep copied values, and gradients of parameters that set theirs to zero.

    Attributes:
        copied: share of copies among the values that the optimizer was built for.
    """

    def __init__(self, optimizer: Optimizer, masks: dict[int, Tensor]) -> None:
        self.copied = _share(masks)
        self._mixed: list[Tensor] = []
        self._masks: dict[int, Tensor] = {}
        self._former: list[Tensor] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        for parameter in _parameters(optimizer):
            mask = masks[id(parameter)]
            if mask.all():
                parameter.requires_grad_(False)
                parameter.grad = None
            elif mask.any():
                self._mixed.append(parameter)
                self._masks[id(parameter)] = mask
                register: Any = parameter.register_hook  # it has no types
                self._handles.append(register(partial(self._without, parameter)))

    def remove(self) -> None:
        """Remove the hooks. Parameters without new values stay without gradients."""
        for handle in self._handles:
            handle.remove()

    def _before(self, *_: Any) -> None:
        self._former = [each.detach()[on_device(self._masks, each)] for each in self._mixed]

    def _after(self, *_: Any) -> None:
        for parameter, values in zip(self._mixed, self._former, strict=True):
            parameter.detach()[on_device(self._masks, parameter)] = values
        self._former = []

    def _without(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        return gradient.masked_fill(on_device(self._masks, parameter), 0)


def _share(masks: dict[int, Tensor]) -> float:
    return sum(int(mask.sum()) for mask in masks.values()) / max(1, sum(mask.numel() for mask in masks.values()))


def fresh_lr(
    optimizer: Optimizer,
    model: nn.Module,
    grown_folder: str | Path,
    factor: float = 2.0,
    *,
    copied: float = 1.0,
    warmup: int = 0,
) -> FreshLR:
    """Train the new values of a grown model at another learning rate than its copied values.

    Most tensors of a grown model hold both kinds, so this is done value by value: after the optimizer's update of w to
    v, the weight becomes ``w + factor * (v - w)``. For SGD, AdamW and every optimizer whose update is proportional to
    its learning rate, this equals ``factor`` times the rate, decoupled weight decay included.

    Call it after the optimizer was built, and before or after ``accelerator.prepare``. The parameters must be whole:
    sharded ones (FSDP, ZeRO 3) are refused, and so are ones that are not contiguous in memory.

    Args:
        optimizer: any torch optimizer, with parameters of ``model``.
        model: loaded from ``grown_folder``. Names with the prefix of DistributedDataParallel or torch.compile are
            accepted.
        grown_folder: a folder of ``phigrow expand``. Its ``phigrow.json`` lists the copied values.
        factor: of the updates of new values.
        copied: factor of the updates of copied values.
        warmup: updates over which the factor of new values rises from 0.

    Returns:
        An object that counts updates and removes the hooks.

    Raises:
        GrowthError: the folder was not grown; a parameter is sharded, belongs to another model or is not in the
            folder; a factor is negative or not finite.

    >>> fresh_lr(optimizer, model, "grown", factor=2.0)  # doctest: +SKIP
    """
    for name, value in (("factor", factor), ("copied", copied), ("warmup", warmup)):
        if not 0 <= value < float("inf"):
            raise GrowthError(f"{name} is {value}", where="fresh_lr", fix="give a finite number of at least 0")
    inner = _innermost(optimizer)
    config = RunConfig(init=str(grown_folder), fresh_lr=factor, copied_lr=copied, fresh_warmup=warmup)
    return FreshLR(inner, _masks(inner, model, grown_folder, "fresh_lr"), config)


def freeze_copied(optimizer: Optimizer, model: nn.Module, grown_folder: str | Path) -> FrozenCopies:
    """Train only the new values of a grown model. Its copied values stay as they are, to the bit.

    The gradients of copied values are set to zero, so they do not count in a norm that clips gradients. After every
    update the copied values are restored, because weight decay and momentum would move them. Parameters
    that have no new values get ``requires_grad = False``, so call it before DistributedDataParallel wraps the model.

    Args:
        optimizer: any torch optimizer, with parameters of ``model``.
        model: loaded from ``grown_folder``.
        grown_folder: a folder of ``phigrow expand``.

    Returns:
        An object that removes the hooks.

    Raises:
        GrowthError: as `fresh_lr`; the model is in DistributedDataParallel; or the growth has no new values.

    >>> freeze_copied(optimizer, model, "grown")  # doctest: +SKIP
    """
    from torch.nn.parallel import DistributedDataParallel

    if any(isinstance(each, DistributedDataParallel) for each in model.modules()):
        raise GrowthError(
            "the model is already in DistributedDataParallel",
            where="freeze_copied",
            why="it would wait for gradients of parameters that have no new values",
            fix="call freeze_copied before DistributedDataParallel, or before accelerator.prepare",
        )
    inner = _innermost(optimizer)
    masks = _masks(inner, model, grown_folder, "freeze_copied")
    if all(bool(mask.all()) for mask in masks.values()):
        raise GrowthError(
            "the grown model has no new values to train",
            where=str(grown_folder),
            why="every value that the optimizer trains is a copy",
            fix="leave freeze_copied out, or grow with a method that adds new values",
        )
    return FrozenCopies(inner, masks)


def _innermost(optimizer: Any) -> Any:
    """Return the optimizer inside of accelerate's wrapper, whose hooks run."""
    from torch.optim import Optimizer

    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _masks(optimizer: Optimizer, model: nn.Module, grown_folder: str | Path, where: str) -> dict[int, Tensor]:
    """Return the masks of the copied values of an optimizer's parameters, by identity."""
    from phigrow.training.zero import full_shape

    copies = copied_values(RunConfig(init=str(user_path(grown_folder))))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    masks: dict[int, Tensor] = {}
    for parameter in _parameters(optimizer):
        name = names.get(id(parameter))
        if name is None:
            raise GrowthError(
                f"the optimizer has a parameter of shape {tuple(parameter.shape)} that is not in the model",
                where=where,
                fix="give the model whose parameters the optimizer trains, and call this before they are sharded",
            )
        if hasattr(parameter, "device_mesh") or tuple(parameter.shape) != full_shape(parameter):
            raise GrowthError(
                "the parameters are split between ranks",
                where=f"{where}: {name}",
                why="copied values are known by their place in the whole tensor",
                fix="train with data parallelism, or with phigrow pretrain and its setting fresh_lr",
            )
        if where == "fresh_lr" and not parameter.is_contiguous():
            raise GrowthError(
                "a parameter is not contiguous in memory",
                where=f"{where}: {name}, strides {parameter.stride()}",
                why="its values are scaled in the order of memory",
                fix="set parameter.data = parameter.data.contiguous() before the optimizer is built",
            )
        for prefix in WRAPPERS * 2:
            name = name.removeprefix(prefix)
        masks[id(parameter)] = copied_mask(copies, name, tuple(parameter.shape)).to(parameter.device)
    return masks
