"""One launch of DeepSpeed for the runs of many test files, because starting it takes longer than a tiny run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import run_scenarios


class Launches:
    """Runs that were asked for, each file's in a folder of its own; all files' are made together at the first request.

    A test file lists its runs in ``scenarios(folder, ranks)``. Those on two ranks are made first, and then those on
    one, which may start from them.
    """

    def __init__(self, folder: Path, files: list[str]) -> None:
        self._folder, self._files, self._made = folder, files, False

    def __call__(self, file: str) -> Path:
        """Return the folder of a test file's runs; ``file`` is its ``__name__``."""
        if not self._made:
            self._made = True
            for ranks in (2, 1):
                listed = [
                    {**run, "out": str(self.folder(name) / run["out"])}
                    for name in self._files
                    for run in sys.modules[name].scenarios(self.folder(name), ranks)
                ]
                if listed:
                    run_scenarios(ranks, self._folder, listed)
        return self.folder(file)

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
    return Launches(tmp_path_factory.mktemp("runs"), list(dict.fromkeys(asking)))
