"""Read Hugging Face model configurations as plain dictionaries, in the spelling of transformers 4 or 5."""

from __future__ import annotations

import copy
import math
import re
from importlib import resources
from pathlib import Path
from typing import Any

from phigrow.errors import GrowthError
from phigrow.files.foreign import recognise
from phigrow.files.paths import user_path
from phigrow.files.untrusted import contained, read_json_strict

Config = dict[str, Any]

SHIPPED = ("phi-1-small.json", "phi-1.json", "phi-1_5.json", "phi2.json")
"""Configurations inside the package, with the published values; of phi-1-small only sizes are published."""

PUBLISHED = {
    "phi-2": "phi2.json",
    "microsoft/phi-1": "phi-1.json",
    "microsoft/phi-1_5": "phi-1_5.json",
    "microsoft/phi-2": "phi2.json",
}
"""Other names of models -> their configuration inside the package."""


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
        return copy.deepcopy(ref)  # transformers writes into the rotary settings that it is given
    given = path = user_path(ref)
    if path.is_dir():
        path = contained(path, "config.json")
    if path.is_file():
        if path.suffix != ".json" and (foreign := recognise(path)) is not None:
            raise foreign.error("the file is neither a configuration nor the folder of a checkpoint", str(ref))
        return read_json_strict(path, "the configuration")
    if not given.is_dir() and (name := shipped_name(ref)) is not None:
        with resources.as_file(resources.files("phigrow.models") / "configs" / name) as shipped:
            return read_json_strict(shipped, "the configuration")
    if given.is_dir():
        if (foreign := recognise(given)) is not None:
            raise foreign.error("the folder has no config.json", str(ref))
        raise GrowthError(
            "the folder has no config.json",
            where=str(ref),
            fix="give the folder of a checkpoint"
            + (f", or {name} for the configuration that phigrow ships" if (name := _shipped_file(ref)) else ""),
        )
    raise GrowthError(
        f"there is no configuration {str(ref)!r}",
        where=str(path.absolute()),
        why="no file or folder has this path, and phigrow ships no configuration of this name",
        fix=f"give a path, or one of {', '.join(SHIPPED)}{_download_advice(str(ref))}",
    )


def _download_advice(name: str) -> str:
    """Return the command that downloads a configuration, if a text may name a model on the hub; else an empty text."""
    match = re.match(r"(?:(?:https?:/+)?(?:huggingface|hf)\.co/|hf:/+)?(\w[\w.-]*/(\w[\w.-]*))", name)
    if match is None or name.endswith(".json"):
        return ""
    command = f"hf download {match[1]} config.json --local-dir {match[2]}"
    return f"; for a model on the hub, run `{command}`, and give {match[2]}"


def _shipped_file(ref: str | Path) -> str | None:
    """Return the shipped file that has the name of a folder, unless the folder has this very name."""
    name = shipped_name(ref)
    return None if name is None or user_path(name).exists() else name


def shipped_name(ref: str | Path) -> str | None:
    """Return the shipped file of a name, or None (``phi2``, ``phi2.json`` and ``phi-2`` -> ``phi2.json``)."""
    name = str(ref)
    names = PUBLISHED | {shipped.removesuffix(".json"): shipped for shipped in SHIPPED}
    return name if name in SHIPPED else names.get(name)


ORIGINAL = "original_max_position_embeddings"
"""Key of the context before a rotary scaling, inside the rotary settings or on top, where transformers prefers it."""

READS_ORIGINAL = ("llama3", "yarn", "longrope")
"""Rotary types for which transformers reads `ORIGINAL`; by default it is ``max_position_embeddings``."""


def context_of(config: Config) -> int:
    """Return ``max_position_embeddings``, or transformers' default for the model type.

    >>> context_of({"model_type": "phi"}), context_of({"model_type": "qwen2"})
    (2048, 32768)
    """
    default = 32768 if config.get("model_type") == "qwen2" else 2048
    return config.get("max_position_embeddings", default)  # type: ignore[no-any-return]


