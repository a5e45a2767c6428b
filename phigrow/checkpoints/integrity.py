"""Check that a checkpoint's files are those that were written, and load them without running code."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from phigrow.errors import GrowthError
from phigrow.files.atomic import atomic_json, sync_folder
from phigrow.files.portable import force_to_disk
from phigrow.files.untrusted import read_json_strict

MARKER = "complete.json"
_OWNER = re.compile(r"rank_?(\d+)")
_BLOCK = 1 << 24


def write_marker(folder: Path, content: dict[str, Any], files: dict[str, Any]) -> None:
    """Declare a folder complete: write ``content``, the digests of its files, and a hash of both."""
    content = {**content, "files": dict(sorted(files.items()))}
    atomic_json(folder / MARKER, {**content, "xxh3_128": _hash_of(content)})


def read_marker(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's marker.

    Raises:
        ValueError: the marker cannot be read, or was changed; the text has the reason.
    """
    try:
        content = read_json_strict(folder / MARKER, "the marker")
    except GrowthError as error:
        raise ValueError(f"{MARKER} cannot be read: {error.why}") from error
    files = content.get("files")
    if not isinstance(files, dict) or not all(_is_digest(name, entry) for name, entry in files.items()):
        raise ValueError(f"{MARKER} has no hashes of the files")
    if content.pop("xxh3_128", None) != _hash_of(content):
        raise ValueError(f"{MARKER} was changed after it was written")
    return content


def digests(folder: Path, rank: int = 0, size: int = 1) -> dict[str, dict[str, Any]]:
    """Force this rank's files below a folder onto the disk, and return the size and xxh3 of each.

    A file belongs to the rank in its name (``zero_pp_rank_3_mp_rank_00_optim_states.pt``), else to rank 0. So over a
    network file system each rank reads its own files, which are still in its memory.
    """
    digest_of = {}
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if _owner(name, size) == rank:
            force_to_disk(path)
            digest_of[name] = digest(path)
            sync_folder(path.parent)
    return digest_of


def damage(folder: Path, files: dict[str, Any], rank: int = 0, size: int = 1) -> list[str]:
    """Return a line for each of this rank's files that is missing or has changed since it was written."""
    wrong = []
    for name, expected in files.items():
        if _owner(name, size) != rank:
            continue
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            wrong.append(f"{name} is missing")
        elif (bytes_ := path.stat().st_size) != expected["bytes"]:
            wrong.append(f"{name} has {bytes_:,} bytes instead of {expected['bytes']:,}")
        elif digest(path) != expected:
            wrong.append(f"{name} was changed after it was written (its xxh3 differs)")
    return wrong


@contextlib.contextmanager
def restricted_pickles() -> Iterator[None]:
    """Restrict ``torch.load`` to tensors, plain data and four classes of DeepSpeed; a context.

    DeepSpeed asks for unrestricted pickles, which can run any code. An environment variable of torch overrules it.
    """
    import torch
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    switches = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    former = {name: os.environ.pop(name, None) for name in switches}
    os.environ[switches[0]] = "1"
    try:
        with torch.serialization.safe_globals([fragment_address, LossScaler, DynamicLossScaler, ZeroStageEnum]):
            yield
    finally:
        for name, value in former.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MARKER)


def _owner(name: str, size: int) -> int:
    rank = _OWNER.search(name)
    return int(rank.group(1)) % size if rank else 0


def digest(path: Path) -> dict[str, Any]:
    """Return size and xxh3 of a file, as markers hold them."""
    state, bytes_ = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            state.update(block)
            bytes_ += len(block)
    return {"bytes": bytes_, "xxh3_128": state.hexdigest()}


def _is_digest(name: str, entry: Any) -> bool:
    """Return True for a file name, and a size and hash as `digest` makes them."""
    is_complete = isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("xxh3_128"), str)
    return is_complete and "\0" not in name


def _hash_of(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()
