"""Turn what the machine refuses (disk, memory, ports, compilers) into errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import socket
import sys
import traceback
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from phigrow.errors import GrowthError, MachineError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
LOST_CONNECTION = frozenset({
    errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT,
})  # fmt: skip
PACKAGES = {name: name for name in (
    "torch", "transformers", "safetensors", "huggingface_hub", "accelerate", "deepspeed", "datasets", "tokenizers",
    "einops", "xxhash", "numpy", "scipy", "pandas", "matplotlib", "typer", "rich",
)} | {"yaml": "pyyaml"}  # fmt: skip
"""Module -> the package that has it, of all packages that phigrow requires."""
CACHES = (".cache", ".config", ".triton")
"""Folders of the home folder that libraries write without being asked."""
ERRNO = re.compile(r"\b(?:os error|errno:?) (\d+)", re.IGNORECASE)
"""Number of an operating system's error, as libraries in Rust and C++ write it into their message."""


def machine_error(error: BaseException) -> GrowthError | None:
    """Describe an exception that comes from the machine and not from phigrow.

    Args:
        error: an exception. Those that it was raised from are read too, and a full disk before it.

    Returns:
        A `MachineError` for the user, or a `GrowthError` that the exception was raised from. None if the exception is
        of no such kind. A reader of stdout that has gone (`BrokenPipeError`) is none.

    >>> print(machine_error(OSError(28, "No space left on device", "runs/a/records.jsonl")).what)
    the disk is full
    >>> machine_error(KeyError("x")) is None
    True
    """
    for each in _chain(error):
        if isinstance(each, BrokenPipeError):
            return None
        if isinstance(each, GrowthError):
            return each
        for describe in (_package, _extension, _network, _memory, _file):
            if (described := describe(each)) is not None:
                return described
    return None


@contextlib.contextmanager
def machine_errors_explained(advice: str = "") -> Iterator[None]:
    """Raise a `GrowthError` where the machine refuses something; a context.

    Args:
        advice: a sentence about how to go on, which is added to the fix.
    """
    try:
        yield
    except GrowthError:
        raise
    except Exception as error:
        if (described := machine_error(error)) is None:
            raise
        raise with_advice(described, advice) from error


def with_advice(error: GrowthError, advice: str) -> GrowthError:
    """Return an error with a sentence at the end of its fix."""
    fix = f"{error.fix}. {advice}" if error.fix and advice else error.fix or advice
    return type(error)(error.what, where=error.where, why=error.why, fix=fix)


def replace_odd_characters() -> None:
    """Let stdout and stderr print a question mark for a character that their encoding does not have.

    A terminal in ASCII has no arrows and no lines, and UTF-8 has no bytes of paths in another encoding.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def flush_stdout() -> GrowthError | None:
    """Flush stdout, and drop the rest of it if that fails, because Python would fail again when it ends.

    Returns:
        The error if the output cannot be written; None if it was, or if its reader has gone.
    """
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return machine_error(error)
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, those that it was raised from, and a full disk before it.

    An exception may come up while a missing file is handled as it should be, so other contexts explain nothing.
    """
    each: BaseException | None = error
    seen: set[int] = set()
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        context = each.__context__
        is_full = isinstance(context, OSError) and context.errno in FULL
        each = each.__cause__ or (context if is_full else None)


def _package(error: BaseException) -> GrowthError | None:
    """Describe a package that phigrow needs and that is not installed."""
    if not isinstance(error, ModuleNotFoundError) or error.name not in PACKAGES:
        return None
    return GrowthError(
        f"the package {PACKAGES[error.name]} is not installed",
        where=f"{sys.executable} ({_raised_in(error)})",
        fix=f"run: pip install '{_requirement(PACKAGES[error.name])}'",
    )


def _requirement(package: str) -> str:
    """Return a package with the versions that phigrow supports, as its metadata names them."""
    try:
        lines = metadata.requires("phigrow") or []
    except metadata.PackageNotFoundError:  # a checkout that was not installed
        lines = []
    named = [line.partition(";")[0].strip() for line in lines]
    name = package.replace("_", "-")
    return next((line for line in named if re.split(r"[^\w.-]", line)[0].replace("_", "-").lower() == name), package)


def _extension(error: BaseException) -> MachineError | None:
    """Describe an extension of DeepSpeed or PyTorch that cannot be compiled or loaded."""
    text = str(error)
    if isinstance(error, ImportError) and "failed to map segment" in text:
        return MachineError(
            "a compiled extension cannot be loaded",
            where=text.partition(":")[0],
            why="programs may not run from this disk: it is mounted with noexec",
            fix="set TORCH_EXTENSIONS_DIR to a folder on another disk",
        )
    if text.startswith(("Error building extension", "Ninja is required")) or "No working C++ compiler" in text:
        lines = [line.strip() for line in text.splitlines()]
        reasons = [line for line in lines if "not found" in line or "error:" in line or "rror 1" in line]
        name = text.split("'")[1] if text.startswith("Error building") and "'" in text else "of PyTorch"
        return MachineError(
            f"the extension {name} cannot be compiled",
            why=reasons[0] if reasons else lines[0],
            fix="install a C++ compiler and ninja (apt install g++, pip install ninja), or set compile: false "
            "and leave offload_optimizer out: training then needs neither",
        )
    return None


