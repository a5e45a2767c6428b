"""Cut ZeRO checkpoints into parameters, for optimizers that DeepSpeed's own converter does not know.

DeepSpeed's converter reads ``exp_avg`` and ``exp_avg_sq`` of every parameter group, and fails on other states. A
rank's file holds each state in this layout:

- ZeRO 1 and 2: one flat tensor per parameter group, of the rank's part of it; ``param_slice_mappings`` has the
  start and length of each parameter.
- Muon's momentum at ZeRO 1 (except in bf16) and 2: the complete momentum of each matrix of which the rank holds a part,
  one after the other. Two ranks hold a matrix that lies on their border.
- ZeRO 3: one flat tensor per sub-group, with an equal part of every parameter, the last ones padded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.errors import GrowthError
from phigrow.files.untrusted import check_plain_name

if TYPE_CHECKING:
    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
Fragment = tuple[str, str, "Tensor", bool]
"""Parameter, state (or ``fp32``), values, and True if the values are all of the parameter's."""


def cut_shards(source: Path, folder: Path, states: Iterable[str]) -> None:
    """Write the masters and states of a checkpoint, parameter by parameter: ``folder/zero/<parameter>/<state>.pt``.

    Call it inside of `phigrow.checkpoints.integrity.restricted_pickles`.

    Args:
        source: the folder with the ``*_optim_states.pt`` of every rank.
        folder: of the output; ``zero/optimizer_state.pt`` gets the optimizer's step and the loss scaler.
        states: names of the state tensors; a parameter may have some of them.

    Raises:
        GrowthError: a parameter's values are not complete, or a name could lead out of ``folder``.
    """
    import torch

    states = tuple(states)
    files = sorted(source.glob("*_optim_states.pt"), key=_rank)
    shapes = _param_shapes(source)
    parts: dict[tuple[str, str], list[Tensor]] = {}
    complete: dict[tuple[str, str], Tensor] = {}
    steps, scaler = [], None
    for rank, path in enumerate(files):
        content = torch.load(path, map_location="cpu", weights_only=True)["optimizer_state_dict"]
        scaler = content.get("loss_scaler")
        stage3 = "fp32_flat_groups" in content
        fragments = _of_stage_3 if stage3 else _of_stages_1_and_2
        for name, state, values, is_all in fragments(content, shapes, states, rank, len(files)):
            if is_all:
                complete.setdefault((name, state), values)
            else:
                parts.setdefault((name, state), []).append(values)
        inner = content["optimizer_state_dict" if stage3 else "base_optimizer_state"]["state"]
        steps += [float(entry["step"]) for entry in inner.values() if "step" in entry]
    sizes = {name: shape for group in shapes for name, shape in group.items()}
    for name, state in {*parts, *complete}:
        check_plain_name(name, "a parameter", str(source))
        check_plain_name(state, "a state", str(source))
    for name, state in sorted({*parts, *complete}):
        whole = complete.get((name, state))
        values = torch.cat(parts[name, state]) if whole is None else whole
        if name in sizes and values.numel() != math.prod(sizes[name]):
            raise GrowthError(
                f"the checkpoint has {values.numel():,} of {math.prod(sizes[name]):,} values of a parameter",
                where=f"{state} of {name}, {source}",
                fix="take a checkpoint that is complete",
            )
        path = folder / "zero" / name / f"{state}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = values.detach().float()
        torch.save({"param": values.reshape(sizes[name]).clone() if name in sizes else values.clone()}, path)
    common = {"step": max(steps, default=0.0)} | ({"loss_scaler": scaler} if scaler is not None else {})
    torch.save(common, folder / "zero" / "optimizer_state.pt")


def _rank(path: Path) -> int:
    match = re.search(r"zero_pp_rank_(\d+)_", path.name)
    return int(match[1]) if match else 0


def _param_shapes(source: Path) -> list[Shapes]:
    import torch

    first = min(source.glob("*mp_rank_00_model_states.pt"))
    content = torch.load(first, map_location="cpu", weights_only=True)
    return [{name: tuple(shape) for name, shape in group.items()} for group in content["param_shapes"]]


def _of_stages_1_and_2(
    content: Mapping[str, Any], shapes: list[Shapes], states: tuple[str, ...], rank: int, ranks: int
) -> Iterator[Fragment]:
    sizes = {name: math.prod(shape) for group in shapes for name, shape in group.items()}
    base = content["base_optimizer_state"]
    inner = base["state"]
    for index, (mapping, masters) in enumerate(
        zip(content["param_slice_mappings"], content["single_partition_of_fp32_groups"], strict=True)
    ):
        kept = {"fp32": masters} | {state: inner[index][state] for state in states if state in inner.get(index, {})}
        # DeepSpeed's optimizer for bf16 at stage 1 has no loss scaler, and cuts momentum like every other state.
        keeps_matrices = base["param_groups"][index].get("use_muon", False) and "loss_scaler" in content
        start = 0
        for name, fragment in sorted(mapping.items(), key=lambda item: item[1].start):
            for state, values in kept.items():
                if keeps_matrices and state != "fp32":
                    yield name, state, values[start : start + sizes[name]], True
                else:
                    yield name, state, values[fragment.start : fragment.start + fragment.numel], False
            start += sizes.get(name, fragment.numel)


def _of_stage_3(
    content: Mapping[str, Any], shapes: list[Shapes], states: tuple[str, ...], rank: int, ranks: int
) -> Iterator[Fragment]:
    inner = content["optimizer_state_dict"]["state"]
    for index, (group, masters) in enumerate(zip(shapes, content["fp32_flat_groups"], strict=True)):
        kept = {"fp32": masters} | {state: inner[index][state] for state in states if state in inner.get(index, {})}
        start = 0
        for name, shape in group.items():
            size = math.prod(shape)
            share = -(-size // ranks)
            own = max(0, min(share, size - rank * share))
            for state, values in kept.items():
                yield name, state, values[start : start + own], False
            start += share
