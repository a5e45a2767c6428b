"""Read Hugging Face model configurations as plain dictionaries, in the spelling of transformers 4 or 5."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError

Config = dict[str, Any]

SHIPPED = ("phi-1-small.json", "phi-1.json", "phi-1_5.json", "phi2.json")
"""Configurations inside the package: the published stock values (phi-1-small has none but its sizes)."""


def load_config(ref: str | Path | Config) -> Config:
    """Return a model configuration as a dictionary, exactly as it is spelled.

    Args:
        ref: a dictionary (returned as a copy), a JSON file, a folder with a ``config.json``, or the name of a
            configuration that ships with phigrow, with or without ``.json`` (``phi2.json``).

    Raises:
        GrowthError: nothing of that name, or not a JSON object.

    >>> load_config("phi2.json")["hidden_size"]
    2560
    """
    if isinstance(ref, dict):
        return dict(ref)
    path = Path(ref)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    elif (name := shipped_name(ref)) is not None:
        text = (resources.files("phigrow") / "configs" / name).read_text(encoding="utf-8")
    else:
        raise GrowthError(
            f"no configuration {str(ref)!r}",
            where=str(path.absolute()),
            why="it is no file or folder with a config.json here, and no configuration of that name is shipped",
            fix=f"give a path, or one of {', '.join(SHIPPED)}",
        )
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise GrowthError("a configuration that is not JSON", where=str(path), why=str(error)) from error
    if not isinstance(config, dict):
        raise GrowthError("a configuration that is not a JSON object", where=str(path), why=f"it is {type(config)}")
    return config


def shipped_name(ref: str | Path) -> str | None:
    """The shipped file that a bare name means, or None (``phi2`` and ``phi2.json`` -> ``phi2.json``)."""
    name = str(ref)
    return next((shipped for shipped in SHIPPED if name in (shipped, shipped.removesuffix(".json"))), None)


def normalised(config: Config) -> Config:
    """Return a copy with one spelling: ``rope_theta``, ``partial_rotary_factor``, ``rope_type`` and ``dtype`` on top.

    transformers 4 writes ``rope_theta``, ``partial_rotary_factor``, ``rope_scaling`` and ``torch_dtype``;
    transformers 5 writes ``rope_parameters`` and ``dtype``. Where both are there, version 5's wins, as it does there.
    """
    out = dict(config)
    rope = {**(out.pop("rope_scaling", None) or {}), **(out.pop("rope_parameters", None) or {})}
    out["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    out["rope_theta"] = float(rope.get("rope_theta", out.get("rope_theta", 10000.0)))
    if "partial_rotary_factor" in rope:
        out["partial_rotary_factor"] = rope["partial_rotary_factor"]
    torch_dtype = out.pop("torch_dtype", None)
    out["dtype"] = str(out.get("dtype") or torch_dtype or "float32").removeprefix("torch.")
    return out
