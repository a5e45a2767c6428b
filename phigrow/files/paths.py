"""Read paths that a user typed. Every option, key and argument that names a file or folder comes through here."""

from __future__ import annotations

import os
from pathlib import Path

from phigrow.errors import GrowthError


def user_text(text: str) -> str:
    """Return a path or a name as it is spelled, with ``~`` or ``~NAME`` at its start replaced by the home folder.

    Raises:
        GrowthError: there is no such user, or the user has no home folder.

    >>> user_text("phi-2"), user_text("./~/data")
    ('phi-2', './~/data')
    """
    if not text.startswith("~"):
        return text
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise GrowthError(
            f"the home folder {text.partition('/')[0]} is not known",
            where=text,
            why="a path that begins with ~ names the home folder of a user",
            fix=f"give the full path, or write ./{text} for a file of this name",
        )
    return expanded


def user_path(text: str | Path) -> Path:
    """Return the path that a user means.

    Raises:
        GrowthError: as `user_text`.

    >>> user_path("runs/small")
    PosixPath('runs/small')
    """
    return Path(user_text(os.fspath(text)))
