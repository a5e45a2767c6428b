"""`plan`: from two configurations and a `GrowthSpec` to a resolved `Plan`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from phigrow.checkpoints.hub import source_config
from phigrow.errors import GrowthError
from phigrow.files.paths import user_text
from phigrow.growth.axes import AxisMap, kronecker, part_map
from phigrow.growth.growth_spec import GrowthSpec
from phigrow.growth.matrices import Maps, read_maps
from phigrow.growth.method import NEW, GrowthTask, Method, MethodError, Value
from phigrow.growth.method_files import place_of
from phigrow.growth.method_results import layers_of, maps_of, noise_of, notes_of, reasons_of
from phigrow.growth.method_spec import resolve_method
from phigrow.growth.methods.depth import DEPTHS, layer_map
from phigrow.growth.plan import Plan, function_changes
from phigrow.models.config import Config, context_of, load_config, rotary_keys, unread_rotary_keys
from phigrow.models.families import family_of
from phigrow.models.family import spelled

TOKENS = "vocab does not keep every token of the source"
"""Reason of a method that claims nothing about tokens which it changes."""
EXACT_LEGS = 1e-9
"""max |R E - I| of an axis in a plan that claims to preserve the function; gains are products of float64 roots."""


def plan(
    src: str | Path | Config,
    dst_config: str | Path | Config,
    method: str | Method = "wr",
    *,
    revision: str | None = None,
    **growth: Any,
) -> Plan:
    """Decide how a model grows, without its weights.

    Args:
        src: the source: a folder, a hub name, a configuration file, the name of a shipped one, or a dictionary.
        dst_config: the destination's configuration, likewise (not a hub name).
        method: width method, such as ``tile``, ``wr`` or ``lossless``; with options (``tile:scale=preserve``) or axis
            by axis (``hidden=lossless,mlp=tile``), as `phigrow.growth.method_spec` spells it. Or the path of a method
            file, which ends in ``.py``, or a `phigrow.methods.Method`.
        revision: hub revision of the source.
        growth: ``depth``, ``rounding``, ``seed``, ``noise`` and ``maps`` as in `phigrow.growth.growth_spec.GrowthSpec`,
            and options of the width method, such as ``scale="preserve"`` or ``anchor="center"``.

    Returns:
        The plan; ``plan.exact`` is True if it claims to preserve the function.

    Raises:
        GrowthError: an unknown name, a smaller destination, or growth that the method cannot do; the message names the
            axis.

    >>> phigrow.plan("phi-1_5", "phi2.json", "lossless").exact  # doctest: +SKIP
    True
    """
    return make_plan(src, dst_config, GrowthSpec.of(method, **growth), revision=revision)


def make_plan(
    src: str | Path | Config, dst_config: str | Path | Config, growth: GrowthSpec, *, revision: str | None = None
) -> Plan:
    """Decide how a model grows, as `plan` does, from a `GrowthSpec`.

    Raises:
        GrowthError: as `plan`.
    """
    task = _task(src, dst_config, revision)
    method, options = growth.resolve()
    maps = Maps() if method.learns else None
    if growth.maps is not None:
        maps, growth, options = _with_learned_maps(growth, growth.maps, method, options)
    task = replace(task, seed=growth.seed)
    _validate(task, growth, method)
    made = _build(task, growth, method, options, maps)
    if made.learned is not None and growth.maps is not None:
        made.learned.check(growth.maps)
    return made


def check_method_of(plan: Plan, method: str | Path | Method) -> None:
    """Check that a plan was made by a method whose file has the content that it has now.

    The method plans the growth again, from the configurations and settings in the plan.

    Args:
        plan: the plan, of a method that does not come with phigrow.
        method: the path of its file, the name of an installed method, a mixture of these, or the method itself. Options
            are those of the plan.

    Raises:
        GrowthError: the file is missing or has changed, the method has another name, or it makes another plan.
    """
    spelling = method if isinstance(method, Method) else user_text(str(method))
    chosen = resolve_method(spelling, {})[0]
    places = ", ".join(str(source.path) for source in chosen.sources)
    if not plan.method_files or not chosen.sources:
        which, name = ("the plan", plan.method) if not plan.method_files else ("the given method", chosen.name)
        raise GrowthError(
            f"{which} is of phigrow's own method {name}",
            where="method",
            why="it has no file to check",
            fix="leave --method out",
        )
    if chosen.name != plan.method:
        raise GrowthError(
            f"the plan was made by {plan.method}, and the given method is {chosen.name}",
            where=places,
            fix="give the file of the method that made the plan",
        )
    for source in chosen.sources:
        if source.sha256 != plan.method_files.get(source.method):
            raise GrowthError(
                f"the file of method {source.method} has changed since the plan was made",
                where=str(source.path),
                why=f"its sha256 is {source.sha256}, and the plan has {plan.method_files.get(source.method)}",
                fix="give the file as it was, or expand again with this one",
            )
    own_depth = chosen.layers is not None and plan.depth not in DEPTHS
    growth = GrowthSpec(
        method=chosen,
        options=chosen.resolve_options(plan.options),
        depth=None if own_depth else plan.depth,
        rounding=plan.depth_options.get("rounding", "half-even"),
        seed=plan.seed,
        noise=plan.noise if chosen.own_noise is None else 0.0,
    )
    again = make_plan(plan.src_config, plan.dst_config, growth)
    if again.hash != plan.hash:
        raise GrowthError(
            f"method {plan.method} makes another plan now, of hash {again.hash[:16]}",
            where=places,
            why=f"the plan has {plan.hash[:16]}, from the same file and settings: the method draws without task.seed, "
            "or another version of phigrow or of a package made the plan",
            fix="draw random numbers with phigrow.methods.generator(task.seed, name)",
        )


def _task(src: str | Path | Config, dst_config: str | Path | Config, revision: str | None) -> GrowthTask:
    """Read both configurations, and their sizes by the table of their family."""
    old = load_config(src) if isinstance(src, dict) else source_config(src, revision)
    new = load_config(dst_config)
    family = family_of(old, "the source configuration")
    if family_of(new, "the destination configuration") is not family:
        raise GrowthError(
            f"the source is a {family.model_type}, but the destination a {new.get('model_type')}",
            where="the destination configuration",
            why="growth stays inside one family",
            fix=f"give a destination of model_type {family.model_type}",
        )
    return GrowthTask(family, old, new, family.sizes_of(old), family.sizes_of(new))


def _with_learned_maps(
    growth: GrowthSpec, folder: str | Path, method: Method, options: dict[str, Value]
) -> tuple[Maps, GrowthSpec, dict[str, Value]]:
    """Read learned maps; options, depth, rounding and seed become those with which the maps were learned."""
    if not method.learns:
        raise GrowthError(
            f"method {method.name} takes no maps",
            where="maps",
            why="only ligo grows with learned maps",
            fix="leave --maps out, or use --method ligo",
        )
    maps, record = read_maps(folder)
    start = record["start"]
    try:
        learned_options = method.resolve_options(start["options"])
        learned = replace(growth, depth=str(start["depth"]), rounding=str(start["rounding"]), seed=int(start["seed"]))
    except (KeyError, TypeError, ValueError) as error:
        raise GrowthError(
            "the learned maps have no valid `start` entry",
            where=str(maps.path),
            why=repr(error),
            fix="run phigrow learn-growth again",
        ) from error
    # A default may have been typed or not, so the option of the learned maps takes precedence over it.
    asked = {name: value for name, value in options.items() if value != method.options[name].default}
    asked |= {"depth": growth.depth} if growth.depth else {}
    for name, value in asked.items():
        if value != (before := {**learned_options, "depth": learned.depth}.get(name)):
            raise GrowthError(
                f"{name} is {value!r}, but the maps were learned from {name} {before!r}",
                where=str(maps.path),
                fix=f"leave {name} out, or learn the maps again",
            )
    return maps, learned, learned_options


def _validate(task: GrowthTask, growth: GrowthSpec, method: Method) -> None:
    """Refuse growth that no method can do, and settings that this method does not have."""
    _refuse_smaller(task)
    if growth.noise > 0 and not method.takes_noise:
        raise GrowthError(
            f"method {growth.label} takes no noise (got {growth.noise:g})",
            where="noise",
            why="it does not set takes_noise; of phigrow's own methods only tile, on every axis, does",
            fix="leave --noise out, or use --method tile",
        )
    if method.learns and growth.depth == "random":
        raise GrowthError(
            f"method {growth.label} cannot use depth random",
            where="depth",
            why=f"every layer of {method.name} is a learned sum of source layers, and a new layer has none",
            fix="use --depth interpose, stack or identity, or --method wr",
        )
    tied = [task.family.ties(config) for config in (task.src_config, task.dst_config)]
    if tied[0] != tied[1]:
        raise GrowthError(
            "source and destination differ in tie_word_embeddings",
            where=task.family.head_matrix,
            why=f"it is {str(tied[0]).lower()} in the source, where the stored head decides, and "
            f"{str(tied[1]).lower()} in the destination",
            fix=f"set tie_word_embeddings: {str(tied[0]).lower()} in the destination configuration",
        )
    changes = function_changes(task.family, task.src_config, task.dst_config)
    if method.always_exact and changes:
        raise GrowthError(
            f"{growth.label} cannot grow between configurations that compute different functions",
            where="the destination configuration",
            why="; ".join((*changes, *_unread_keys(task))),
            fix="give the destination the source's values, or use --method tile or wr",
        )


def _build(task: GrowthTask, growth: GrowthSpec, method: Method, options: dict[str, Value], maps: Maps | None) -> Plan:
    """Ask the method for its maps and its claim."""
    depth = growth.depth or (method.depth if method.layers is None else method.name)
    if growth.depth is None and method.layers is not None:
        layers, identity_layers = layers_of(method, task, options)
    else:
        layers, identity_layers = layer_map(depth, *task.sizes("layer"), growth.rounding)
    axes, own_noise = maps_of(method, task, options), noise_of(method, options)
    noise = float(growth.noise if own_noise is None else own_noise)
    approximations = _approximations(task, method, options, maps, axes, depth, layers, identity_layers)
    if noise > 0 and method.noise_on == "all" and not approximations:
        approximations = (f"noise of {noise:g} is added to all values of matrices",)
    made = Plan(
        family=task.family.name,
        method=method.name,
        options=dict(method.spell_options(options)),
        depth=depth,
        depth_options={"rounding": growth.rounding} if depth == "interpose" else {},
        axes=axes,
        layers=layers,
        identity_layers=identity_layers,
        seed=growth.seed,
        noise=noise,
        noise_on=method.noise_on,
        src_config=task.src_config,
        dst_config=task.dst_config,
        approximations=approximations,
        notes=(*_notes(task), *notes_of(method, task, options), *_start_notes(method, maps)),
        maps=maps,
        method_files={source.method: source.sha256 for source in method.sources},
    )
    if method.sources:
        _check_composites(made, method)
    return made


def _check_composites(made: Plan, method: Method) -> None:
    """Refuse maps that do not go together on a composite axis, such as means of whole heads.

    Methods of phigrow never return such maps, so only others are checked.
    """
    for axis in dict.fromkeys(axis for p in made.table.parameters for axis in (*p.axes, p.read or p.written)):
        try:
            kronecker(axis, [part_map(made.axes, part) for part in axis])
        except AssertionError as error:
            raise MethodError(
                f"method {method.name} returned maps that cannot be combined on the axis {spelled(axis)}",
                where=f"{place_of(method, method.axis_maps)}, met first in {made.table.first_use(axis[0])}",
                why=str(error),
                fix="give each part of this axis a map of plain copies",
            ) from error


def _approximations(
    task: GrowthTask,
    method: Method,
    options: dict[str, Value],
    maps: Maps | None,
    axes: dict[str, AxisMap],
    depth: str,
    layers: tuple[int, ...],
    identity_layers: frozenset[int],
) -> tuple[str, ...]:
    """Every reason why the plan does not preserve the function."""
    claims = reasons_of(method, task, options)
    if maps is not None and maps.sha256 is not None:
        claims = [f"the maps of {method.name} are learned: the function is another, of a lower loss", *claims]
    changes = function_changes(task.family, task.src_config, task.dst_config)
    return (
        *claims,
        *_depth_approximations(task, depth, layers, identity_layers),
        *(f"the configurations compute different functions: {change}" for change in changes),
        *_leg_approximations(task, axes, claims),
    )


def _start_notes(width: Method, learned: Maps | None) -> list[str]:
    if learned is None or learned.sha256 is not None:
        return []
    return [f"{width.name} without learned maps is the operator that it starts from: learn them, and give --maps"]


def _refuse_smaller(task: GrowthTask) -> None:
    query, part = task.family.query, rotary_keys(task.family.model_type)[1]
    for axis in (*task.family.axis_names, "rotary"):
        src, dst = task.sizes(axis)
        if dst < src:
            raise task.refuse(
                f"the destination is smaller: {axis} {src} -> {dst}",
                axis,
                "growth never drops coordinates",
                f"choose a destination configuration with at least {src}, or swap source and destination",
            )
    src, dst = (head - rotary for head, rotary in zip(task.sizes(query), task.sizes("rotary"), strict=True))
    if dst < src:
        raise task.refuse(
            f"the destination is smaller: the part of a head that is not rotary, {src} -> {dst} coordinates",
            query,
            "growth never drops coordinates, and those that turn are no place for those that do not",
            f"choose {part} so that at least {src} coordinates of a head are not rotary",
        )
    if any(size % 2 for size in task.sizes("rotary")):
        raise task.refuse(
            f"the rotary part of a head is odd, {task.src['rotary']} -> {task.dst['rotary']} coordinates",
            "rotary",
            "rotary coordinates turn in pairs",
            f"choose {part} so that head_dim * {part} is even",
        )


def _depth_approximations(
    task: GrowthTask, depth: str, layers: tuple[int, ...], identity_layers: frozenset[int]
) -> list[str]:
    src, dst = task.sizes("layer")
    active = [layer for k, layer in enumerate(layers) if k not in identity_layers]
    if active == list(range(src)):
        return []
    if NEW in active:
        return [f"{depth} adds {active.count(NEW)} layers of new values, which change the function"]
    if dst - src == len(identity_layers):
        return [f"{depth} applies the source's layers in another order"]
    return [f"{depth} repeats {dst - src} of {src} layers, which then act twice"]


def _leg_approximations(task: GrowthTask, axes: dict[str, AxisMap], known: list[str]) -> list[str]:
    """Check the maps of a method that claims exactness: R E = I on every axis that is summed over, and its tokens.

    Tokens are looked up, not summed over, so each token of the source has to be itself.
    """
    if known:
        return []
    tokens = axes[task.family.vocab]
    first = np.arange(tokens.src_size)
    kept = tokens.source[first] == first
    if tokens.structure is not None or not (kept & (tokens.write[first] == 1) & (tokens.read[first] == 1)).all():
        return [TOKENS]
    summed = [name for name in axes if name != task.family.vocab]
    wrong = [name for name in summed if axes[name].left_inverse_error() > EXACT_LEGS]
    return [f"R E is not I on {', '.join(wrong)}"] if wrong else []


def _unread_keys(task: GrowthTask) -> list[str]:
    sides = (("source", task.src_config), ("destination", task.dst_config))
    return [f"in the {side} configuration, {remark}" for side, config in sides for remark in unread_rotary_keys(config)]


def _notes(task: GrowthTask) -> list[str]:
    notes = _unread_keys(task)
    for side, config in (("source", task.src_config), ("destination", task.dst_config)):
        if "auto_map" in config:
            notes.append(f"the {side} configuration asks for remote code (auto_map): none was run, none is passed on")
    for key in task.family.dropout_keys:
        if task.dst_config.get(key):
            notes.append(f"{key} {task.dst_config[key]} acts in training mode: equality holds in evaluation mode")
    src, dst = context_of(task.src_config), context_of(task.dst_config)
    if dst > src:
        notes.append(f"the context grows from {src} to {dst}: positions past {src} were never trained")
    return notes
