"""One launch at a time trains in a run folder."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from phigrow.files.lock import locked
from phigrow.files.output import make_folder, writing

LOCK = ".lock"

NO_LOCKS = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)
"""Answers of file systems that have no locks, such as some network mounts. Runs there are not protected."""


@contextlib.contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Hold a run folder for this launch; a context. The folder is made if it is missing.

    The lock ends with the process, even if it is killed.

    Raises:
        GrowthError: another launch trains in the folder, or the folder cannot be written.
    """
    make_folder(out)
    fix = "wait until it has ended, or choose another --out"
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(out / LOCK, "another launch trains in this run folder", where=out, fix=fix))
        except OSError as error:
            if error.errno not in NO_LOCKS:
                with writing(out):
                    raise
        yield
