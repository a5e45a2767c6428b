"""Offload of optimizer state and parameters to the memory or the disk of the host."""

from __future__ import annotations

from typing import Any

from phigrow.errors import GrowthError
from phigrow.files.paths import user_text
from phigrow.training.configuration import RunConfig
from phigrow.training.deepspeed_cleanup import free_compile_lock

DEVICES = ("cpu", "nvme")
_SECTIONS = ("offload_optimizer", "offload_param")


def offload_sections(config: RunConfig, section: dict[str, Any]) -> dict[str, Any]:
    """Return DeepSpeed's ``zero_optimization`` with the run's offload keys in it.

    Raises:
        GrowthError: the file contradicts the run, the ZeRO stage does not allow it, or nvme has no folder.
    """
    out = dict(section)
    for key in _SECTIONS:
        device, in_file = getattr(config, key), dict(out.get(key) or {})
        if device is not None and in_file.get("device", device) != device:
            raise GrowthError(
                f"{key} is {device}, but the DeepSpeed file has {in_file['device']}",
                where=str(config.deepspeed),
                fix=f"remove {key}, or its section in the file",
            )
        device = device or in_file.get("device")
        if device in (None, "none"):
            continue
        if device not in DEVICES:
            raise GrowthError(f"{key} is {device!r}", where=key, fix=f"choose one of {', '.join(DEVICES)}")
        least = 3 if key == "offload_param" or device == "nvme" else 1
        if config.stage < least:
            raise GrowthError(
                f"{key} to {device} requires ZeRO stage {least} or more (got {config.stage})",
                where=key,
                why=f"DeepSpeed offloads to {device} only parts that a rank does not share with others",
                fix="set zero: 3" if least == 3 else "set zero: 1, 2 or 3",
            )
        path = config.offload_dir or in_file.get("nvme_path")
        if device == "nvme" and not path:
            raise GrowthError(
                f"{key} to nvme requires offload_dir", where="offload_dir", fix="give a folder on that disk"
            )
        out[key] = in_file | {"device": device} | ({"nvme_path": user_text(str(path))} if device == "nvme" else {})
    return out


def offloads_optimizer(engine_dict: dict[str, Any]) -> bool:
    """Return true if the optimizer's state is in the memory or on the disk of the host."""
    section = engine_dict.get("zero_optimization", {}).get("offload_optimizer") or {}
    return section.get("device") in DEVICES


def optimizer_device(config: RunConfig) -> str:
    """Return the device of the optimizer's state: ``device``, ``cpu`` or ``nvme``.

    Raises:
        GrowthError: as `offload_sections`.
    """
    section = offload_sections(config, config.deepspeed_file().get("zero_optimization", {})).get("offload_optimizer")
    device = (section or {}).get("device")
    return str(device) if device in DEVICES else "device"


def check_disk(engine_dict: dict[str, Any]) -> None:
    """Refuse offload to a disk if DeepSpeed cannot read and write it on this host.

    Raises:
        GrowthError: DeepSpeed cannot build its extension for asynchronous reads and writes.
    """
    zero = engine_dict.get("zero_optimization", {})
    if not any((zero.get(key) or {}).get("device") == "nvme" for key in _SECTIONS):
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise GrowthError(
            "DeepSpeed cannot offload to a disk here",
            where="offload_optimizer, offload_param",
            why="its async_io needs libaio",
            fix="install libaio with its headers (libaio-dev), or offload to cpu",
        )
    free_compile_lock("async_io")
