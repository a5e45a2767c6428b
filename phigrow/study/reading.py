"""Read YAML files strictly: errors name the key, before anything runs."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from phigrow.corpus.local_files import TRAIN
from phigrow.corpus.sources import EMBEDDED, local_files
from phigrow.errors import GrowthError
from phigrow.files.paths import user_path
from phigrow.files.shipped import shipped_names
from phigrow.files.strict_yaml import read_yaml
from phigrow.models.config import Config, load_config
from phigrow.training.declaration import Role

GROWTH = ("depth", "rounding", "noise")
"""Options of every growth; methods have further options."""


def read_recipe(path: Path, kind: str = "study") -> Any:
    """Return the content of the YAML file of a study or of stages."""
    name = "recipe of stages" if kind == "stages" else kind
    return read_yaml(path, name, f"give a YAML file, or a shipped name: {shipped_names(kind)}")


def mapping(value: Any, where: str) -> dict[str, Any]:
    """Return a mapping with its keys as text; anything else is an error."""
    if not isinstance(value, dict):
        raise GrowthError(f"{value!r} is not a mapping", where=where, fix="write 'key: value' lines")
    return {str(key): content for key, content in value.items()}


def only(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse unknown keys; the error has the nearest known ones."""
    known = list(known)
    for key in given:
        if key not in known:
            raise near(f"there is no key {key!r}", where, key, known)


def near(message: str, where: str, word: str, known: list[str]) -> GrowthError:
    """Return an error about an unknown word, with the nearest known ones."""
    close = difflib.get_close_matches(word, known, n=3)
    fix = f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(known)}"
    return GrowthError(message, where=where, fix=fix)


def run_keys(value: Any, refused: Role, where: str, why: str = "the study decides it") -> dict[str, Any]:
    """Read keys of a training run, converted to their types; keys with one of the ``refused`` roles are an error."""
    from phigrow.training.configuration import RunConfig
    from phigrow.training.options import checked

    keys = checked(mapping(value or {}, where), where)
    for key in keys:
        if key in RunConfig.keys_with(refused):
            raise GrowthError(f"{key} cannot be set here", where=where, why=why, fix="leave it out")
    return keys


def number(value: Any, key: str, path: Path) -> float:
    """Return a value as a number; an error if it is not positive and finite."""
    try:
        given = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        given = math.nan
    if not (math.isfinite(given) and given > 0):
        raise GrowthError(f"{key} is {value!r}", where=f"{key} in {path}", fix="give a positive number")
    return given


def whole(value: Any, key: str, path: Path | str, *, least: int) -> tuple[int, ...]:
    """Return one or several whole numbers as a tuple; an error if one is below ``least`` or occurs twice."""
    items = value if isinstance(value, list) else [value]
    if not items or any(isinstance(n, bool) or not isinstance(n, int) or n < least for n in items):
        raise GrowthError(f"{key} is {value!r}", where=f"{key} in {path}", fix=f"give whole numbers, {least} or more")
    if len(set(items)) < len(items):
        raise GrowthError(f"{key} has a value twice: {value!r}", where=f"{key} in {path}", fix="give each value once")
    return tuple(items)


def seeds(value: Any, path: Path) -> tuple[int, ...]:
    """Seeds, as a list: one number could be a seed, or their count."""
    if isinstance(value, int) and not isinstance(value, bool):
        many = f" or {list(range(value))}" if 1 < value <= 10 else ""
        raise GrowthError(
            f"seeds is {value}",
            where=f"seeds in {path}",
            why="it may be one seed or a number of seeds",
            fix=f"give a list: [{value}]{many}",
        )
    return whole(value, "seeds", path, least=0)


def single(value: Any, key: str, path: Path | str, *, least: int) -> int:
    """Return one whole number; a list is an error."""
    if isinstance(value, list):
        raise GrowthError(f"{key} is {value!r}", where=f"{key} in {path}", fix="give one whole number")
    return whole(value, key, path, least=least)[0]


def optional(given: dict[str, Any], key: str, path: Path) -> int | None:
    """Return a whole number, or None if the key is left out."""
    return single(given[key], key, path, least=1) if given.get(key) else None


def data_of(value: Any, path: Path) -> tuple[Path | dict[str, Any], int]:
    """Return a folder of packed blocks or the arguments of `phigrow.corpus.prepare`, and the tokens per block."""
    from phigrow.corpus.build import prepare
    from phigrow.corpus.metadata import read_metadata

    if isinstance(value, str):
        folder = beside(value, path)
        return folder, int(read_metadata(folder)["seq_len"])
    arguments = mapping(value, f"data in {path}")
    known = [key for key in prepare.__annotations__ if key not in ("out", "overwrite", "progress", "return")]
    only(arguments, known, f"data in {path}")
    if "ref" not in arguments:
        raise GrowthError(
            "the data has no 'ref'",
            where=f"data in {path}",
            fix="give ref: <file, folder or dataset of the hub>, or ref: embedded for the documentation of Python",
        )
    arguments["ref"] = _text_beside(str(arguments["ref"]), path)
    return arguments, whole(arguments.get("seq_len", 256), "seq_len", path, least=2)[0]


def _text_beside(ref: str, path: Path) -> str:
    """Return the place of a text: beside the recipe if it exists there. The spelling of other places stays."""
    here, there = user_path(ref), path.parent / user_path(ref)
    if ref == EMBEDDED or not there.exists() or (here.exists() and there.samefile(here)):
        return ref
    return str(there)


def check_text(data: Path | dict[str, Any], packed: Path) -> None:
    """Refuse text that does not exist, before a job starts.

    Args:
        data: the first result of `data_of`.
        packed: folder of the packed blocks. Where it exists, the text is not needed any more.

    Raises:
        GrowthError: the text is a path, and there is no such file or folder. A name on the hub is not looked up.
    """
    if isinstance(data, dict) and data["ref"] != EMBEDDED and not packed.is_dir():
        try:
            local_files(data["ref"], str(data.get("split", TRAIN)), data.get("config"))
        except GrowthError as error:
            raise error.at("the text of the study, data.ref") from None


def config_of(value: Any, path: Path, key: str) -> Config:
    """Return a configuration from a mapping, a shipped name, or a file, which is tried beside the recipe first."""
    if not isinstance(value, str | dict):
        raise GrowthError(f"{key} is {value!r}", where=f"{key} in {path}", fix="give a config.json or a mapping")
    return load_config(beside(value, path) if isinstance(value, str) else value)


def beside(value: str, path: Path) -> Path:
    """Return a path beside the recipe if it exists, else the path as it was given."""
    there = path.parent / user_path(value)  # an absolute path replaces the folder
    return there if there.exists() else user_path(value)
