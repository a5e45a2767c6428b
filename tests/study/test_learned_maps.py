"""The command by which a study learns the maps of an arm."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest
from studies import loaded

from phigrow.errors import GrowthError
from phigrow.study import learning
from phigrow.study.job import Job
from phigrow.study.settings import Arm


@pytest.mark.parametrize("growth", [{"depth": "interpose", "rounding": "half-up", "start": "tile"}, {}])
def test_the_command_has_every_option_of_the_growth(tmp_path, monkeypatch, growth):
    commands = []
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: commands.append(command) or SimpleNamespace(returncode=3)
    )
    arm = Arm("ligo", "ligo", growth=growth, learn={"steps": 7})
    job = Job("ligo/seed0/start", "expand", "key", tmp_path / "start", arm=arm, seed=2)
    with pytest.raises(GrowthError, match=r"learning the maps ended with code 3\n  where: .*start-maps"):
        learning.learned_maps(loaded(tmp_path), job, tmp_path / "source", tmp_path / "data")
    (command,) = commands
    options = dict(zip(command[4::2], command[5::2], strict=True))
    assert options["--steps"] == "7"
    assert options["--seed"] == "2"
    assert options["--method"] == ("ligo:start=tile" if growth else "ligo")
    assert (options.get("--depth"), options.get("--rounding")) == (growth.get("depth"), growth.get("rounding"))
