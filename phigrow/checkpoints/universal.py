"""Checkpoints for any number of ranks and any ZeRO stage: DeepSpeed's universal format, written and read.

One folder, the same whatever engine wrote it:

    zero/<parameter>/fp32.pt          the parameter, fp32, whole (the master where weights are bf16 or fp16)
    zero/<parameter>/<state>.pt       a state tensor of the optimizer, fp32, of the same shape (AdamW: exp_avg,
                                      exp_avg_sq)
    state.json                        the optimizer's states and step, the schedule, DeepSpeed's counters, the loss
                                      scale (where it was grown: states, step, the loss scale, where it comes from and
                                      where the data stood)
    complete.json                     progress, sizes and hashes, written last

``<parameter>`` is the name that ``named_parameters`` gives. A ``.pt`` file holds the tensor, flat or in its shape, or
``{"param": tensor}`` around it, as DeepSpeed's converter writes it for ZeRO 3 and for ZeRO 1 and 2. ZeRO 0 has no
converter, so this module writes its folder. DeepSpeed reads such folders only into the stage they came from;
`phigrow.training.engine_state` reads them into any.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.checkpoints.integrity import damage, digests, read_marker, restricted_pickles, write_marker
from phigrow.checkpoints.shards import cut_shards
from phigrow.errors import GrowthError
from phigrow.files.atomic import atomic_json
from phigrow.files.staged_folder import staged_folder
from phigrow.files.untrusted import check_plain_name, read_json_strict
from phigrow.models.versions import mapped_loads

if TYPE_CHECKING:
    from torch import Tensor

STATE = "state.json"
ADAM_STATES = {"exp_avg": 1, "exp_avg_sq": 2}
"""Adam's state tensors and the power of the gradient that each averages; of a checkpoint that names none."""

_AGAIN = "convert or grow the optimizer's state again"
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def convert(source: Path, folder: Path, marker: dict[str, Any]) -> None:
    """Turn a checkpoint of DeepSpeed into a universal folder, in one process. A complete folder is kept.

    The source's files must have been checked. Needs as much disk as the optimizer's state, twice while it runs.

    Args:
        source: the checkpoint, with the ``*_states.pt`` of every rank.
        folder: where the universal folder goes.
        marker: content of the source's marker.

    Raises:
        GrowthError: it holds an optimizer's state that was offloaded to NVMe, or none; or it names a parameter or a
            state that could lead out of ``folder``.
    """
    if is_complete(folder):
        return
    if (source / "offloaded_tensors").exists():
        raise GrowthError(
            "the checkpoint's optimizer state was offloaded to NVMe",
            where=str(source),
            why="DeepSpeed cannot convert such a state",
            fix="resume with the ranks and the ZeRO stage that wrote it",
        )
    states = (marker.get("optimizer") or {}).get("states", ADAM_STATES)
    shutil.rmtree(folder, ignore_errors=True)
    with staged_folder(folder) as partial:
        # Mapped, not read: to cut it into parameters DeepSpeed loads all state of a rank, and of every rank at ZeRO 3.
        with restricted_pickles(), mapped_loads():
            _check_names(source, states)
            if any(source.glob("*_optim_states.pt")):
                if set(states) == set(ADAM_STATES):
                    _convert_zero(source, partial)
                else:
                    cut_shards(source, partial, states)
                    forget_aliases(source, partial)
            else:
                _convert_plain(source, partial, states)
            atomic_json(partial / STATE, {"states": dict(states)} | _state(source, partial))
        content = {key: value for key, value in marker.items() if key != "files"}
        write_marker(partial, content | {"universal": True}, digests(partial))


def is_complete(folder: Path) -> bool:
    """Return True if a universal folder exists, and its files are those that were written."""
    try:
        return not damage(folder, read_marker(folder)["files"])
    except ValueError:
        return False


def _check_names(source: Path, states: Iterable[str]) -> None:
    """Refuse a checkpoint whose names could lead out of the folder that it is converted into.

    Its author chose them, and DeepSpeed's converter makes folders of them without a check.
    """
    import torch

    for state in states:
        check_plain_name(state, "a state", str(source))
    for path in sorted(source.glob("*_states.pt")):
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content.get("ds_autoep_layers"):  # the converter makes names of experts from these
            raise GrowthError(
                "the checkpoint has mixture-of-experts layers",
                where=str(path),
                why="phigrow has no family with experts",
                fix="take the checkpoint of a dense model",
            )
        for name in _names_in(content):
            check_plain_name(name, "a parameter", str(path))


def _names_in(content: dict[str, Any]) -> Iterator[Any]:
    """Yield every parameter name in a file of a rank that becomes the name of a folder."""
    shapes, shard = content.get("param_shapes") or [], content.get("optimizer_state_dict") or {}
    for group in shapes if isinstance(shapes, list) else [shapes]:
        yield from group
    for mapping in shard.get("param_slice_mappings") or []:
        yield from mapping
    yield from content.get("module") or ()
    for group in (content.get("phigrow") or {}).get("groups") or []:
        yield from group


