"""The contract of a width method, for anybody's tests."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from phigrow.errors import GrowthError
from phigrow.growth.axes import AxisMap
from phigrow.growth.growth_spec import GrowthSpec
from phigrow.growth.method import Method, MethodError
from phigrow.growth.plan import Plan
from phigrow.growth.planner import EXACT_LEGS, TOKENS, make_plan
from phigrow.models.config import Config
from phigrow.models.families import all_families, use_family
from phigrow.models.family import Family, Parameter, spelled, stacked_names
from phigrow.testing.located import first_difference
from phigrow.testing.models import grown_model, logits, model_of, probe, random_pair

EXACT = 1e-10
"""Largest difference of logits of an exact plan, in float64, where logits are of the order of 1."""

LEAST = 2
"""Least number of shapes that a method has to accept in each family."""

NEW_TOKENS = 3
"""Tokens by which the vocabulary grows in one shape of four."""
STEPS = 4
"""Steps of gradient descent after which every new coordinate must have had a gradient: those of a new head inside of an
identity layer begin one after the other, with the output projection, the keys and the queries."""


class ContractError(AssertionError):
    """A method or a family does not do what it claims."""


def check_method(
    method: str | Path | Method,
    *,
    families: Iterable[str | Family] | None = None,
    options: Mapping[str, Any] | None = None,
    shapes: int = 6,
    seed: int = 3,
) -> None:
    """Test that a method keeps its contract, in every family and over random shapes.

    In float64, on tiny models of transformers with random weights:

    - It accepts a growth, or refuses it with a place and a fix. It accepts some shapes of every family.
    - The same task gives the same plan. The plan survives a round trip through JSON.
    - Where it claims to preserve the function, logits are the source's to 1e-10, and R E = I on every axis that is
      summed over. Where it claims to change the function, logits differ.
    - All gradients are finite, and every new coordinate gets one within a few steps.

    Args:
        method: the name of a method, the path of its file, or the method.
        families: names of families, or families; by default all that phigrow knows.
        options: options of the method.
        shapes: number of growths in each family.
        seed: decides the shapes.

    Raises:
        ContractError: the contract is broken. The message has the family, the parameter, its axis, and by how much it
            differs.
        GrowthError: the method cannot be loaded.

    >>> check_method("lossless", families=["phi"], shapes=2)
    """
    spec = GrowthSpec(str(method) if isinstance(method, Path) else method, dict(options or {})).pinned()
    spec.resolve()
    for family in families if families is not None else all_families():
        table = all_families()[family] if isinstance(family, str) else family
        with use_family(table):
            _Contract(spec, table, seed).check(shapes)


class _Contract:
    """The contract of one method in one family."""

    def __init__(self, spec: GrowthSpec, family: Family, seed: int) -> None:
        self.spec, self.family, self.seed = spec, family, seed
        self.method = spec.resolve()[0]

    def check(self, shapes: int) -> None:
        rng, reasons, tried = random.Random(self.seed), [], 0
        for k in range(4 * shapes):
            tied, whole = k % 3 == 2, k % 2 == 1
            src, dst = random_pair(self.family, rng, whole=whole, tie_word_embeddings=tied)
            if k % 4 == 2:
                dst = {**dst, "vocab_size": dst["vocab_size"] + NEW_TOKENS}
            try:
                plan = make_plan(src, dst, self.spec)
            except MethodError as error:
                raise self.broken(error.what, (src, dst), f"{error.where}\n{error.why}".strip()) from error
            except GrowthError as refused:
                if not refused.where or not refused.fix:
                    raise self.broken(
                        f"it refuses a growth without a place or a fix: {refused.what}", (src, dst),
                        "raise task.refuse(what, axis, why, fix)",
                    ) from refused  # fmt: skip
                reasons.append(refused.what)
                continue
            self.check_plan(plan, (src, dst), again=tried == 0)
            self.check_growth(plan, (src, dst), gradients=tried == 0)
            tried += 1
            if tried == shapes:
                break
        if tried < min(LEAST, shapes):
            raise ContractError(
                f"method {self.method.name} in the family {self.family.name}: it took {tried} of {k + 1} shapes, and "
                f"has to take {min(LEAST, shapes)}\n  it refused: {'; '.join(dict.fromkeys(reasons))}"
            )

    def broken(self, what: str, configs: tuple[Config, Config], *details: str) -> ContractError:
        old, new = (self.family.sizes_of(config) for config in configs)
        sizes = ", ".join(f"{axis} {old[axis]} -> {new[axis]}" for axis in dict.fromkeys(old) if old[axis] != new[axis])
        tied = ", tied head" if self.family.ties(configs[1]) else ""
        lines = [f"method {self.method.name} in the family {self.family.name}: {what}"]
        lines += [f"  {line}" for detail in details for line in detail.splitlines()]
        return ContractError("\n".join([*lines, f"  growth: {sizes}{tied}"]))

    def check_plan(self, plan: Plan, configs: tuple[Config, Config], *, again: bool) -> None:
        restored = Plan.from_json(json.loads(json.dumps(plan.to_json())))
        if restored.hash != plan.hash:
            raise self.broken(
                "its plan does not survive a round trip through JSON", configs, _differing(plan, restored)
            )
        if again and (second := make_plan(*configs, self.spec)).hash != plan.hash:
            raise self.broken(
                "it makes two plans of one task", configs, _differing(plan, second),
                "draw random numbers with phigrow.methods.generator(task.seed, name)",
            )  # fmt: skip
        for reason in plan.approximations:
            if reason == TOKENS:
                raise self.broken(f"it claims to preserve the function, but {reason}", configs)
            if reason.startswith("R E is not I"):
                wrong = {n: a.left_inverse_error() for n, a in plan.axes.items() if n != self.family.vocab}
                name = next(name for name, error in wrong.items() if error > EXACT_LEGS)
                raise self.broken(
                    f"it claims to preserve the function, but {reason}", configs,
                    f"{_reader(plan, name)} reads {name}: R E differs from I by {wrong[name]:.3g}"
                    f"{_where(plan.axes[name])}",
                )  # fmt: skip

    def check_growth(self, plan: Plan, configs: tuple[Config, Config], *, gradients: bool) -> None:
        model = model_of(configs[0])
        grown = grown_model(plan, model)
        for name, parameter in grown.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise self.broken("it makes values that are not finite", configs, f"{name} holds NaN or infinities")
        vocab = configs[0]["vocab_size"]
        ids = probe(vocab)
        old, new = logits(model, ids), logits(grown, ids)
        worst = float((old - new[..., :vocab]).abs().max())
        chances = float((old.log_softmax(-1) - new.log_softmax(-1)[..., :vocab]).abs().max())
        if plan.exact:
            if not max(worst, chances) <= EXACT:
                place = first_difference(plan, model, grown, ids, 100 * EXACT)
                at = f"first at {place}" if place else f"at the head, {self.family.head_matrix or 'which reads final'}"
                measured = f"logits differ by {worst:.3g}" if worst > EXACT else f"log-probabilities by {chances:.3g}"
                raise self.broken(f"it claims to preserve the function, but {measured}", configs, at)
        elif not max(worst, chances) > EXACT:
            raise self.broken(
                f"it claims to change the function, but logits differ by only {worst:.3g}", configs,
                "claims: " + "; ".join(plan.approximations),
                "let approximations() return these reasons only where they hold",
            )  # fmt: skip
        if gradients:
            self.check_gradients(plan, grown, ids, configs)

    def check_gradients(self, plan: Plan, model: Any, ids: Any, configs: tuple[Config, Config]) -> None:
        """Train for a few steps, and look for gradients that are not finite and new coordinates without one."""
        import torch

        total: dict[str, torch.Tensor] = {}
        for _ in range(STEPS):
            model.zero_grad()
            given = model(ids, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(given[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                    if not bool(gradient.isfinite().all()):
                        raise self.broken("a gradient is not finite", configs, f"{name} has NaN or infinities")
                    total[name] = total.get(name, torch.zeros_like(gradient)) + gradient.abs()
                    parameter -= 0.1 * gradient
        for recipe_name, parameter in _tensors(plan):
            name = self.family.name_among(recipe_name, total)
            for side, axis in enumerate(parameter.axes if parameter.kind == "matrix" else ()):
                if axis == (self.family.vocab,) or name not in total:
                    continue
                seen = total[name].amax(dim=1 - side).numpy()
                dead = np.flatnonzero((seen == 0) & plan.composites[axis].is_fresh)
                if dead.size:
                    raise self.broken(
                        f"new coordinates of {spelled(axis)} never learn", configs,
                        f"{recipe_name} has no gradient at {len(dead)} of them, the first is coordinate {dead[0]}",
                        "one of both legs of a new coordinate must be random: fresh_write or fresh_read",
                    )  # fmt: skip


def _tensors(plan: Plan) -> list[tuple[str, Parameter]]:
    by_line = {parameter.name: parameter for parameter in plan.table.parameters}
    return [(recipe.name, by_line[recipe.line]) for recipe in plan.recipes()]


def _reader(plan: Plan, axis: str) -> str:
    """Return the first parameter of the destination that reads an axis, else the first that has it."""
    for parameter in plan.table.parameters:
        if parameter.present(plan.dst_config) and any(axis in stacked_names(part) for part in parameter.read or ()):
            return parameter.name
    return plan.table.first_use(axis)


def _where(axis: AxisMap) -> str:
    """Name the source coordinate whose R E is farthest from 1."""
    if axis.dense is not None or (axis.write_random & axis.read_random).any():
        both = axis.write_random & axis.read_random
        return f", because both legs of coordinate {int(both.argmax())} are random" if both.any() else ""
    product = np.bincount(axis.source[axis.is_copy], (axis.write * axis.read)[axis.is_copy], minlength=axis.src_size)
    worst = int(np.abs(product - 1).argmax())
    return f" (source coordinate {worst} is written times read {product[worst]:.4g})"


def _differing(first: Plan, second: Plan) -> str:
    """Name the first axis at which two plans differ, and the first parameter that has it."""
    for name, axis in first.axes.items():
        other = second.axes.get(name)
        if other is None or axis.to_json() != other.to_json():
            at = "its runs"
            if other is not None and axis.dst_size == other.dst_size:
                for column in ("source", "write", "read", "write_random", "read_random", "is_mean"):
                    differs = np.flatnonzero(getattr(axis, column) != getattr(other, column))
                    if differs.size:
                        k = int(differs[0])
                        values = f"{getattr(axis, column)[k]} and {getattr(other, column)[k]}"
                        at = f"coordinate {k}, {column} is {values}"
                        break
            return f"axis {name} differs at {at}; it is met first in {first.table.first_use(name)}"
    return "its axes agree; layers, noise, claims or notes differ"
