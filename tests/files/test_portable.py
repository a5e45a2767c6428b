"""Growing and verifying where Linux's calls, DeepSpeed, datasets, accelerate and matplotlib do not exist."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import phi_config, phi_model

from phigrow.errors import GrowthError
from phigrow.files import portable
from phigrow.files.lock import locked
from phigrow.files.machine_errors import PACKAGES, machine_error

RECORDS = Path(__file__).parents[1] / "golden" / "records.jsonl"
POSIX = ("pread", "preadv", "pwrite", "geteuid", "getuid", "killpg", "O_NOFOLLOW")

ELSEWHERE = f"""
import os, subprocess, sys, types
from importlib.machinery import PathFinder
hidden = ("fcntl", "deepspeed", "datasets", "accelerate", "matplotlib")
real = PathFinder.find_spec
def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in hidden else real(name, path, target)
PathFinder.find_spec = classmethod(find_spec)
for name in hidden:
    sys.modules.pop(name, None)
held = set()
def locking(descriptor, mode, size):
    key = os.fstat(descriptor).st_ino
    if key in held:
        raise PermissionError(13, "Permission denied")
    held.add(key)
sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
for name in {POSIX}:
    if hasattr(os, name):
        delattr(os, name)
from phigrow.cli import main
codes = []
for words in sys.argv[1].split("|"):
    sys.argv = ["phigrow", *words.split()]
    try:
        main()
    except SystemExit as ended:
        codes.append(ended.code or 0)
print("codes", codes, "locks", len(held), [name for name in hidden if name in sys.modules])
"""


@pytest.mark.slow
def test_growing_and_verifying_need_neither_linux_nor_deepspeed(save_model, tmp_path):
    folder = save_model(phi_model(phi_config()))
    (tmp_path / "dst.json").write_text(json.dumps(phi_config(48, 6, 72, 3, 4)))
    growth = f"--src {folder} --dst-config dst.json --method lossless"
    commands = [
        f"plan {growth}", f"expand {growth} --out grown", f"verify {folder} grown", "inspect grown",
        "report runs --out report", "pretrain --steps 1 --warmup 0 --out run",
    ]  # fmt: skip
    for name in ("scratch", "grown"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        shutil.copy(RECORDS, tmp_path / "runs" / name)
    words = [sys.executable, "-c", ELSEWHERE, "|".join(commands)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.endswith("codes [0, 0, 0, 0, 2, 2] locks 1 []\n"), done.stderr
    assert (tmp_path / "grown" / "model.safetensors").is_file()
    # Training says what to install before it makes anything.
    assert "error: the package d" in done.stderr
    assert "pip install 'd" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", [(), POSIX])
def test_files_are_read_and_written_at_a_position(tmp_path, monkeypatch, missing):
    for name in missing:
        monkeypatch.delattr(os, name, raising=False)
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    descriptor = os.open(path, os.O_RDWR)
    assert portable.read_at(descriptor, 3, 4) == b"456"
    buffer = memoryview(bytearray(20))
    assert portable.read_into(descriptor, buffer, 8) == 2
    assert bytes(buffer[:3]) == b"89\0"
    assert portable.read_into(descriptor, buffer, 10) == 0
    assert portable.write_at(descriptor, memoryview(b"ab"), 1) == 2
    os.close(descriptor)
    portable.force_to_disk(path)
    assert path.read_bytes() == b"0ab3456789"
    assert not portable.is_anothers(path)
    assert portable.group_runs(os.getpgid(0)) == (not missing)
    with locked(path, "it is held", where=path, fix="wait"), pytest.raises(GrowthError, match="it is held"):  # noqa: SIM117
        with locked(path, "it is held", where=path, fix="wait"):
            pass


def test_a_missing_package_is_one_error_with_the_command_that_installs_it():
    described = machine_error(ModuleNotFoundError("No module named 'yaml'", name="yaml"))
    assert described is not None
    assert described.what == "the package pyyaml is not installed"
    assert described.fix.startswith("run: pip install 'pyyaml")
    # Negative control: a module inside of a package, or a package of somebody else, is no missing package.
    assert machine_error(ModuleNotFoundError("No module named 'torch.x'", name="torch.x")) is None
    assert machine_error(ModuleNotFoundError("No module named 'x'", name="x")) is None
    assert {"deepspeed", "matplotlib", "accelerate", "datasets"} < set(PACKAGES)
