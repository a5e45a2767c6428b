"""Fingerprints of checkpoint folders and of grown optimizer states, by their content; large tensors are sampled."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

from phigrow.checkpoints.integrity import MARKER, read_marker
from phigrow.errors import GrowthError
from phigrow.files.fingerprint import MISSING, file_fingerprint, json_fingerprint
from phigrow.files.untrusted import MOST_JSON_BYTES, read_json_strict

CONFIG = "config.json"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.pt")
"""Files of weights. Only those of the first kind that a folder has count."""

STATE = "state.json"
NO_CONTENT = ("transformers_version", "_name_or_path")
"""Keys of a configuration that name its writer or its place, and do not change the model."""

MEASURED = ("seconds",)
"""Keys of ``state.json`` that differ each time the same state is grown."""


def config_content(config: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a configuration that belong to its content."""
    return {key: value for key, value in config.items() if key not in NO_CONTENT}


def checkpoint_fingerprint(folder: Path) -> str:
    """Return the fingerprint of a Hugging Face folder: configuration, sizes of its weights, and sampled blocks.

    At least the first 16 KiB of every tensor of a safetensors file are read, and 64 blocks over the file. See
    `phigrow.files.fingerprint` about changes that sampling misses. Cost records, cards and tokenizers do not count.

    Returns:
        The fingerprint, or `MISSING` if there is no such folder.

    Raises:
        GrowthError: a file cannot be read.
    """
    if not folder.is_dir():
        return MISSING
    content: dict[str, Any] = {}
    if (path := folder / CONFIG).is_file():
        content["config"] = config_content(read_json_strict(path, "the configuration"))
    files = _weights(folder)
    content["weights"] = [file_fingerprint(file, starts=_tensor_starts(file)) for file in files]
    return json_fingerprint(content)


def has_weights(folder: Path) -> bool:
    """Return True if a folder has files of weights."""
    return bool(_weights(folder))


def state_fingerprint(folder: Path) -> str:
    """Return the fingerprint of a grown optimizer state, from the digests in its marker; `MISSING` without a marker.

    Raises:
        GrowthError: its ``state.json`` cannot be read.
    """
    try:
        files = dict(read_marker(folder)["files"])
    except ValueError:
        return MISSING if not folder.is_dir() else file_fingerprint(folder / MARKER)
    files.pop(STATE, None)
    state = read_json_strict(folder / STATE, "the optimizer's state") if (folder / STATE).is_file() else {}
    return json_fingerprint([files, {key: value for key, value in state.items() if key not in MEASURED}])


def _weights(folder: Path) -> list[Path]:
    return next(filter(None, (sorted(folder.glob(pattern)) for pattern in WEIGHTS)), [])


def _tensor_starts(path: Path) -> list[int]:
    """Return the first byte of every tensor of a safetensors file; nothing for other files and damaged headers."""
    if path.suffix != ".safetensors":
        return []
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            length = struct.unpack("<Q", file.read(8))[0]
            if not 0 < length <= min(size - 8, MOST_JSON_BYTES):
                return []
            entries = json.loads(file.read(length))
        starts = [8 + length + entry["data_offsets"][0] for name, entry in entries.items() if name != "__metadata__"]
        return [start for start in starts if 0 <= start < size]
    except OSError as error:
        raise GrowthError(
            "the file cannot be read", where=str(path), why=str(error), fix="check its permissions, and the disk"
        ) from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error, RecursionError):
        return []