def rotary_keys(model_type: Any) -> tuple[str, str]:
    """Return the top-level keys of the rotary base and of the rotary part of a head, as the model type spells them.

    >>> rotary_keys("phi")
    ('rope_theta', 'partial_rotary_factor')
    """
    return ("rotary_emb_base", "rotary_pct") if model_type == "gpt_neox" else ("rope_theta", "partial_rotary_factor")


def normalised(config: Config) -> Config:
    """Return a copy with one spelling: ``rope_theta``, ``partial_rotary_factor``, ``rope_type`` and ``dtype`` on top.

    ``rope_settings`` holds the other settings of a rotary scaling, such as ``factor``.

    transformers 4 writes ``rope_theta``, ``partial_rotary_factor``, ``rope_scaling`` and ``torch_dtype``;
    transformers 5 writes ``rope_parameters`` and ``dtype``. Where several are there, the value is the one that
    transformers 5 takes: ``rope_scaling`` replaces all of ``rope_parameters``, and a value inside either of them goes
    before the same key on top. A GPT-NeoX spells the keys on top ``rotary_emb_base`` and ``rotary_pct``, and has no
    others; no other model type has these.

    Raises:
        GrowthError: rotary settings that are no object, or a rotary base that is no positive number.
    """
    out = dict(config)
    rope = _rotary_settings(out)
    theta_key, part_key = rotary_keys(config.get("model_type"))
    top = {key: out.pop(key) for key in ("rope_theta", "partial_rotary_factor", *rotary_keys("gpt_neox")) if key in out}
    theta_at = "rope_theta" if "rope_theta" in rope else theta_key
    theta = rope.get("rope_theta", top.get(theta_key, 10000.0))
    if not is_number(theta) or theta <= 0:
        raise GrowthError(
            f"{theta_at} is {theta!r}, but must be a positive number",
            where="the configuration",
            fix=f"correct {theta_at}, or leave it out for 10000",
        )
    out["rope_theta"] = float(theta)
    part = rope.get("partial_rotary_factor", top.get(part_key))
    if part is not None:
        out["partial_rotary_factor"] = part
    out["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    if out["rope_type"] in READS_ORIGINAL and ORIGINAL in config:
        rope[ORIGINAL] = config[ORIGINAL]
    named = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    out["rope_settings"] = {key: value for key, value in sorted(rope.items()) if key not in named}
    torch_dtype = out.pop("torch_dtype", None)
    out["dtype"] = str(out.get("dtype") or torch_dtype or "float32").removeprefix("torch.")
    return out


def _rotary_settings(out: Config) -> Config:
    """Take the rotary settings of both versions out of a configuration; return a copy of those that count."""
    rope: Config = {}
    for key in ("rope_parameters", "rope_scaling"):
        settings = out.pop(key, None) or {}
        if not isinstance(settings, dict):
            raise GrowthError(
                f"{key} is {settings!r}, but must be an object",
                where="the configuration",
                fix=f"correct {key}, or leave it out",
            )
        rope = settings or rope
    return dict(rope)


def unread_rotary_keys(config: Config) -> list[str]:
    """Return remarks on rotary keys of a configuration that transformers does not read and that say something else.

    >>> unread_rotary_keys({"model_type": "gpt_neox", "rope_theta": 500.0})
    ['rope_theta 500.0 is not read: the rotary base is 10000.0']
    """
    read = normalised(config)
    remarks = []
    for keys, name, value in (
        (("rope_theta", "rotary_emb_base"), "rotary base", read["rope_theta"]),
        (("partial_rotary_factor", "rotary_pct"), "rotary part of a head", read.get("partial_rotary_factor")),
    ):
        for key in keys:
            if config.get(key) is not None and config[key] != value:
                shown = "the default" if value is None else value
                remarks.append(f"{key} {config[key]} is not read: the {name} is {shown}")
    if config.get("rope_scaling") and config.get("rope_parameters"):
        alone = normalised({key: value for key, value in config.items() if key != "rope_scaling"})
        if alone != normalised({**config, "rope_parameters": None}):
            remarks.append("rope_parameters is not read: rope_scaling replaces all of it")
    return remarks


def is_number(value: Any) -> bool:
    """Return True for a finite number; a bool, which is an int in Python, is none."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return False
