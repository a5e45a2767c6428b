"""Reading what a stranger wrote: files that stay inside their folder, and JSON that says one thing only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from phigrow.errors import GrowthError

MOST_JSON_BYTES = 1 << 25
"""32 MiB: more than the header of the largest model that phigrow takes (10,000 layers), less than parsing can inflate
beyond an ordinary machine's memory. The safetensors library allows 100 MB."""

MOST_DEPTH = 64
"""Of nested JSON: what is read here must also be written again, from wherever on the stack."""


def contained(folder: Path, name: str) -> Path:
    """The path of a file directly inside a folder, whether or not it exists.

    A symbolic link may not leave the folder, or a hostile checkpoint could have any file of this machine copied into
    a grown model. The cache of the Hugging Face hub is made of links, ``models--OWNER--NAME/snapshots/COMMIT/file`` to
    ``models--OWNER--NAME/blobs/HASH``, and is allowed exactly that.

    Raises:
        GrowthError: a name with a folder in it, or a link that leads out.
    """
    if not name or name in (".", "..") or any(character in name for character in "/\\\0"):
        raise GrowthError("a file name that points outside its folder", where=f"{name!r} in {folder}")
    path = folder / name
    try:
        if not path.is_symlink():
            return path
        home, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, links in a circle, no valid Unicode
        raise GrowthError("a file that cannot be opened", where=str(path), why=str(error)) from error
    allowed = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        allowed.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(root) for root in allowed):
        raise GrowthError(
            "a link that leads out of its folder",
            where=str(path),
            why=f"it leads to {target}; a checkpoint of unknown origin could point at any file of this machine",
            fix="replace the link by the file itself, or give the folder where the files are",
        )
    return path


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: a file.
        what: what it should be, for messages, such as ``a configuration``.

    Raises:
        GrowthError: as `parse_object`, or the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_JSON_BYTES + 1)
    except OSError as error:
        raise GrowthError(f"{what} that cannot be read", where=str(path), why=str(error)) from error
    return parse_object(data, what, str(path))


def parse_object(data: bytes, what: str, where: str) -> dict[str, Any]:
    """The JSON object in UTF-8 text, read strictly.

    Raises:
        GrowthError: too long, not UTF-8, not JSON (NaN and Infinity are not), nested too deep, no object, or a key
            that stands there twice, of which a lenient reader would keep the last in silence.
    """
    if len(data) > MOST_JSON_BYTES:
        raise GrowthError(f"{what} that cannot be read", where=where, why=f"it is longer than {MOST_JSON_BYTES} bytes")
    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_no_constant)
        _check_depth(content)
        if b"\\u" in data:  # an escape can spell half a character, which no file can hold
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise GrowthError(f"{what} that cannot be read", where=where, why="it is nested too deep") from error
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError, numbers of thousands of digits
        why = str(error).replace("Expecting", "not JSON: expecting", 1)
        raise GrowthError(f"{what} that cannot be read", where=where, why=why) from error
    if not isinstance(content, dict):
        why = f"it is a JSON {type(content).__name__}, not an object"
        raise GrowthError(f"{what} that cannot be read", where=where, why=why)
    return content


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} stands there twice")
    return content


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(MOST_DEPTH):
        nested = [each for each in level if isinstance(each, dict | list)]
        level = [child for each in nested for child in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return
    raise RecursionError


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"not JSON: {name} is no number")
