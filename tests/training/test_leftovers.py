"""Names in shared memory and locks of compilations: what is taken away, and what is left alone."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

from phigrow.errors import GrowthError
from phigrow.training import process
from phigrow.training.deepspeed_cleanup import free_compile_lock

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc and shared memory with names: Linux only")


def extension(monkeypatch, tmp_path: Path, *, age: float) -> Path:
    """A folder of an extension, last written ``age`` seconds ago, with a lock in it, which is returned."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "0")
    lock = tmp_path / "made_up_op" / "lock"
    lock.parent.mkdir()
    for path in (lock, lock.parent / "build.ninja"):
        path.touch()
        os.utime(path, times=(time.time() - age,) * 2)
    return lock


def test_the_lock_of_a_killed_compilation_is_removed_and_said(monkeypatch, tmp_path, capsys):
    lock = extension(monkeypatch, tmp_path, age=600)
    free_compile_lock("another_op")
    assert lock.exists()  # another extension's
    free_compile_lock("made_up_op")
    assert not lock.exists()
    assert (lock.parent / "build.ninja").exists()
    assert capsys.readouterr().out == f"removed the lock of a compilation that was killed: {lock}\n"
    free_compile_lock("made_up_op")  # nothing is there
    assert capsys.readouterr().out == ""


def test_the_lock_of_a_compilation_that_runs_here_is_left_alone(monkeypatch, tmp_path, capsys):
    lock = extension(monkeypatch, tmp_path, age=600)
    holder = os.open(lock, os.O_RDONLY)  # as PyTorch's FileBaton
    try:
        free_compile_lock("made_up_op")
        assert lock.exists()
    finally:
        os.close(holder)
    free_compile_lock("made_up_op")  # negative control: it was the open file that kept it
    assert not lock.exists()


def test_a_young_lock_is_waited_for_and_the_text_says_what_to_do(monkeypatch, tmp_path, capsys):
    lock = extension(monkeypatch, tmp_path, age=0)
    started = time.monotonic()
    free_compile_lock("made_up_op", stale=1.0)
    assert 0.9 < time.monotonic() - started < 5
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"waiting up to 1 s for a compilation on another machine; if there is none, delete {lock}"
    assert second.startswith("removed the lock")


def test_a_lock_with_a_time_of_tomorrow_is_waited_for_no_longer_than_others(monkeypatch, tmp_path, capsys):
    lock = extension(monkeypatch, tmp_path, age=-86400)
    started = time.monotonic()
    free_compile_lock("made_up_op", stale=1.0)
    assert 0.9 < time.monotonic() - started < 5
    assert not lock.exists()
    assert capsys.readouterr().out.startswith("waiting up to 1 s for a compilation on another machine")


def test_a_write_with_a_time_of_tomorrow_keeps_a_lock(monkeypatch, tmp_path, capsys):
    lock = extension(monkeypatch, tmp_path, age=-86400)
    later = time.time() + 90000
    threading.Timer(0.6, lambda: os.utime(lock.parent / "build.ninja", times=(later, later))).start()
    started = time.monotonic()
    free_compile_lock("made_up_op", stale=1.0)
    assert 1.5 < time.monotonic() - started < 6


def test_what_is_written_beside_a_lock_keeps_it(monkeypatch, tmp_path, capsys):
    lock = extension(monkeypatch, tmp_path, age=600)
    (lock.parent / "shm.o").touch()
    threading.Timer(0.5, lock.unlink).start()  # the other machine is done
    free_compile_lock("made_up_op")
    assert "removed" not in capsys.readouterr().out


def test_only_the_first_rank_of_a_host_removes_and_speaks(monkeypatch, tmp_path, capsys):
    lock = extension(monkeypatch, tmp_path, age=600)
    monkeypatch.setenv("LOCAL_RANK", "1")
    waiting = threading.Thread(target=free_compile_lock, args=("made_up_op",))
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    assert lock.exists()
    lock.unlink()
    waiting.join(5)
    assert not waiting.is_alive()
    assert capsys.readouterr().out == ""


def test_a_lock_that_cannot_be_removed_is_named(monkeypatch, tmp_path):
    lock = extension(monkeypatch, tmp_path, age=600)

    def refuse(path: Path, missing_ok: bool) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(GrowthError, match="left a lock that cannot be removed") as caught:
        free_compile_lock("made_up_op")
    assert caught.value.where == str(lock)
    assert "TORCH_EXTENSIONS_DIR" in caught.value.fix


@pytest.mark.parametrize("there", [True, False])
def test_the_ninja_beside_the_interpreter_comes_first(tmp_path, monkeypatch, there):
    """As under DeepSpeed's launcher: each version of ninja builds anew what another has built."""
    own, other = tmp_path / "own", tmp_path / "other"
    for folder in (own, other):
        folder.mkdir()
        (folder / "ninja").write_text("#!/bin/sh\n")
        (folder / "ninja").chmod(0o755)
    if not there:
        (own / "ninja").unlink()
    monkeypatch.setattr(sys, "executable", str(own / "python"))
    monkeypatch.setenv("PATH", f"{other}{os.pathsep}{own}")
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "GOMP_SPINCOUNT": "1"}.items():
        monkeypatch.setenv(key, value)
    for _ in range(2):  # and once only
        process.prepare_environment()
        assert shutil.which("ninja") == str((own if there else other) / "ninja")
    assert os.environ["PATH"].count(str(own)) == 1 + there
