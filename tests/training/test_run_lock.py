"""One launch at a time trains in a run folder: the lock, and file systems that have none."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys

import pytest

from phigrow.errors import GrowthError
from phigrow.training.run_lock import LOCK, run_lock

HOLD = """
import sys, time
from pathlib import Path
from phigrow.training.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_launch_is_refused_until_the_first_has_ended(tmp_path):
    out = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "held\n"
            message = r"(?s)another launch trains in this run folder.*run.*choose another --out"
            with pytest.raises(GrowthError, match=message), run_lock(out):
                pass
        finally:
            child.kill()
    with run_lock(out):  # killed, it holds nothing
        assert (out / LOCK).is_file()
    with run_lock(out):
        pass


@pytest.mark.parametrize(("number", "goes_on"), [(errno.ENOTSUP, True), (errno.ENOLCK, True), (errno.EACCES, False)])
def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch, number, goes_on):
    def flock(*_):
        raise OSError(number, "flock")

    monkeypatch.setattr(fcntl, "flock", flock)
    if goes_on:
        with run_lock(tmp_path):
            pass
    else:
        with pytest.raises(GrowthError, match="flock"), run_lock(tmp_path):
            pass
