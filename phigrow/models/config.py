"""Read Hugging Face model configurations as plain dictionaries, in the spelling of transformers 4 or 5."""

from __future__ import annotations

import math
from importlib import resources
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.files.paths import user_path
from phigrow.files.untrusted import contained, read_json_strict

Config = dict[str, Any]

SHIPPED = ("phi-1-small.json", "phi-1.json", "phi-1_5.json", "phi2.json")
"""Configurations inside the package, with the published values; of phi-1-small only sizes are published."""


def load_config(ref: str | Path | Config) -> Config:
    """Return a model configuration as a dictionary, exactly as it is spelled.

    Args:
        ref: a dictionary (returned as a copy), a JSON file, a folder with a ``config.json``, or the name of a
            configuration that ships with phigrow, with or without ``.json`` (``phi2.json``).

    Raises:
        GrowthError: nothing of that name, not a JSON object, or a link that leads out of the folder.

    >>> load_config("phi2.json")["hidden_size"]
    2560
    """
    if isinstance(ref, dict):
        return dict(ref)
    given = path = user_path(ref)
    if path.is_dir():
        path = contained(path, "config.json")
    if path.is_file():
        return read_json_strict(path, "the configuration")
    if not given.is_dir() and (name := shipped_name(ref)) is not None:
        with resources.as_file(resources.files("phigrow.models") / "configs" / name) as shipped:
            return read_json_strict(shipped, "the configuration")
    if given.is_dir():
        export = given / "export"
        raise GrowthError(
            "the folder has no config.json",
            where=str(ref),
            why="it is the folder of a training run" if (export / "config.json").is_file() else None,
            fix=f"give {export}"
            if (export / "config.json").is_file()
            else "give the folder of a checkpoint"
            + (f", or {name} for the configuration that phigrow ships" if (name := _shipped_file(ref)) else ""),
        )
    raise GrowthError(
        f"there is no configuration {str(ref)!r}",
        where=str(path.absolute()),
        why="no file or folder has this path, and phigrow ships no configuration of this name",
        fix=f"give a path, or one of {', '.join(SHIPPED)}",
    )


def _shipped_file(ref: str | Path) -> str | None:
    """Return the shipped file that has the name of a folder, unless the folder has this very name."""
    name = shipped_name(ref)
    return None if name is None or user_path(name).exists() else name


def shipped_name(ref: str | Path) -> str | None:
    """Return the shipped file of a bare name, or None (``phi2`` and ``phi2.json`` -> ``phi2.json``)."""
    name = str(ref)
    return next((shipped for shipped in SHIPPED if name in (shipped, shipped.removesuffix(".json"))), None)


def normalised(config: Config) -> Config:
    """Return a copy with one spelling: ``rope_theta``, ``partial_rotary_factor``, ``rope_type`` and ``dtype`` on top.

    ``rope_settings`` holds the other settings of a rotary scaling, such as ``factor``.

    transformers 4 writes ``rope_theta``, ``partial_rotary_factor``, ``rope_scaling`` and ``torch_dtype``;
    transformers 5 writes ``rope_parameters`` and ``dtype``. Where both are there, version 5's wins, as it does there.

    Raises:
        GrowthError: rotary settings that are no object, or a ``rope_theta`` that is no positive number.
    """
    out = dict(config)
    rope: Config = {}
    for name, neox_name in (("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct")):
        if neox_name in out:
            out.setdefault(name, out.pop(neox_name))
    for key in ("rope_scaling", "rope_parameters"):
        settings = out.pop(key, None) or {}
        if not isinstance(settings, dict):
            raise GrowthError(
                f"{key} is {settings!r}, but must be an object",
                where="the configuration",
                fix=f"correct {key}, or leave it out",
            )
        rope |= settings
    named = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    out["rope_settings"] = {key: value for key, value in sorted(rope.items()) if key not in named}
    out["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", out.get("rope_theta", 10000.0))
    if not is_number(theta) or theta <= 0:
        raise GrowthError(
            f"rope_theta is {theta!r}, but must be a positive number",
            where="the configuration",
            fix="correct rope_theta, or leave it out for 10000",
        )
    out["rope_theta"] = float(theta)
    if "partial_rotary_factor" in rope:
        out["partial_rotary_factor"] = rope["partial_rotary_factor"]
    torch_dtype = out.pop("torch_dtype", None)
    out["dtype"] = str(out.get("dtype") or torch_dtype or "float32").removeprefix("torch.")
    return out


def is_number(value: Any) -> bool:
    """Return True for a finite number; a bool, which is an int in Python, is none."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return False
