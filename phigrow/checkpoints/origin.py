"""Name the repository and the commit from which a checkpoint's folder came, where they are known."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from phigrow.checkpoints.hub import ALIASES, display_name
from phigrow.files.paths import user_path

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Origin:
    """The origin of a checkpoint.

    Attributes:
        name: for people: the hub id, or the name of a local folder.
        repository: the hub id, or None for a local folder.
        commit: of the repository, or None where it is unknown.
    """

    name: str
    repository: str | None = None
    commit: str | None = None


def origin_of(name: str | Path, folder: Path) -> Origin:
    """Return the origin of a checkpoint.

    The hub's cache has a folder ``models--OWNER--NAME/snapshots/COMMIT`` for every commit. A user may give it too.

    Args:
        name: as the user gave it: a folder or a hub name.
        folder: its folder, as `phigrow.checkpoints.hub.locate` returns it.
    """
    path = folder.resolve()
    cache = path.parent.parent.name
    if path.parent.name == "snapshots" and cache.startswith("models--") and _COMMIT.fullmatch(path.name):
        repository = cache.removeprefix("models--").replace("--", "/", 1)
        return Origin(repository, repository, path.name)
    if user_path(name).exists():
        return Origin(display_name(name))
    repository = ALIASES.get(str(name), str(name))
    return Origin(repository, repository)
