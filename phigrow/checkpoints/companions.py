"""The one writer of the files beside the weights: configurations, tokenizer files and the model card."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from phigrow.checkpoints.tokenizer_folder import copy_tokenizer
from phigrow.files.atomic import atomic_json, atomic_write
from phigrow.models.config import Config, load_config

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
CARD_FILE = "README.md"

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_companions(
    folder: Path, config: Config, generation: Config, *, tokenizer: Path | None = None, card: str | None = None
) -> None:
    """Write everything that a Hugging Face folder has beside its weights.

    Args:
        folder: an existing folder.
        config: content of ``config.json``, see `stored_config`.
        generation: content of ``generation_config.json``, see `generation_config`.
        tokenizer: a folder whose tokenizer files are copied.
        card: content of ``README.md``, see `model_card`.
    """
    atomic_json(folder / CONFIG_FILE, config, indent=2)
    atomic_json(folder / GENERATION_FILE, generation, indent=2)
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder)
    if card is not None:
        atomic_write(folder / CARD_FILE, card)


def stored_config(config: Config, architecture: str, dtype: str) -> Config:
    """Return the configuration of weights that are stored in a dtype.

    A reference to code of the source's repository (``auto_map``) is left out, because that code is not copied.

    Args:
        config: of the model.
        architecture: the transformers class that loads it, if the configuration names none.
        dtype: of the weights. It keeps the spelling that is there (``dtype`` or ``torch_dtype``), of which both
            versions of transformers read the older one.
    """
    stored = {key: value for key, value in config.items() if key != "auto_map"}
    stored["architectures"] = stored.get("architectures") or [architecture]
    stored["dtype" if "dtype" in stored and "torch_dtype" not in stored else "torch_dtype"] = dtype
    return stored


def generation_config(config: Config, source: Path) -> Config:
    """Return the source's generation settings, with the token ids of a configuration."""
    file = source / GENERATION_FILE
    settings = load_config(file) if file.is_file() else {}
    return {**settings, **{key: config[key] for key in _TOKEN_IDS if config.get(key) is not None}}


def model_card(text: str, *, base_model: str, tags: Sequence[str]) -> str:
    """Return a Hugging Face model card: its metadata, then a text in Markdown."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=base_model, library_name="transformers", pipeline_tag="text-generation", tags=list(tags)
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def model_settings(config: Config) -> Config:
    """Return a stored configuration without its dtype, for a live model that is given one itself."""
    # A deep copy, because transformers writes into the rotary settings that it is given.
    return copy.deepcopy({key: value for key, value in config.items() if key not in ("torch_dtype", "dtype")})