def _network(error: BaseException) -> MachineError | None:
    """Describe a port in use, a first rank that does not answer, or a lost connection."""
    text = str(error)
    if getattr(error, "errno", None) == errno.EADDRINUSE or "EADDRINUSE" in text:
        port = (re.findall(r"port:? (\d+)", text) or [os.environ.get("MASTER_PORT", "")])[0]
        return MachineError(
            f"the port {port} is in use".replace("  ", " "),
            where="MASTER_PORT",
            why="another program listens on it",
            fix="set MASTER_PORT, or --master_port of the launcher, to a free port, or end the other program",
        )
    if type(error).__name__ in ("DistNetworkError", "DistStoreError"):
        place = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
        return MachineError(
            f"rank 0 cannot be reached at {place}",
            where="MASTER_ADDR, MASTER_PORT",
            why=text.partition("\n")[0],
            fix="check that all ranks were started, that both variables are the same on every host, and the firewall",
        )
    if isinstance(error, ConnectionError | socket.gaierror) or _number(error) in LOST_CONNECTION:
        return MachineError(
            "a network connection failed",
            why=f"{text.partition(chr(10))[0] or 'there was no answer'} ({_raised_in(error)})",
            fix="check the network, the proxy and the program at the other end, then run the same command again",
        )
    return None


def _memory(error: BaseException) -> MachineError | None:
    """Describe memory that the host or the accelerator does not have."""
    text = str(error)
    device = type(error).__name__ == "OutOfMemoryError"
    if device or isinstance(error, MemoryError) or "not enough memory" in text or "can't allocate memory" in text:
        return MachineError(
            f"the memory of {'the accelerator' if device else 'this machine'} is not enough",
            why=(text.partition("\n")[0] or "out of memory")[:300],
            fix="in training, lower micro_batch, set activation_checkpointing: true or zero: 3, or use more ranks; "
            "elsewhere, end other programs or use a larger machine",
        )
    return None


def _file(error: BaseException) -> MachineError | None:
    """Describe a file or folder that the operating system refuses."""
    text = str(error).partition("\n")[0]
    if isinstance(error, RuntimeError) and text.startswith("Symlink loop"):
        return MachineError("links lead in a circle", why=text, fix="replace the link with the file or folder itself")
    number = _number(error)
    saving = "inline_container" in str(error) or "PytorchStreamWriter" in str(error) or "iostream error" in text
    place = getattr(error, "filename", None)
    if number is None and not saving and (place is None or not isinstance(error, OSError)):
        return None  # an OSError of a library that says nothing about a file
    where = os.fsdecode(place) if isinstance(place, str | bytes | os.PathLike) else None
    where = where or ("the standard output" if _stdout_is_broken() else None)
    why = f"{text} ({_raised_in(error)})"
    if number in FULL:
        what = "the disk is full" if number != errno.EFBIG else "a file would be larger than allowed (ulimit -f)"
        where = where or "a file that was being written, or the standard output"
        return MachineError(what, where=where, why=why, fix="free space, or write to another disk")
    if saving:
        return MachineError(
            "PyTorch could not write a file", where=where, why=f"{why}: the disk may be full",
            fix="free space, or write to another disk",
        )  # fmt: skip
    if number == errno.EMFILE:
        return MachineError("too many files are open", where=where, why=why, fix="raise the limit with ulimit -n 65536")
    if where is not None and _is_below_home(where):
        return MachineError(
            "the home folder cannot be written" if number in DENIED else "the home folder cannot be used",
            where=where,
            why=why,
            fix="set HOME to a folder where you may write, or TORCH_EXTENSIONS_DIR, TRITON_CACHE_DIR, HF_HOME and "
            "MPLCONFIGDIR to such folders",
        )
    what = "this place may not be read or written" if number in DENIED else "the operating system refuses a file"
    return MachineError(what, where=where, why=why, fix="check the path, its owner, its permissions and its disk")


def _number(error: BaseException) -> int | None:
    """Return the number of an operating system's error; None if there is none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    match = ERRNO.search(str(error).partition("\n")[0])
    return int(match[1]) if match else None


def _stdout_is_broken() -> bool:
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        return True
    return False


def _is_below_home(where: str) -> bool:
    """Return True for a file in a cache of a library, or in a home folder that does not exist."""
    folders = [folder for name in ("TORCH_EXTENSIONS_DIR", "HF_HOME") if (folder := os.environ.get(name))]
    if os.environ.get("HOME"):
        home = os.path.abspath(Path.home())
        folders += [os.path.join(home, cache) for cache in CACHES] if os.path.isdir(home) else [home]
    place = os.path.join(os.path.abspath(where), "")
    return any(place.startswith(os.path.join(os.path.abspath(folder), "")) for folder in folders)


def _raised_in(error: BaseException) -> str:
    """Name the last line of phigrow on the way to an exception, for reports of bugs."""
    root = str(Path(__file__).parents[1])
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(root)]
    if not lines:
        return type(error).__name__
    return f"{type(error).__name__} in phigrow/{os.path.relpath(lines[-1].filename, root)}, line {lines[-1].lineno}"
