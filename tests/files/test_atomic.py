"""Files and folders are there completely or not at all, whatever interrupts their writer."""

import json
import os
import subprocess
import sys

import pytest

from phigrow.errors import GrowthError
from phigrow.files.atomic import atomic_json, atomic_path, atomic_write
from phigrow.files.lock import locked
from phigrow.files.staged_folder import StagedFolder, staged_folder
from phigrow.files.untrusted import read_json_strict

HOLD = """
import sys
from pathlib import Path
from phigrow.files.staged_folder import StagedFolder
with StagedFolder(Path(sys.argv[1]), None):
    print("held", flush=True)
    sys.stdin.read()
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_text_bytes_and_json(tmp_path):
    atomic_write(tmp_path / "a.txt", "naïve\n")
    atomic_write(tmp_path / "b.bin", b"\x00\xff")
    atomic_json(tmp_path / "c.json", {"k": [1]})
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "naïve\n"
    assert (tmp_path / "b.bin").read_bytes() == b"\x00\xff"
    assert (tmp_path / "c.json").read_text() == '{\n "k": [\n  1\n ]\n}\n'
    assert names(tmp_path) == ["a.txt", "b.bin", "c.json"]


def test_bytes_of_paths_that_are_not_utf8_are_written_and_read_again(tmp_path):
    path = b"caf\xe9/a".decode("utf-8", "surrogateescape")
    atomic_write(tmp_path / "card.md", f"grown from {path}")
    assert (tmp_path / "card.md").read_text(encoding="utf-8") == "grown from caf\\udce9/a"
    atomic_json(tmp_path / "run.json", {"data": path})
    assert read_json_strict(tmp_path / "run.json", "the run") == {"data": path}
    assert os.fsencode(read_json_strict(tmp_path / "run.json", "the run")["data"]) == b"caf\xe9/a"
    atomic_json(tmp_path / "half.json", {"data": "\ud800"})  # no byte of a path
    with pytest.raises(GrowthError, match="surrogates not allowed"):
        read_json_strict(tmp_path / "half.json", "the run")


def test_a_failed_write_leaves_the_former_file(tmp_path):
    atomic_write(tmp_path / "a.png", "old")

    def draw():
        with atomic_path(tmp_path / "a.png") as path:
            assert path.suffix == ".png"
            path.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw()
    assert (tmp_path / "a.png").read_text() == "old"
    with pytest.raises(TypeError):
        atomic_json(tmp_path / "a.png", {"k": object()})
    assert (tmp_path / "a.png").read_text() == "old"
    assert names(tmp_path) == ["a.png"]


def test_a_folder_replaces_the_older_one_at_the_end(tmp_path):
    out = tmp_path / "deep" / "out"
    with staged_folder(out) as folder:
        (folder / "one").write_text("1")
        (folder.parent / "scratch").write_text("x")
        assert not out.exists()
    assert names(out) == ["one"]
    with staged_folder(out) as folder:
        (folder / "two").write_text("2")
        assert names(out) == ["one"]
    assert names(out) == ["two"]
    assert names(out.parent) == ["out"]


def test_a_folder_that_fails_leaves_nothing_or_the_older_one(tmp_path):
    def fail(out):
        with staged_folder(out) as folder:
            (folder / "half").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "deep" / "er" / "out")
    assert names(tmp_path) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["old"]


def test_what_a_killed_process_left_is_not_taken_over(tmp_path):
    left = tmp_path / ".out.partial" / "content"
    left.mkdir(parents=True)
    (left / "stale").touch()
    (left.parent / "journal.jsonl").write_text("null\n")
    with staged_folder(tmp_path / "out") as folder:
        (folder / "new").touch()
    assert names(tmp_path / "out") == ["new"]


def test_one_process_owns_a_folder(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(GrowthError, match=r"another process is writing this output\n  where: .*out"):
            StagedFolder(out, None)
        child.kill()
    with StagedFolder(out, None) as staged:  # the lock ended with its process
        assert not staged.resumed


def test_a_lock_is_held_by_one_block(tmp_path):
    def hold():
        return locked(tmp_path / "lock", "taken", where=tmp_path, fix="wait")

    with hold(), pytest.raises(GrowthError, match=r"taken\n  where: .*\n  what to do: wait"), hold():
        pass
    with hold():
        pass


def test_nan_is_read_only_where_it_is_expected(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"a": float("nan"), "b": float("-inf")}))
    with pytest.raises(GrowthError, match="a record cannot be read"):
        read_json_strict(path, "a record")
    found = read_json_strict(path, "a record", nan=True)
    assert found["a"] != found["a"]
    assert found["b"] == float("-inf")
