"""Read files that a stranger may have written: paths that stay inside their folder, and strict JSON."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any, NoReturn

from phigrow.errors import GrowthError

MOST_JSON_BYTES = 1 << 25
"""32 MiB. The header of the largest model that phigrow takes (10,000 layers) is smaller, and parsing so much JSON fits
into an ordinary machine's memory. The safetensors library allows 100 MB."""

MOST_DEPTH = 64
"""Deepest nesting of JSON. Content must be writable again from any depth of the call stack."""

_VALID = "correct the file, or get it again from its source"


def contained(folder: Path, name: str) -> Path:
    """Return the path of a file directly inside a folder; it need not exist.

    A symbolic link may not leave the folder: otherwise a hostile checkpoint could copy any file of this machine into a
    grown model. The cache of the Hugging Face hub is the one exception. Its links lead from
    ``models--OWNER--NAME/snapshots/COMMIT/file`` to ``models--OWNER--NAME/blobs/HASH``, and only those are allowed.

    Raises:
        GrowthError: a name with a folder in it, or a link that leads out.
    """
    if not name or name in (".", "..") or any(character in name for character in "/\\\0"):
        raise GrowthError(
            f"the file name {name!r} points outside its folder", where=str(folder), fix="give a name without a path"
        )
    path = folder / name
    try:
        if not path.is_symlink():
            return path
        with contextlib.suppress(FileNotFoundError, PermissionError):
            path.stat()  # fails for links in a circle, which `resolve` accepts since Python 3.13
        home, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, links in a circle, no valid Unicode
        raise GrowthError(
            "the path cannot be resolved", where=str(path), why=str(error), fix="replace the link with the file itself"
        ) from error
    allowed = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        allowed.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(root) for root in allowed):
        raise GrowthError(
            "a symbolic link leads out of its folder",
            where=str(path),
            why=f"it leads to {target}, and a downloaded checkpoint must not read other files of this machine",
            fix="replace the link with the file itself, or give the folder that holds the files",
        )
    return path


def check_plain_name(name: Any, what: str, where: str) -> None:
    """Refuse a name of an untrusted file that is to become a file name, and could lead out of its folder.

    Args:
        name: of a parameter or a state: letters, digits and underscores, in parts with single dots between them.
        what: the kind of name for messages, such as ``a parameter``.
        where: the file or folder that has the name.

    Raises:
        GrowthError: the name is no string, or has any other character.

    >>> check_plain_name("model.layers.0.mlp.fc1.weight", "a parameter", "step-3")
    """
    if not isinstance(name, str) or not re.fullmatch(r"\w+(\.\w+)*", name):
        raise GrowthError(
            f"the checkpoint names {what} {name!r}",
            where=where,
            why="the name becomes a file name, and could lead out of the folder that is written",
            fix="take another checkpoint: this one is damaged, or was made to mislead",
        )


def read_json_strict(path: Path, what: str, *, nan: bool = False) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: a file.
        what: the name of the content for messages, such as ``the configuration``.
        nan: accept NaN and Infinity, which Python writes although they are not JSON.

    Raises:
        GrowthError: as `parse_json_strict`, or the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_JSON_BYTES + 1)
    except OSError as error:
        raise GrowthError(
            f"{what} cannot be read", where=str(path), why=str(error), fix="check the path and its permissions"
        ) from error
    return parse_json_strict(data, what, str(path), nan=nan)


def parse_json_strict(data: bytes, what: str, where: str, *, nan: bool = False) -> dict[str, Any]:
    """Return the JSON object in UTF-8 text, which may begin with a byte-order mark.

    Raises:
        GrowthError: the text is too long, not UTF-8, not JSON, nested too deep or no object; or a key appears twice
            (a lenient reader would silently keep the last).
    """
    if len(data) > MOST_JSON_BYTES:
        raise GrowthError(
            f"{what} cannot be read", where=where, why=f"it is longer than {MOST_JSON_BYTES} bytes", fix=_VALID
        )
    try:
        constant = float if nan else _no_constant
        content = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_distinct, parse_constant=constant)
        _check_depth(content)
        if b"\\u" in data:  # an escape can spell half a character; only a byte of a path may be one
            json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogateescape")
    except RecursionError as error:
        raise GrowthError(
            f"{what} cannot be read", where=where, why=f"its nesting is deeper than {MOST_DEPTH} levels", fix=_VALID
        ) from error
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError, numbers of thousands of digits
        why = str(error).replace("Expecting", "not JSON: expecting", 1)
        raise GrowthError(f"{what} cannot be read", where=where, why=why, fix=_VALID) from error
    if not isinstance(content, dict):
        why = f"it holds a JSON {type(content).__name__}, not an object"
        raise GrowthError(f"{what} cannot be read", where=where, why=why, fix=_VALID)
    return content


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} appears twice")
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
    raise ValueError(f"not JSON: {name} is not a JSON number")
