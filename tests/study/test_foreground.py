"""Ranks that a command starts: what a user is told at Ctrl-C. No process is started here."""

from __future__ import annotations

import sys

import pytest

from phigrow.errors import GrowthError
from phigrow.study import foreground, launch


def test_runs_that_stop_say_that_they_save_first(monkeypatch, tmp_path):
    said: list[str] = []
    idle = [sys.executable, "-c", ""]
    monkeypatch.setattr(launch, "launcher", lambda *words: idle)
    with pytest.raises(KeyboardInterrupt), launch.Ranks(1, say=said.append):
        raise KeyboardInterrupt
    assert said == []  # no rank was started

    def interrupted() -> None:
        with launch.Ranks(1, say=said.append) as ranks:
            ranks.begin({"out": str(tmp_path / "run")})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert said == ["starting DeepSpeed ranks (up to a minute)", "stopping: runs save a checkpoint first"]


def test_the_launcher_prints_errors_only_and_passes_words_on():
    command = launch.launcher(2, 0, "phigrow.training", "phi-2", "--steps", "5")
    assert command[-5:] == ["--module", "phigrow.training", "phi-2", "--steps", "5"]
    assert "--log_level=error" in command


def test_words_are_read_before_any_rank_starts(monkeypatch):
    monkeypatch.setattr(foreground, "launcher", None)
    monkeypatch.setattr(foreground, "main", None)
    with pytest.raises(GrowthError, match="did you mean steps"):
        foreground.pretrain(["phi-2", "--stepz", "3"], ranks=2)
    with pytest.raises(GrowthError, match="there is no such recipe"):
        foreground.pretrain(["phi-9"], ranks=1)


def test_one_rank_is_this_process(monkeypatch):
    seen: list[list[str]] = []
    monkeypatch.setattr(foreground, "main", lambda words: seen.append(words) or 2)
    assert foreground.pretrain(["demo", "--steps", "50"], ranks=1) == 2
    assert seen == [["demo", "--steps", "50"]]
