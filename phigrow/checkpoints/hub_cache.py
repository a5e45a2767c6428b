"""Tell folders of the local cache of the hub, whose downloads may be incomplete, from other folders."""

from __future__ import annotations

import os
import re
from pathlib import Path
from shlex import quote

from phigrow.errors import GrowthError

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")

_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_offline() -> bool:
    """Return True if the environment forbids downloads."""
    return any(_is_set(name) for name in OFFLINE)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")


def cached_repository(folder: Path) -> tuple[str, str] | None:
    """Return the id and the commit of a folder in the hub's cache; None for another folder.

    The cache has a folder ``models--OWNER--NAME/snapshots/COMMIT`` for every commit.
    """
    path = folder.resolve()
    cache = path.parent.parent.name
    if path.parent.name == "snapshots" and cache.startswith("models--") and _COMMIT.fullmatch(path.name):
        return cache.removeprefix("models--").replace("--", "/", 1), path.name
    return None


def incomplete_cache(folder: Path, name: str) -> GrowthError | None:
    """Return the error for a file that a folder of the cache lacks; None for a folder elsewhere.

    Args:
        folder: that lacks the file.
        name: of the file, or a pattern.
    """
    if (cached := cached_repository(folder)) is None:
        return None
    from huggingface_hub.constants import HF_HUB_CACHE

    repository, commit = cached
    root = folder.resolve().parent.parent.parent
    words = ["hf", "download", repository, "--revision", commit]
    words += [] if os.path.realpath(HF_HUB_CACHE) == str(root) else ["--cache-dir", str(root)]
    offline = [name for name in OFFLINE if _is_set(name)]
    unset = f"env {' '.join(f'-u {name}' for name in offline)} " if offline else ""
    return GrowthError(
        f"the local cache has {repository} without {name}",
        where=str(folder),
        why="its download was not finished, or was of other files"
        + (f"; {offline[0]} is set, so nothing is downloaded" if offline else ""),
        fix=f"download the rest where there is a network: {unset}{' '.join(map(quote, words))}",
    )