def _convert_zero(source: Path, folder: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    options = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(folder),
        num_extract_workers=1,  # more would fork a process that may hold a GPU
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(options)
    (folder.parent / "latest_universal").unlink(missing_ok=True)  # it names the unfinished folder
    forget_aliases(source, folder)


def forget_aliases(source: Path, folder: Path) -> None:
    """Delete the second copy of a tied parameter, under its other name, which DeepSpeed makes of ZeRO 1 and 2.

    Raises:
        GrowthError: two names stand for one parameter, and have masters of different values.
    """
    import torch

    content = torch.load(_model_states(source), map_location="cpu", weights_only=True, mmap=True)
    there = set(parameters(folder))
    for alias, name in dict(content.get("shared_params") or ()).items():
        if alias not in there or name not in there:
            continue
        if not torch.equal(*(stored(folder, each, "fp32").flatten() for each in (alias, name))):
            raise GrowthError(
                "the checkpoint ties two parameters that have different values",
                where=f"{alias} and {name}, {source}",
                fix="give another checkpoint of the run",
            )
        shutil.rmtree(folder / "zero" / alias)


def _convert_plain(source: Path, folder: Path, states: Iterable[str]) -> None:
    """Convert a checkpoint of ZeRO 0: one file with everything, in the order of the optimizer's parameter groups."""
    import torch

    content = torch.load(_model_states(source), map_location="cpu", weights_only=True)
    optimizer, names = content.get("optimizer"), [n for group in content["phigrow"]["groups"] for n in group]
    if not optimizer:
        raise GrowthError(
            "the checkpoint has no optimizer state",
            where=str(source),
            fix="take another checkpoint; delete this folder if its run is to start again",
        )
    masters = [t for group in optimizer["fp32_groups"] for t in group] if "fp32_groups" in optimizer else None
    moments = optimizer.get("optimizer_state_dict", optimizer)["state"]
    for index, name in enumerate(names):
        state = moments[index]
        master = content["module"][name] if masters is None else masters[index]
        for key, value in (("fp32", master), *((key, state[key]) for key in states if key in state)):
            path = folder / "zero" / name / f"{key}.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"param": value.detach().float()}, path)
    step = max((float(state["step"]) for state in moments.values() if "step" in state), default=0.0)
    torch.save({"step": step}, folder / "zero" / "optimizer_state.pt")


def _model_states(source: Path) -> Path:
    """Return the file with the state that ranks share. ZeRO 3 writes it once a rank; all agree in this part."""
    files = sorted(source.glob("*mp_rank_00_model_states.pt"))
    if not files:
        raise GrowthError(
            "the checkpoint has no model states",
            where=str(source),
            fix="take another checkpoint; delete this folder if its run is to start again",
        )
    return files[0]


def _state(source: Path, folder: Path) -> dict[str, Any]:
    """Return everything but weights and moments, as plain data."""
    import torch

    content = torch.load(_model_states(source), map_location="cpu", weights_only=True)
    common = torch.load(folder / "zero" / "optimizer_state.pt", map_location="cpu", weights_only=True)
    steps = sorted((folder / "zero").glob("*/step.pt"))
    if steps:  # ZeRO 1 and 2, one a parameter
        step = torch.load(steps[0], map_location="cpu", weights_only=True)
    elif "optimizer_state_dict" in common:  # ZeRO 3
        step = common["optimizer_state_dict"]["state"][0]["step"]
    else:
        step = common["step"]
    scaler = vars(common["loss_scaler"]) if "loss_scaler" in common else {}
    return {
        "adam_step": float(step),
        "lr_scheduler": content["lr_scheduler"],
        "counters": {key: content[key] for key in _COUNTERS},
        "loss_scaler": {key: value for key, value in scaler.items() if isinstance(value, bool | int | float)},
    }


def read_state(folder: Path) -> dict[str, Any]:
    """Return the content of ``state.json``, with the optimizer's states; folders of the first release are AdamW's.

    Raises:
        GrowthError: the file cannot be read, or names a state that could lead out of the folder.
    """
    state: dict[str, Any] = {"states": ADAM_STATES} | read_json_strict(folder / STATE, "the optimizer's state")
    if not isinstance(state["states"], dict):
        raise GrowthError(
            f"states is {state['states']!r}, but must be an object", where=str(folder / STATE), fix=_AGAIN
        )
    for name in state["states"]:
        check_plain_name(name, "a state", str(folder / STATE))
    return state


def states_of(folder: Path, name: str) -> tuple[str, ...]:
    """Return the states that a parameter of a universal folder has; parameters of Muon and of AdamW differ in them."""
    states = read_state(folder)["states"]
    return tuple(state for state in states if (folder / "zero" / name / f"{state}.pt").is_file())


def parameters(folder: Path) -> list[str]:
    """Return the names of the parameters in a universal folder."""
    return sorted(path.parent.name for path in (folder / "zero").glob("*/fp32.pt"))


def stored(folder: Path, name: str, key: str) -> Tensor:
    """Return a tensor of a universal folder, mapped from its file, flat or in its shape.

    Raises:
        GrowthError: the file is missing, or holds no tensor.
    """
    import torch

    path = folder / "zero" / name / f"{key}.pt"
    if not path.is_file():
        raise GrowthError(
            f"the universal checkpoint has no {key} of this parameter", where=f"{name}, {path}", fix=_AGAIN
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file may raise any exception
        raise GrowthError(
            "a file of the optimizer's state cannot be read", where=str(path), why=str(error), fix=_AGAIN
        ) from error
    value = content.get("param") if isinstance(content, dict) else content
    if not isinstance(value, torch.Tensor):
        raise GrowthError("a file of the optimizer's state holds no tensor", where=str(path), fix=_AGAIN)
    return value.detach()


def stored_in_shape(folder: Path, name: str, key: str, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor of a universal folder in the shape of its parameter, mapped from its file.

    Raises:
        GrowthError: as `stored`, or the file holds a tensor of another shape.
    """
    path, value = folder / "zero" / name / f"{key}.pt", stored(folder, name, key)
    count = 1
    for length in shape:
        count *= length
    if value.numel() != count or (value.ndim > 1 and tuple(value.shape) != shape):
        raise GrowthError(
            f"{key} has shape {list(value.shape)}, but its parameter has {list(shape)}",
            where=f"{name}, {path}",
            fix=_AGAIN,
        )
    return value.reshape(shape)
