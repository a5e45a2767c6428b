"""Look up and copy the recipes, studies and stages that are part of the package."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phigrow.errors import GrowthError
from phigrow.files.output import writing
from phigrow.files.paths import user_path

FOLDER = Path(__file__).parents[1] / "recipes"
"""Folder of the shipped files. It lies inside the package, so that a wheel has them."""

FOLDERS = {"recipe": "", "study": "studies", "stages": "stages"}
"""The folder of each kind of file, below `FOLDER`."""


@dataclass(frozen=True)
class ShippedFile:
    """A shipped YAML file: its name as a user types it, its first line, and its path."""

    name: str
    title: str
    path: Path


def shipped_files(kind: str) -> list[ShippedFile]:
    """List the shipped files of a kind: recipe, study or stages.

    >>> [file.name for file in shipped_files("stages")]
    ['tiny']
    """
    files = sorted((FOLDER / FOLDERS[kind]).glob("*.yaml"), key=lambda path: path.stem)
    return [ShippedFile(path.stem, _title(path), path) for path in files]


def find_shipped(reference: str | Path, kind: str) -> Path:
    """Return the file that a user means: an existing path, else a shipped file of that name, else the path as given.

    >>> find_shipped("phi-2", "recipe").name
    'phi-2.yaml'
    """
    path = user_path(reference)
    if not path.is_file() and len(path.parts) == 1:
        for file in shipped_files(kind):
            if path.name in (file.name, file.path.name):
                return file.path
    return path


def copy_shipped(names: Sequence[str], out: Path, *, overwrite: bool = False) -> list[Path]:
    """Copy shipped files, each with the files that it names, into a folder.

    Args:
        names: with or without folder and ending (``phi-2``, ``studies/tiny``); empty copies all files.
        out: the folder.
        overwrite: replace existing files.

    Returns:
        The paths that were written.

    Raises:
        GrowthError: phigrow ships no file of that name, or a target exists.
    """
    everything = sorted(path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    wanted: set[Path] = set() if names else set(everything)
    for name in names:
        matches = [path for path in everything if name in _names(path)]
        if not matches:
            known = ", ".join(path.relative_to(FOLDER).with_suffix("").as_posix() for path in everything)
            raise GrowthError(
                f"phigrow ships no file named {name!r}", where="phigrow recipes", fix=f"give one of {known}"
            )
        text = "".join(path.read_text(encoding="utf-8") for path in matches)
        named = set(re.findall(r"^\w+: (\S+)", text, re.MULTILINE))
        beside = [path for path in everything if path.relative_to(FOLDER).as_posix() in named]
        wanted |= {*matches, *beside}
    pairs = [(path, out / path.relative_to(FOLDER)) for path in sorted(wanted)]
    for _, target in pairs:
        if target.exists() and not overwrite:
            raise GrowthError(
                "the file exists already", where=str(target), fix="choose another --out, or add --overwrite"
            )
    with writing(out):
        for path, target in pairs:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return [target for _, target in pairs]


def _names(path: Path) -> tuple[str, ...]:
    below = path.relative_to(FOLDER)
    return below.as_posix(), below.with_suffix("").as_posix(), path.stem, path.name


def shipped_names(kind: str) -> str:
    """Return the names of a kind in words, for the fix of an error."""
    return ", ".join(file.name for file in shipped_files(kind))


def _title(path: Path) -> str:
    with path.open(encoding="utf-8") as lines:
        return lines.readline().strip("# \n")
