"""Checkpoints for any number of ranks and any ZeRO stage: DeepSpeed's universal format, written and read.

One folder, the same whatever engine wrote it:

    zero/<parameter>/fp32.pt          the parameter, fp32, whole (the master where weights are bf16 or fp16)
    zero/<parameter>/exp_avg.pt       Adam's first moment, fp32, of the same shape
    zero/<parameter>/exp_avg_sq.pt    Adam's second moment
    state.json                        Adam's step, the schedule, DeepSpeed's counters, the loss scale (where it was
                                      grown: Adam's step, the loss scale, where it comes from and where the data stood)
    complete.json                     progress, sizes and hashes, written last

``<parameter>`` is the name that ``named_parameters`` gives. A ``.pt`` file holds the tensor, flat or in its shape, or
``{"param": tensor}`` around it: what DeepSpeed's converter writes for ZeRO 3 and for ZeRO 1 and 2. ZeRO 0 has no
converter, so this module writes its folder; and DeepSpeed reads such folders only into the stage they came from, so
this module reads them, into any.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.checkpoints.integrity import damage, digests, read_marker, restricted_pickles, write_marker
from phigrow.errors import GrowthError
from phigrow.files.atomic import atomic_json
from phigrow.files.staged_folder import staged_folder
from phigrow.files.untrusted import read_json_strict

if TYPE_CHECKING:
    from torch import Tensor

STATE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def convert(source: Path, folder: Path, marker: dict[str, Any]) -> None:
    """Turn a checkpoint of DeepSpeed into a universal folder, in one process; what is there and whole is kept.

    The source's files must have been checked. Needs as much disk as the optimizer's state, twice while it runs.

    Args:
        source: the checkpoint, with the ``*_states.pt`` of every rank.
        folder: where the universal folder goes.
        marker: what the source's marker says.

    Raises:
        GrowthError: it holds an optimizer's state that was offloaded to NVMe, or none.
    """
    if is_complete(folder):
        return
    if (source / "offloaded_tensors").exists():
        raise GrowthError(
            "a checkpoint whose optimizer state was offloaded to NVMe",
            where=str(source),
            why="DeepSpeed cannot convert it",
            fix="resume as it was written, with the same ranks and stage",
        )
    from torch.utils.serialization import config

    shutil.rmtree(folder, ignore_errors=True)
    with staged_folder(folder) as partial:
        # Mapped, not read: to cut it into parameters DeepSpeed loads all state of a rank, and of every rank at ZeRO 3.
        with restricted_pickles(), config.patch("load.mmap", True):  # type: ignore[attr-defined]
            if any(source.glob("*_optim_states.pt")):
                _convert_zero(source, partial)
            else:
                _convert_plain(source, partial)
            atomic_json(partial / STATE, _state(source, partial))
        said = {key: value for key, value in marker.items() if key != "files"}
        write_marker(partial, said | {"universal": True}, digests(partial))


def is_complete(folder: Path) -> bool:
    """Return whether a universal folder is there, and its files are those that were written."""
    try:
        return not damage(folder, read_marker(folder)["files"])
    except ValueError:
        return False


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
    _forget_aliases(source, folder)


def _forget_aliases(source: Path, folder: Path) -> None:
    """Delete the second copy of a tied parameter, under its other name, which DeepSpeed makes of ZeRO 1 and 2."""
    import torch

    content = torch.load(_model_states(source), map_location="cpu", weights_only=True, mmap=True)
    aliases = set(content.get("shared_params") or ())
    for path in (folder / "zero").iterdir():
        if path.name in aliases:
            shutil.rmtree(path)


def _convert_plain(source: Path, folder: Path) -> None:
    """ZeRO 0: one file has everything, the optimizer's in the order of its parameter groups."""
    import torch

    content = torch.load(_model_states(source), map_location="cpu", weights_only=True)
    optimizer, names = content.get("optimizer"), [n for group in content["phigrow"]["groups"] for n in group]
    if not optimizer:
        raise GrowthError("a checkpoint without an optimizer's state", where=str(source), fix="delete this folder")
    masters = [t for group in optimizer["fp32_groups"] for t in group] if "fp32_groups" in optimizer else None
    moments = optimizer.get("optimizer_state_dict", optimizer)["state"]
    for index, name in enumerate(names):
        state = moments[index]
        master = content["module"][name] if masters is None else masters[index]
        for key, value in (("fp32", master), *((key, state[key]) for key in MOMENTS)):
            path = folder / "zero" / name / f"{key}.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"param": value.detach().float()}, path)
    step = float(moments[0]["step"])
    torch.save({"step": step}, folder / "zero" / "optimizer_state.pt")


