"""Copies of batches from the host to the device, which a GPU makes while it computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def host_batch(blocks: Any, device: torch.device) -> Tensor:
    """Return a NumPy array as a tensor on the host, for a GPU in pinned memory.

    A GPU copies pinned memory by itself. Any other memory must be copied into a pinned buffer first, and the host waits
    for that.
    """
    import torch

    batch = torch.from_numpy(blocks)
    return batch.pin_memory() if device.type == "cuda" else batch


def to_device(batch: Tensor, device: torch.device) -> Tensor:
    """Return a host batch on the device; on a GPU the host does not wait for the copy.

    PyTorch gives pinned memory back only after the copies from it have ended, so the caller may drop the host batch.
    """
    return batch.to(device, non_blocking=device.type == "cuda")


def use_device(device: torch.device) -> None:
    """Choose the device of this thread. A new thread uses GPU 0, where pinning would take memory from another rank."""
    if device.type == "cuda":
        import torch

        torch.cuda.set_device(device)
