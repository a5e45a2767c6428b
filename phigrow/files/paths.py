"""Read paths that a user typed. Every option, key and argument that names a file or folder comes through here."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def utf8_path(path: Path) -> Iterator[Path]:
    """Give a path to an existing file or folder that libraries written in Rust or C++ can open; a context.

    Linux allows any bytes in names, and these libraries only UTF-8. A path with other bytes gets a symbolic link in a
    temporary folder, which is removed when the block ends.

    >>> with utf8_path(Path("runs")) as path:
    ...     path
    PosixPath('runs')
    """
    if is_utf8(path.absolute()):  # libraries make paths absolute
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="phigrow-") as folder:
        link = Path(folder, "link").with_suffix(path.suffix if is_utf8(path.suffix) else "")
        link.symlink_to(path.absolute())
        yield link


def is_utf8(path: str | Path) -> bool:
    """Return True if a path can be written in UTF-8."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True
