"""The contract of a family, for anybody's tests."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import Any

import numpy as np

from phigrow.errors import GrowthError
from phigrow.growth.method import Method
from phigrow.growth.methods import built_in_methods
from phigrow.models.config import Config, normalised
from phigrow.models.cost import count_cost
from phigrow.models.families import use_family
from phigrow.models.family import TIE, Family
from phigrow.models.function import function_of
from phigrow.testing.method_contract import ContractError, check_method
from phigrow.testing.models import hf_config_of, logits, model_of, probe, random_pair

SIZES = 200
"""Number of random configurations whose sizes are read back."""

NUMPY = 1e-4
"""Largest difference of the family's forward pass in numpy from transformers', where logits are of the order of 1: both
compute rotary tables in float32."""


def check_family(
    family: Family,
    *,
    methods: Iterable[str | Method] | None = None,
    shapes: int = 2,
    seed: int = 4,
) -> None:
    """Test that a family's table describes transformers' models, and that methods keep their contract in it.

    - A configuration of given sizes has these sizes.
    - The table has the tensors of the model's ``state_dict``, with their shapes, with and without tied embeddings and
      for both values of every other flag in ``function_keys``.
    - The axes that the family names are in its table.
    - Its forward pass in numpy, if it has one, computes the logits of transformers' model.
    - `check_method` passes in it for every given method.

    Args:
        family: the family; no package has to register it.
        methods: names of methods, or methods; by default all of phigrow's.
        shapes: number of growths of each method.
        seed: decides the sizes.

    Raises:
        ContractError: the contract is broken; the message has the parameter and by how much it differs.
    """
    with use_family(family):
        _check_names(family)
        _check_sizes(family, seed)
        _check_table(family, seed)
        _check_forward(family, seed)
        for method in built_in_methods() if methods is None else methods:
            check_method(method, families=[family], shapes=shapes, seed=seed)


def _broken(family: Family, what: str, *details: str) -> ContractError:
    return ContractError("\n".join([f"family {family.name}: {what}", *(f"  {line}" for line in details)]))


def _check_names(family: Family) -> None:
    try:
        names = family.axis_names
    except GrowthError as error:
        raise _broken(family, error.what, error.where) from error
    roles = ("residual", "normed", "final", "vocab", "mlp", "query", "key", "value")
    named = {role: getattr(family, role) for role in roles} | {f"heads[{k}]": n for k, n in enumerate(family.heads)}
    for role, name in named.items():
        if name not in names:
            raise _broken(family, f"its {role} axis {name!r} is not in its table", f"the table has {', '.join(names)}")


def _check_sizes(family: Family, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(SIZES):
        for config in random_pair(family, rng):
            sizes = family.sizes_of(config)
            again = family.sizes_of(family.config_of(sizes))
            if again != sizes:
                axis = next(name for name in {**sizes, **again} if sizes.get(name) != again.get(name))
                raise _broken(
                    family, f"config_of and sizes_of disagree on {axis}: {sizes.get(axis)} becomes {again.get(axis)}"
                )


def _variants(family: Family) -> list[dict[str, bool]]:
    """Return settings of the flags, each of which has both values once."""
    flags = [key for key, value in family.function_keys.items() if isinstance(value, bool)]
    return [{}, *({flag: value} for flag in dict.fromkeys([TIE, *flags]) for value in (True, False))]


def _check_table(family: Family, seed: int) -> None:
    rng = random.Random(seed)
    for flags in _variants(family):
        for config in random_pair(family, rng, **flags):
            real, spelled = _real(family, config)
            _compare_tensors(family, config, flags, real)
            own, read = family.sizes_of(config), family.sizes_of(spelled)
            if own != read:
                axis = next(name for name in own if own[name] != read.get(name))
                raise _broken(
                    family, f"{axis} is {own[axis]}, but {read.get(axis)} in the configuration that transformers writes"
                )
            counted, there = count_cost(config).parameters, sum(math.prod(shape) for shape in real.values())
            if counted != there:
                raise _broken(family, f"count_cost finds {counted} parameters, and the model has {there}")


def _real(family: Family, config: Config) -> tuple[dict[str, tuple[int, ...]], Config]:
    """Return the shapes of the tensors of transformers' model, and the configuration that it writes.

    Values are not built.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(hf_config_of(config))  # type: ignore[no-untyped-call]
    shapes = {family.stored_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = family.ties(config)
    kept = {name: shape for name, shape in shapes.items() if not (tied and name == family.head_matrix)}
    return kept, model.config.to_dict()


def _compare_tensors(family: Family, config: Config, flags: dict[str, bool], real: dict[str, tuple[int, ...]]) -> None:
    table = family.state_shapes(config)
    where = ", ".join(f"{key} {str(value).lower()}" for key, value in flags.items())
    of = f"its table is not the model of transformers{f' with {where}' if where else ''}"
    for name, shape in table.items():
        if name not in real:
            raise _broken(family, of, f"{name} is in the table, and the model has no such tensor")
        if real[name] != shape:
            raise _broken(
                family, of, f"{name} has shape {list(shape)} by the table, and {list(real[name])} in the model"
            )
    if extra := [name for name in real if name not in table]:
        raise _broken(family, of, f"{extra[0]} is in the model, and the table has no such line")


def _check_forward(family: Family, seed: int) -> None:
    if family.forward is None:
        return
    rng = random.Random(seed)
    for flags in _variants(family):
        config = random_pair(family, rng, **flags)[0]
        model = model_of(config)
        ids = probe(config["vocab_size"])
        weights = {family.stored_name(name): tensor.numpy() for name, tensor in model.state_dict().items()}
        if family.ties(config):
            weights.pop(str(family.head_matrix), None)
        settings: dict[str, Any] = {**normalised(config), **function_of(family, config).settings}
        turn = function_of(family, config).rotary.at(ids.shape[1], np.float32)
        own = family.forward(settings, family.sizes_of(config), turn, weights, ids.numpy(), ids.shape[1])
        theirs = logits(model, ids).numpy()
        worst = float(np.abs(own - theirs).max()) if own.shape == theirs.shape else float("inf")
        if not worst <= NUMPY * max(1.0, float(np.abs(theirs).max())):
            raise _broken(
                family, f"its forward pass in numpy differs from transformers' model by {worst:.3g}", str(flags)
            )
