"""Write pictures of matplotlib and texts for papers, with a mark by which phigrow knows them again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from phigrow.errors import GrowthError
from phigrow.files.atomic import atomic_path
from phigrow.files.output import check_file, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARK = "Written by phigrow"
"""Words in every picture and in every table for a paper. A file without them is not replaced."""

METADATA: dict[str, dict[str, Any]] = {
    ".png": {"Software": MARK},
    ".svg": {"Creator": MARK, "Date": None},
    ".pdf": {"Creator": MARK, "CreationDate": None},
}
"""Ending of a picture -> matplotlib's metadata. Without dates, the bytes are the same every time."""

DPI = 200


def is_marked(path: Path) -> bool:
    """Return True if a file has the mark."""
    return MARK.encode() in path.read_bytes()


def write_picture(figure: Figure, path: Path, style: Any, *, replace: bool = False) -> Path:
    """Write a figure as SVG, PDF or PNG (200 dots an inch), by the ending of ``path``, whole or not at all.

    Args:
        figure: to be written.
        path: of the picture.
        style: matplotlib's settings.
        replace: replace a file that has no mark. The caller knows that it is phigrow's.

    Raises:
        GrowthError: another ending, a folder that is not there, a file that cannot be written, or one that phigrow did
            not write.
    """
    import matplotlib

    ending = path.suffix.lower()
    if ending not in METADATA:
        raise GrowthError(
            f"{ending!r} is not a known picture format", where=str(path), fix="end the name in .png, .svg or .pdf"
        )
    check_picture(path, replace=replace)
    with matplotlib.rc_context(style), writing(path), atomic_path(path) as unfinished:
        figure.savefig(unfinished, dpi=DPI, facecolor="white", metadata=METADATA[ending])
    return path


def check_picture(path: Path, *, replace: bool = False) -> None:
    """Check that a picture can be written to ``path``.

    Raises:
        GrowthError: the folder is not there, or the file exists and phigrow did not write it.
    """
    if not path.parent.is_dir():
        raise GrowthError(
            "the folder for the picture does not exist", where=str(path.parent), fix="make the folder first"
        )
    if not replace:
        check_file(path, is_marked, "a picture or table")
