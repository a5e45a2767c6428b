"""Copy folders: the contents of files, and neither modes nor owners nor times.

A copy of a folder that its owner made read-only could be neither finished nor removed, if it took over the mode.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn


def copy_folder(source: Path, target: Path, *, link: bool = False) -> None:
    """Copy the files of a folder, and of the folders in it, into another folder.

    Args:
        source: an existing folder.
        target: made if it does not exist.
        link: link the files instead, where the file system and their owner allow it.

    Raises:
        OSError: a file or folder cannot be read or written.
    """

    def refuse(error: OSError) -> NoReturn:
        raise error

    for root, _, names in os.walk(source, onerror=refuse):
        folder = target / Path(root).relative_to(source)
        folder.mkdir(exist_ok=True)
        for name in names:
            if not (link and _linked(Path(root, name), folder / name)):
                shutil.copyfile(Path(root, name), folder / name)


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:  # another file system, one without links, or a file of another user
        return False
    return True