def _model_states(source: Path) -> Path:
    """The file with what is not cut by rank; ZeRO 3 writes one a rank, all alike in that."""
    found = sorted(source.glob("*mp_rank_00_model_states.pt"))
    if not found:
        raise GrowthError("a checkpoint without model states", where=str(source), fix="delete this folder")
    return found[0]


def _state(source: Path, folder: Path) -> dict[str, Any]:
    """What is neither weight nor moment, as plain data."""
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


def load(engine: Any, folder: Path) -> None:
    """Fill an engine as `load_state`, and go on with the schedule and DeepSpeed's counters where they stood.

    Raises:
        GrowthError: as `load_state`.
    """
    state = load_state(engine, folder)
    engine.lr_scheduler.load_state_dict(state["lr_scheduler"])
    for group, lr in zip(engine.basic_optimizer.param_groups, engine.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = lr
    for key, value in state["counters"].items():
        setattr(engine, key, value)


def load_state(engine: Any, folder: Path) -> dict[str, Any]:
    """Fill an engine, at any ZeRO stage and on every rank, from a universal folder whose files have been checked.

    Weights, masters and moments are copied parameter by parameter from files mapped into memory, so a rank reads
    little more than its share of what ZeRO cuts. Adam's step and the loss scale come with them.

    Returns:
        The content of ``state.json``.

    Raises:
        GrowthError: a parameter that the folder lacks or has in another size; an optimizer offloaded to NVMe.
    """
    if engine.zero_nvme_offload_optimizer():
        raise GrowthError(
            "an optimizer offloaded to NVMe cannot be filled from another number of ranks or stage",
            where=str(folder),
            fix="resume with offload_optimizer on cpu, or with the ranks and stage that wrote the checkpoint",
        )
    state = read_json_strict(folder / STATE, "the state of an optimizer")
    optimizer, base = engine.optimizer, engine.basic_optimizer
    _make_states(optimizer, base)
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()  # ZeRO 1 and 2 link moments to parameters at the first step
    if hasattr(optimizer, "checkpoint_event_prologue"):
        optimizer.checkpoint_event_prologue()  # ZeRO 3: no parameter stays whole
    masters = _plain_masters(optimizer)
    for name, parameter in engine.module.named_parameters():
        wanted = tuple(getattr(parameter, "ds_shape", parameter.shape))
        values = {key: _read(folder, name, key, wanted) for key in ("fp32", *MOMENTS)}
        _fill(parameter, values, base, masters)
    if hasattr(optimizer, "checkpoint_event_epilogue"):
        optimizer.checkpoint_event_epilogue()
    for entry in base.state.values():
        if "step" in entry:
            _set_step(entry, state["adam_step"])
    restore_scaler(getattr(optimizer, "loss_scaler", None), state["loss_scaler"])
    return state


def _make_states(optimizer: Any, base: Any) -> None:
    """Give Adam the moments that it makes at its first step, where DeepSpeed has not taken an empty one."""
    import torch

    in_groups = [parameter for group in base.param_groups for parameter in group["params"]]
    on_device = any(group.get("fused") or group.get("capturable") for group in base.param_groups)
    for parameter in getattr(optimizer, "fp32_partitioned_groups_flat", in_groups):  # ZeRO 3 empties its groups
        entry = base.state[parameter]
        if "exp_avg" in entry:
            continue
        zero = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
        entry["step"] = zero if type(base).__module__.startswith("torch.") else 0  # DeepSpeed's Adam counts in int
        entry |= {key: torch.zeros_like(parameter.data, dtype=torch.float32) for key in MOMENTS}


def restore_scaler(scaler: Any, saved: dict[str, Any]) -> None:
    """Give a loss scaler of DeepSpeed the numbers that one had (its scale, counters and window)."""
    for key, value in saved.items():
        if hasattr(scaler, key):
            setattr(scaler, key, value)


def parameters(folder: Path) -> list[str]:
    """The names of the parameters that a universal folder holds."""
    return sorted(path.parent.name for path in (folder / "zero").glob("*/fp32.pt"))


def stored(folder: Path, name: str, key: str) -> Tensor:
    """A tensor of a universal folder, mapped from its file, flat or in its shape.

    Raises:
        GrowthError: it is not there, or it is no tensor.
    """
    import torch

    path = folder / "zero" / name / f"{key}.pt"
    if not path.is_file():
        raise GrowthError("a parameter that the universal checkpoint does not have", where=f"{name}, {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what a damaged or hostile file raises is the loader's secret
        raise GrowthError("a file of optimizer state that cannot be read", where=str(path), why=str(error)) from error
    value = content.get("param") if isinstance(content, dict) else content
    if not isinstance(value, torch.Tensor):
        raise GrowthError("a file of optimizer state that holds no tensor", where=str(path))
    return value.detach()


def _read(folder: Path, name: str, key: str, shape: tuple[int, ...]) -> Tensor:
    path, value = folder / "zero" / name / f"{key}.pt", stored(folder, name, key)
    count = 1
    for length in shape:
        count *= length
    if value.numel() != count or (value.ndim > 1 and tuple(value.shape) != shape):
        raise GrowthError(
            f"{key} of shape {list(value.shape)} for a parameter of {list(shape)}", where=f"{name}, {path}"
        )
    return value.reshape(shape)


def _plain_masters(optimizer: Any) -> dict[int, Any]:
    """The fp32 masters of DeepSpeed's bf16 without ZeRO, by the identity of their parameters."""
    groups = zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=False)
    return {id(low): high for lows, highs in groups for low, high in zip(lows, highs, strict=True)}


def _fill(parameter: Any, values: dict[str, Tensor], base: Any, masters: dict[int, Any]) -> None:
    import torch

    if hasattr(parameter, "ds_id"):  # ZeRO 3; its own setter for whole values fails where the last rank's is padded
        length = parameter.ds_tensor.numel()
        start = length * parameter._z3_optimizer._get_param_partition_rank(parameter)
        for key, value in values.items():
            mine = value.flatten()[start : start + length]
            mine = torch.nn.functional.pad(mine, (0, length - len(mine)))
            parameter._z3_optimizer.set_local_hp_param(mine, parameter, None if key == "fp32" else key)
            if key == "fp32":
                parameter.ds_tensor.data.copy_(mine)
        return
    parameter.data.copy_(values["fp32"])
    if hasattr(parameter, "_hp_mapping"):  # ZeRO 1 and 2
        parameter.set_full_hp_param(values["fp32"])
        for key in MOMENTS:
            parameter.set_full_hp_param(values[key], key)
        return
    master = masters.get(id(parameter), parameter)
    master.data.copy_(values["fp32"])
    for key in MOMENTS:
        base.state[master][key].copy_(values[key])


def _set_step(entry: dict[str, Any], step: float) -> None:
    if hasattr(entry["step"], "fill_"):
        entry["step"].fill_(step)
    else:
        entry["step"] = int(step)
