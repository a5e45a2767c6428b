"""Learning-rate schedules: transformers' own, chosen by a `RunConfig`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from phigrow.training.configuration import RunConfig

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR


def learning_rate_schedule(optimizer: Optimizer, config: RunConfig) -> LambdaLR:
    """Return the scheduler of a run: linear warmup, then cosine, wsd (constant, then linear decay) or constant.

    These are transformers' schedules without changes: warmup starts at 0, under wsd at ``min_lr``. A run may be a part
    of a longer schedule (``schedule_start``, ``schedule_steps``). With ``rewarm`` its rate first rises from 0. This
    function sets the peak learning rate of ``optimizer``.
    """
    from transformers import get_scheduler

    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = config.lr * group.get("lr_multiple", 1.0)
    options: dict[str, Any] | None = None
    if config.schedule == "cosine":
        name, options = "cosine_with_min_lr", {"min_lr_rate": config.min_lr}
    elif config.schedule == "wsd":
        name = "warmup_stable_decay"
        options = {"num_decay_steps": config.decay_steps, "decay_type": "linear", "min_lr_ratio": config.min_lr}
    else:
        name = "constant_with_warmup"
    whole = config.whole_schedule
    scheduler: LambdaLR = get_scheduler(name, optimizer, config.warmup, whole, scheduler_specific_kwargs=options)
    if config.schedule_start or config.rewarm:
        scheduler.lr_lambdas = [_part(rate, config) for rate in scheduler.lr_lambdas]
        rejoin(scheduler)
    return scheduler


def _part(rate: Callable[[int], float], config: RunConfig) -> Callable[[int], float]:
    start, rewarm = config.schedule_start or 0, config.rewarm or 0
    return lambda step: rate(start + step) * (min(1.0, step / rewarm) if rewarm else 1.0)


def rejoin(scheduler: LambdaLR) -> None:
    """Give the optimizer the learning rate of its next step by this run's schedule.

    A checkpoint has the next rate of the run that wrote it. It differs if that run was a trunk which ended there and
    is now made longer or branched off. Otherwise the two rates are equal to the bit.
    """
    rates = [
        base * rate(scheduler.last_epoch) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
