"""Fixtures for every test; the tiny models themselves are made in tiny_models.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[..., Path]:
    """Write a model as a Hugging Face folder under the test's own directory."""

    def save(model: Any, name: str = "src", **how: Any) -> Path:
        folder = tmp_path / name
        model.save_pretrained(folder, **how)
        return folder

    return save


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """This process as the one rank of runs, and as before afterwards."""
    import deepspeed.comm.comm as comm
    import torch
    from deepspeed.utils import groups

    former = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    comm.cdb = groups._WORLD_GROUP = None  # DeepSpeed would take the group that is gone for the next one's
    os.environ.clear()
    os.environ.update(former)
