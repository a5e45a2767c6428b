"""Name the repository and the commit from which a checkpoint's folder came, where they are known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from phigrow.checkpoints.hub import display_name
from phigrow.checkpoints.hub_cache import cached_repository
from phigrow.checkpoints.hub_names import hub_name
from phigrow.files.paths import user_path


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

    A folder of the hub's cache, which a user may give too, has the origin that its place names.

    Args:
        name: as the user gave it: a folder or a hub name.
        folder: its folder, as `phigrow.checkpoints.hub.locate` returns it.
    """
    if (cached := cached_repository(folder)) is not None:
        return Origin(cached[0], *cached)
    if user_path(name).exists():
        return Origin(display_name(name))
    repository = hub_name(name).repository
    return Origin(repository, repository)
