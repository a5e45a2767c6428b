"""Learned matrices of a growth, in one safetensors file. Its metadata records the learning; plans hold its hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from phigrow.errors import GrowthError
from phigrow.files.atomic import atomic_path
from phigrow.files.paths import user_path, utf8_path

Floats = npt.NDArray[np.float64]

FILE = "growth-maps.safetensors"
"""Name of the file in the folder of a learning run, and beside the weights of a model grown with it."""

_RECORD = "phigrow"


@dataclass(frozen=True, eq=False)
class Maps:
    """Matrices by name, read when they are first asked for.

    Attributes:
        sha256: of the file; None for the matrices that learning starts from, which are in no file.
        path: the file, where it is known.
    """

    sha256: str | None = None
    path: Path | None = None

    @cached_property
    def tensors(self) -> dict[str, Floats]:
        """Name -> float64 matrix; none at the start.

        Raises:
            GrowthError: no file, a damaged one, or another than the plan was made with.
        """
        if self.sha256 is None:
            return {}
        if self.path is None or not self.path.is_file():
            raise GrowthError(
                "the learned maps of the plan are missing",
                where=str(self.path) if self.path else f"sha256 {self.sha256[:16]}",
                why=f"a learned plan holds only the hash of its maps; the maps themselves are in {FILE} beside it",
                fix="put the file beside the plan, or make the plan again with --maps",
            )
        if (sha256 := _sha256(self.path)) != self.sha256:
            raise GrowthError(
                "the learned maps are not those of the plan",
                where=str(self.path),
                why=f"their sha256 is {sha256[:16]}, the plan's {self.sha256[:16]}",
                fix="use the file that was learned for this plan, or make the plan again with --maps",
            )
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            with utf8_path(self.path) as readable:
                return {name: value.astype(np.float64) for name, value in load_file(readable).items()}
        except (SafetensorError, OSError, ValueError) as error:
            raise GrowthError(
                "the learned maps cannot be read",
                where=str(self.path),
                why=str(error),
                fix="run phigrow learn-growth again",
            ) from error

    def matrix(self, name: str, shape: tuple[int, ...]) -> Floats | None:
        """A matrix, or None at the start.

        Raises:
            GrowthError: it is missing, of another shape, or not finite.
        """
        if self.sha256 is None:
            return None
        matrix = self.tensors.get(name)
        if matrix is None or matrix.shape != shape or not np.isfinite(matrix).all():
            state = "missing" if matrix is None else f"of shape {list(matrix.shape)}, or not finite"
            raise GrowthError(
                "the learned maps do not fit the plan",
                where=f"{name} in {self.path}",
                why=f"its shape must be {list(shape)}, but the matrix is {state}",
                fix="learn them again for this source and this destination",
            )
        return matrix


def read_maps(path: str | Path) -> tuple[Maps, dict[str, Any]]:
    """Return the maps in a file, or in a folder of a learning run or a grown model, and the record of their learning.

    Raises:
        GrowthError: there are no maps, or they have no record of their learning.
    """
    given = user_path(path)
    file = given / FILE if given.is_dir() else given
    if not file.is_file():
        raise GrowthError(
            f"there are no learned maps in {str(path)!r}",
            where=str(file.absolute()),
            fix="give the folder that phigrow learn-growth wrote",
        )
    from safetensors import SafetensorError, safe_open

    try:
        with utf8_path(file) as readable, safe_open(readable, "numpy") as opened:
            record = json.loads((opened.metadata() or {}).get(_RECORD, ""))
    except (SafetensorError, OSError, ValueError) as error:
        raise GrowthError(
            "the learned maps cannot be read",
            where=str(file),
            why=str(error) or "the file does not record how they were learned",
            fix="give the folder that phigrow learn-growth wrote",
        ) from error
    if not isinstance(record, dict) or not isinstance(record.get("start"), dict):
        raise GrowthError(
            "the learned maps have no valid `start` entry",
            where=f"the metadata of {file}",
            why="this entry records the plan from which the maps were learned",
            fix="run phigrow learn-growth again",
        )
    return Maps(_sha256(file), file), record


def write_maps(folder: Path, tensors: Mapping[str, npt.NDArray[Any]], record: dict[str, Any]) -> Maps:
    """Write matrices, as float32, with the record of their learning; the file is written whole or not at all."""
    from safetensors.numpy import save

    file = folder / FILE
    held = {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in tensors.items()}
    with atomic_path(file) as unfinished:
        unfinished.write_bytes(save(held, metadata={_RECORD: json.dumps(record, sort_keys=True)}))
    return Maps(_sha256(file), file)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
