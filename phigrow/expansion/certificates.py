"""Save certificates of `verify` with a hash of every tensor, and check tensors against them."""

from __future__ import annotations

import hashlib
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from phigrow.checkpoints.bits import as_bytes
from phigrow.checkpoints.hub import display_name, locate
from phigrow.checkpoints.pickles import open_checkpoint
from phigrow.checkpoints.reader import ITEM_BYTES, StoredTensor
from phigrow.errors import GrowthError
from phigrow.expansion.verify import Certificate
from phigrow.files.atomic import atomic_json
from phigrow.files.output import check_file, json_keys
from phigrow.files.untrusted import read_json_strict
from phigrow.models.config import load_config
from phigrow.models.families import family_of

FORMAT = 1
KEYS = {"format", "certificate", "source", "destination"}
BLOCK_BYTES = 1 << 22


def tensor_hashes(folder: Path) -> dict[str, str]:
    """Return name -> sha256 of dtype, shape and values of every tensor of a checkpoint, for any number of shards.

    Names and tensors are those of the files. Masks of BOOL, which no model learns, are left out.
    """
    optional = family_of(load_config(folder), str(folder)).ignored_tensors
    with open_checkpoint(folder, optional) as reader, ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(reader.tensors, pool.map(_hash, reader.tensors.values()), strict=True))


def _hash(tensor: StoredTensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype_name} {list(tensor.shape)}\n".encode())
    rows = tensor.shape[0] if tensor.shape else 0
    step = max(1, BLOCK_BYTES // max(1, math.prod(tensor.shape[1:]) * ITEM_BYTES[tensor.dtype_name]))
    for start in range(0, rows, step):
        digest.update(as_bytes(tensor.bits(start, min(start + step, rows))))
    return digest.hexdigest()


def save_certificate(
    path: Path, certificate: Certificate, src: str | Path, dst: str | Path, revision: str | None = None
) -> None:
    """Write a certificate and the hashes of all tensors of both sides, as JSON, whole or not at all.

    Raises:
        GrowthError: either side cannot be read, the file cannot be written, or it exists and is no certificate.
    """
    check_place(path)
    content = {
        "format": FORMAT,
        "certificate": certificate.to_json(),
        "source": {"name": display_name(src), "tensors": tensor_hashes(locate(src, revision))},
        "destination": {"name": display_name(dst), "tensors": tensor_hashes(locate(dst))},
    }
    try:
        atomic_json(path, content)
    except OSError as error:
        raise GrowthError(
            "the certificate cannot be written", where=str(path), why=str(error), fix="choose another place with --save"
        ) from error


def check_place(path: Path) -> None:
    """Check that a certificate may be written to ``path``.

    Raises:
        GrowthError: the file exists, and it is no certificate.
    """
    check_file(path, lambda file: json_keys(file) >= KEYS, "a certificate", "--save")


def check_certificate(path: Path, src: str | Path, dst: str | Path, revision: str | None = None) -> list[str]:
    """Check the tensors of both sides against a saved certificate. No model is run.

    Returns:
        A line for each tensor that differs; empty if every tensor is the certified one.

    Raises:
        GrowthError: the certificate or either side cannot be read.
    """
    content = read_json_strict(path, "the certificate", nan=True)
    try:
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, and this phigrow reads format {FORMAT}")
        certified = {side: dict(content[side]["tensors"]) for side in ("source", "destination")}
    except (ValueError, KeyError, TypeError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise GrowthError(
            "the certificate cannot be read", where=str(path), why=why, fix="save it again: phigrow verify --save"
        ) from error
    hashes = {"source": tensor_hashes(locate(src, revision)), "destination": tensor_hashes(locate(dst))}
    problems = []
    for side, expected in certified.items():
        for name in sorted(expected.keys() | hashes[side].keys()):
            now, then = hashes[side].get(name), expected.get(name)
            if now != then:
                word = "is missing" if now is None else "was not there" if then is None else "was altered"
                problems.append(f"{side}: {name} {word}")
    return problems
