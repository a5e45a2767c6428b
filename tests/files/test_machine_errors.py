"""A refusal of the machine becomes one error with its remedy; bugs keep their traceback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from phigrow.errors import GrowthError, MachineError
from phigrow.files.machine_errors import machine_error, machine_errors_explained, with_advice

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="/dev/full: Linux only")


def raised_by(action) -> BaseException:
    with pytest.raises(Exception) as error:  # noqa: PT011 - the kind differs from case to case
        action()
    return error.value


def full() -> None:
    with open("/dev/full", "w") as file:
        file.write("x")


def bound_twice() -> None:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        first.listen()
        second.bind(first.getsockname())


def saved_by_torch() -> None:
    import torch

    with open("/dev/full", "wb") as file:
        torch.save(torch.zeros(1000), file)


@LINUX
@pytest.mark.parametrize(
    ("action", "what"),
    [
        (full, "the disk is full"),
        (saved_by_torch, "the disk is full"),
        (bound_twice, "the port"),
        (lambda: Path("/proc/here").mkdir(), "the operating system refuses a file"),
        (lambda: bytearray(1 << 60), "the memory of this machine is not enough"),
    ],
)
def test_real_refusals_are_described(action, what):
    described = machine_error(raised_by(action))
    assert described is not None
    assert described.what.startswith(what)
    assert described.fix


COMPILER = """Error building extension 'deepspeed_shm_comm': [1/3] c++ -MMD -MF shm.o.d
FAILED: [code=127] shm.o
/bin/sh: 1: c++: not found
ninja: build stopped: subcommand failed."""
PORT = """The server socket has failed to listen on any local network address. port: 29777, useIpv6: false, code: -98,
name: EADDRINUSE, message: address already in use"""
DistNetworkError = type("DistNetworkError", (RuntimeError,), {})
OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {})


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError(COMPILER), ["the extension deepspeed_shm_comm cannot be compiled", "c++: not found", "g++"]),
        (RuntimeError("Ninja is required to load C++ extensions"), ["cannot be compiled", "ninja"]),
        (
            RuntimeError("InvalidCxxCompiler: No working C++ compiler found in x"),
            ["of PyTorch cannot", "compile: false"],
        ),
        (ImportError("/a/op.so: failed to map segment from shared object"), ["/a/op.so", "noexec", "TORCH_EXTENSIONS"]),
        (DistNetworkError(PORT), ["the port 29777 is in use", "MASTER_PORT"]),
        (DistNetworkError("timed out after 600000ms"), ["rank 0 cannot be reached", "timed out", "firewall"]),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), ["memory of the accelerator", "micro_batch"]),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), ["memory of this machine"]),
        (RuntimeError("I/O error: No space left on device (os error 28)"), ["the disk is full"]),
        (OSError(27, "File too large", "runs/a"), ["ulimit -f", "runs/a"]),
        (OSError(24, "Too many open files"), ["too many files are open", "ulimit -n"]),
        (PermissionError(13, "Permission denied", "/srv/x"), ["may not be read or written", "/srv/x"]),
        (OSError(30, "Read-only file system", "HOME/.cache/torch"), ["home folder cannot be written", "HF_HOME"]),
    ],
)
def test_errors_of_libraries_are_described(error, words, monkeypatch):
    monkeypatch.setenv("HOME", "/home/user")
    if str(getattr(error, "filename", "")).startswith("HOME"):
        error.filename = error.filename.replace("HOME", "/home/user")
    text = str(machine_error(error))
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(104, "Connection reset by peer"),
        ConnectionResetError("Cannot write to closing transport"),
        ConnectionRefusedError(111, "Connection refused"),
        TimeoutError(110, "Connection timed out"),
        OSError(113, "No route to host"),
        socket.gaierror(-2, "Name or service not known"),
        RuntimeError("Data processing error: Connection reset by peer (os error 104)"),
    ],
)
def test_lost_connections_get_advice_about_the_network_and_none_about_paths(error):
    described = machine_error(error)
    assert isinstance(described, MachineError)
    assert described.what == "a network connection failed"
    assert str(error) in described.why
    assert described.fix.startswith("check the network, the proxy")
    assert "path" not in str(described)
    ours = machine_error(OSError(116, "Stale file handle", "/srv/a"))  # negative control
    assert (ours.what, ours.where) == ("the operating system refuses a file", "/srv/a")
    assert ours.fix.startswith("check the path")


def test_errors_of_libraries_without_a_number_and_a_file_are_not_described():
    for error in (
        FileNotFoundError("No (supported) data files found in a/b"),
        OSError("Corrupt snappy data"),
        OSError(),
    ):
        assert machine_error(error) is None
    named = OSError("Unable to open file")
    named.filename = "/srv/a"  # negative control
    assert machine_error(named).where == "/srv/a"
    assert "a.json" in str(machine_error(FileNotFoundError(2, "No such file", "a.json")))


def test_advice_about_the_home_folder_is_for_caches_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)

    def at_home(place: str) -> bool:
        return "home folder" in machine_error(PermissionError(13, "Permission denied", str(tmp_path / place))).what

    places = {
        "hf": True, "hf/hub/a": True, "hf-runs/records.jsonl": False, "me/.cache/torch/a": True, "me/.triton": True,
        "me/.config/matplotlib": True, "me/.out.partial/a": False, "me/.cached/a": False, "me/runs/.cache/a": False,
        "me/runs/a": False, "me2/.cache/a": False,
    }  # fmt: skip
    (tmp_path / "me").mkdir()
    assert {place: at_home(place) for place in places} == places
    (tmp_path / "me").rmdir()  # then everything in it
    assert (at_home("me/runs/a"), at_home("me/.out.partial/a"), at_home("me2/a")) == (True, True, False)


def test_an_error_behind_another_is_described_and_bugs_are_not():
    def behind(first: BaseException, *, explicit: bool) -> BaseException:
        later = ValueError("words of a library")
        later.__context__ = first
        later.__cause__ = first if explicit else None
        return later

    missing, disk = FileNotFoundError(2, "No such file", "a.json"), OSError(28, "No space left on device", "a.pt")
    for explicit in (True, False):
        assert str(machine_error(behind(disk, explicit=explicit))).startswith("the disk is full\n  where: a.pt")
    assert "a.json" in str(machine_error(behind(missing, explicit=True)))
    assert machine_error(behind(missing, explicit=False)) is None  # a bug while a missing file was handled
    for bug in (KeyError("x"), ValueError("shapes"), RuntimeError("mat1 and mat2"), BrokenPipeError(32, "gone")):
        assert machine_error(bug) is None
    with pytest.raises(KeyError), machine_errors_explained("advice"):
        raise KeyError("x")
    with pytest.raises(GrowthError, match=r"the disk is full[\s\S]*another disk\. Run it again\."):  # noqa: SIM117
        with machine_errors_explained("Run it again."):
            raise OSError(28, "No space left on device")
    assert with_advice(GrowthError("a", fix="b"), "").fix == "b"


@LINUX
@pytest.mark.parametrize("words", [["plan", "--src", "phi-1_5", "--dst-config", "phi2.json", "--json"], ["recipes"]])
def test_output_to_a_full_device_is_one_error(words):
    with open("/dev/full", "w") as device:
        done = subprocess.run(
            [sys.executable, "-m", "phigrow", *words], stdout=device, stderr=subprocess.PIPE, text=True, check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: the disk is full\n")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
