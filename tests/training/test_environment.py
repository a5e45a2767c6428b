"""Variables of launchers in the environment, and signals that ask a run to stop."""

from __future__ import annotations

import os
import signal

import pytest

from phigrow.errors import GrowthError
from phigrow.training import entry
from phigrow.training.process import StopRequest, own_rank, prepare_environment

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """Set variables of a launcher, and nothing else of one; all are restored."""

    def put(**variables: str) -> None:
        for name in LAUNCHER:
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize("stray", [{"RANK": ""}, {"RANK": "1"}, {"RANK": "3", "WORLD_SIZE": ""}, {"WORLD_SIZE": "8"}])
def test_a_rank_without_companions_is_no_launch(environment, stray):
    environment(**stray)
    assert own_rank() == 0
    prepare_environment()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")
    assert int(os.environ["MASTER_PORT"]) > 0


def test_a_launch_is_left_as_it_is(environment):
    environment(RANK="1", WORLD_SIZE="2", MASTER_PORT="5")
    assert own_rank() == 1
    prepare_environment()
    assert (os.environ["RANK"], os.environ["MASTER_PORT"]) == ("1", "5")


@pytest.mark.parametrize("variables", [{"RANK": "first", "WORLD_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": "-2"}])
def test_a_variable_that_is_no_number_is_one_error(environment, variables, capsys):
    environment(**variables)
    with pytest.raises(GrowthError, match=r"(?s)environment variable .* is '.*unset RANK and WORLD_SIZE"):
        own_rank()
    assert entry.run(["--steps", "x"]) == (2, False)
    assert capsys.readouterr().err.startswith("error: the environment variable ")


def test_a_stray_rank_does_not_silence_a_bad_option(environment, capsys):
    environment(RANK="1")
    assert entry.run(["--stepz", "3"]) == (2, False)
    assert "no key 'stepz'" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_signals_ask_a_run_to_stop(number):
    former = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
    assert signal.getsignal(number) == former


def test_nohup_stays_in_force():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGHUP, former)
