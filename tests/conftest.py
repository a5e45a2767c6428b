"""Fixtures for every test, and the rule that only marked tests start DeepSpeed. Tiny models: tiny_models.py."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

DEEPSPEED_COMMANDS = ("deepspeed.launcher", "scenarios.py", "pretrain.py")
"""Parts of a command by which a started process is known to train with DeepSpeed."""
MARKS = ("launch", "slow", "long")
"""Marks that take a test out of the default suite (setup.cfg)."""
running: list[pytest.Item] = []
"""The test that is running, if any."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Remember the running test, and whatever its fixtures start, for the rule below."""
    running.append(item)
    try:
        return (yield)
    finally:
        running.remove(item)


def refuse_unmarked_launches(event: str, words: tuple[Any, ...]) -> None:
    """Fail a test of the default suite that starts DeepSpeed: it would take the suite past its four minutes."""
    if event != "subprocess.Popen" or not running or any(map(running[-1].get_closest_marker, MARKS)):
        return
    command = [os.fsdecode(word) for word in words[1] if isinstance(word, str | bytes | os.PathLike)]
    if any(part in word for part in DEEPSPEED_COMMANDS for word in command):
        pytest.fail(f"{running[-1].nodeid} starts DeepSpeed ({' '.join(command)}): mark it with pytest.mark.launch")


sys.addaudithook(refuse_unmarked_launches)


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


NOBODY = 65534


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """Give up root's rights during a test, and return a folder of the test's own: root may read and write anything.

    A process that has no such rights needs no other user.
    """
    folder = Path(tempfile.mkdtemp(prefix="phigrow-nobody-"))  # pytest's folders are closed to others
    is_root = os.geteuid() == 0
    if is_root:
        os.chown(folder, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    try:
        yield folder
    finally:
        if is_root:
            os.seteuid(0)
        for root, _, _ in os.walk(folder):
            os.chmod(root, 0o700)
        shutil.rmtree(folder)
