"""Check that PyTorch can use the GPUs of this host, before a process group is made."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phigrow.errors import GrowthError

if TYPE_CHECKING:
    import torch

DEVICES = Path("/dev")
"""Folder of the device files. A host or container that may use NVIDIA GPUs has ``nvidia0`` and so on there."""

ON_CPU = "to train on CPUs all the same, set CUDA_VISIBLE_DEVICES to an empty value"


def check_gpus_work(ranks: int, local_rank: int) -> None:
    """Refuse GPUs that PyTorch cannot use; call it on every rank before it joins the others.

    Args:
        ranks: number of ranks.
        local_rank: number of this rank on its host.

    Raises:
        GrowthError: the host has GPUs and PyTorch sees none, several GPUs have no NCCL, there are fewer GPUs than
            ranks, or a GPU does not run a kernel.
    """
    import torch

    if os.environ.get("DS_ACCELERATOR", "cuda") != "cuda":  # DeepSpeed is asked for another device
        return
    if not torch.cuda.is_available():
        _check_no_gpu_is_lost()
        return
    if ranks > 1 and not torch.distributed.is_nccl_available():
        raise GrowthError(
            f"{ranks} GPUs cannot communicate",
            where="torch.distributed",
            why="this build of PyTorch has no NCCL",
            fix="install PyTorch from pytorch.org for your version of CUDA, or train on one GPU",
        )
    if local_rank >= (count := torch.cuda.device_count()):
        mig = " A process sees one MIG instance at most." if "MIG" in torch.cuda.get_device_name(0) else ""
        raise GrowthError(
            f"LOCAL_RANK is {local_rank}, but this host has {count} {'device' if count == 1 else 'devices'}",
            where="LOCAL_RANK",
            why=f"CUDA_VISIBLE_DEVICES is {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}.{mig}",
            fix="start one rank for each device",
        )
    _check_kernel(torch.device("cuda", local_rank))


def _check_no_gpu_is_lost() -> None:
    """Refuse to train on a CPU where the host has GPUs that nobody has hidden."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = sorted(path.name for path in DEVICES.glob("nvidia[0-9]*"))
    if not found or (visible is not None and visible.strip() in ("", "-1")):
        return
    fix = f"install PyTorch from pytorch.org for your driver, which nvidia-smi shows; {ON_CPU}"
    if torch.version.cuda is None:
        why = f"PyTorch {torch.__version__} was built without CUDA"
    else:
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
            why = "torch.cuda.is_available() is false"
        except (RuntimeError, AssertionError) as error:
            why = f"{str(error).strip().partition(chr(10))[0][:300]} (PyTorch {torch.__version__})"
            if "too old" in why:
                fix = f"update the driver, or install a PyTorch for an older CUDA from pytorch.org; {ON_CPU}"
        if visible is not None:
            why += f"; CUDA_VISIBLE_DEVICES is {visible}"
            fix = f"correct CUDA_VISIBLE_DEVICES; {fix}"
    raise GrowthError(
        "this host has NVIDIA GPUs, but PyTorch cannot use them", where=", ".join(f"/dev/{name}" for name in found[:8]),
        why=why, fix=fix,
    )  # fmt: skip


def _check_kernel(device: torch.device) -> None:
    """Refuse a GPU that runs no kernel of this PyTorch, is taken by another process, or is broken."""
    import torch

    try:
        total = float((torch.ones(8, device=device) + 1).sum())
    except RuntimeError as error:
        major, minor = torch.cuda.get_device_capability(device)
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise GrowthError(
            f"the GPU {torch.cuda.get_device_name(device)} runs no kernel",
            where=str(device),
            why=f"{lines[0][:300] if lines else type(error).__name__}; the GPU is sm_{major}{minor}, and PyTorch "
            f"{torch.__version__} is built for {', '.join(torch.cuda.get_arch_list())}",
            fix="if the GPU is not in this list, install a PyTorch that is built for it (older GPUs need older "
            "releases); if its memory is taken or it is exclusive, end the process that nvidia-smi shows; else restart "
            "the host",
        ) from error
    assert total == 16.0


@dataclass(frozen=True)
class Gpu:
    """Properties of the GPU of one rank: its host and name, its memory in bytes, and native bf16."""

    host: str
    name: str
    memory: int
    free: int
    bf16: bool


def gpu_of(device: torch.device) -> Gpu | None:
    """Return the properties of a GPU; None for a CPU. Memory that this process has reserved counts as free."""
    if device.type != "cuda":
        return None
    import torch

    found = torch.cuda.get_device_properties(device)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    bf16 = bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return Gpu(socket.gethostname(), found.name, found.total_memory, free, bf16)


def check_together(gpus: Sequence[Gpu], dtype: str) -> str | None:
    """Refuse GPUs that cannot train one model together.

    Args:
        gpus: of all ranks.
        dtype: the setting.

    Returns:
        A line for the user if the GPUs differ, else None.

    Raises:
        GrowthError: ranks share a GPU that is divided by MIG, or only some GPUs compute in bf16.
    """
    hosts = Counter(gpu.host for gpu in gpus if "MIG" in gpu.name)
    if any(ranks > 1 for ranks in hosts.values()):
        raise GrowthError(
            "several ranks are on MIG instances of one host",
            where=", ".join(sorted(hosts)),
            why="NCCL takes the instances of a GPU for one device, and they cannot copy to each other",
            fix="train on one instance with one rank, or let the administrator turn MIG off",
        )
    without = [rank for rank, gpu in enumerate(gpus) if not gpu.bf16]
    if dtype in ("auto", "bf16") and 0 < len(without) < len(gpus):
        raise GrowthError(
            "only some of the GPUs compute in bf16",
            where=f"dtype {dtype}, ranks {', '.join(map(str, without))}",
            why=f"the {gpus[without[0]].name} has no bf16",
            fix="set dtype: fp16, or train on GPUs of one kind",
        )
    kinds = Counter(gpu.name for gpu in gpus)
    if len(kinds) < 2:
        return None
    listed = ", ".join(f"{count} x {name}" for name, count in kinds.items())
    return f"notice: the ranks have different GPUs ({listed}). All wait for the slowest, and the smallest memory counts"
