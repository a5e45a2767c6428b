"""Recipes, studies and stages that are part of the package, found by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "recipes"
"""Where the files are: beside the packages, so that a wheel has them."""

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
    path = Path(reference)
    if not path.is_file() and len(path.parts) == 1:
        for file in shipped_files(kind):
            if path.name in (file.name, file.path.name):
                return file.path
    return path


def shipped_names(kind: str) -> str:
    """Return the names of a kind in words, for the fix of an error."""
    return ", ".join(file.name for file in shipped_files(kind))


def _title(path: Path) -> str:
    with path.open(encoding="utf-8") as lines:
        return lines.readline().strip("# \n")
