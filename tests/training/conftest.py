"""One launch of DeepSpeed for the runs of many test files, because starting it takes longer than a tiny run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from launching import run_scenarios


class Launches:
    """Runs that were asked for, each file's in a folder of its own; all files' are made together at the first request.

    A test file lists its runs in ``scenarios(folder, ranks)``. Those on two ranks are made first, and then those on
    one, which may start from them. Test processes that share the folder make the runs once: one makes them, and the
    others wait.
    """

    def __init__(self, folder: Path, files: list[str]) -> None:
        self._folder, self._files = folder, files

    def __call__(self, file: str) -> Path:
        """Return the folder of a test file's runs; ``file`` is its ``__name__``."""
        begun = self._folder / "begun"
        with FileLock(self._folder / "lock"):
            if not begun.exists():
                begun.touch()
                self._make()
        return self.folder(file)

    def _make(self) -> None:
        for ranks in (2, 1):
            listed = [
                {**run, "out": str(self.folder(name) / run["out"])}
                for name in self._files
                for run in sys.modules[name].scenarios(self.folder(name), ranks)
            ]
            if listed:
                run_scenarios(ranks, self._folder, listed)

    def folder(self, file: str) -> Path:
        """The folder of a test file, which is there."""
        folder = self._folder / file
        folder.mkdir(exist_ok=True)
        return folder


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that trains under DeepSpeed, before tests are chosen by their marks."""
    for item in items:
        if {"launches", "alone"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.launch)


@pytest.fixture(scope="session")
def launches(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give a test file's name, get the folder with its runs."""
    asking = [item.module.__name__ for item in request.session.items if "launches" in item.fixturenames]
    base = tmp_path_factory.getbasetemp()
    # xdist gives each test process a folder in one of their own.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "runs"
    folder.mkdir(exist_ok=True)
    return Launches(folder, list(dict.fromkeys(asking)))
