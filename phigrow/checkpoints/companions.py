"""The one writer of the files beside the weights: configurations, tokenizer files and the model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from phigrow.checkpoints.configuration import ResolvedConfig
from phigrow.checkpoints.model_card import CARD_FILE
from phigrow.checkpoints.token_ids import KEYS, TokenIds
from phigrow.checkpoints.tokenizer_folder import copy_tokenizer
from phigrow.files.atomic import atomic_json, atomic_write
from phigrow.files.untrusted import contained
from phigrow.models.config import Config, load_config

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True)
class Companions:
    """Everything that a Hugging Face folder has beside its weights.

    Attributes:
        config: content of ``config.json``.
        generation: content of ``generation_config.json``.
        card: content of ``README.md``, see `phigrow.checkpoints.model_card.model_card`.
        tokenizer: a folder whose tokenizer files are copied, or None.
    """

    config: Config
    generation: Config
    card: str
    tokenizer: Path | None = None

    def write(self, folder: Path) -> None:
        """Write the files into an existing folder."""
        atomic_json(folder / CONFIG_FILE, self.config, indent=2)
        atomic_json(folder / GENERATION_FILE, self.generation, indent=2)
        atomic_write(folder / CARD_FILE, self.card)
        if self.tokenizer is not None:
            copy_tokenizer(self.tokenizer, folder)


def make_companions(
    resolved: ResolvedConfig, dtype: str, ids: TokenIds, generation: Config, *, card: str, tokenizer: Path | None
) -> Companions:
    """Return the files beside weights.

    Args:
        resolved: the model's configuration.
        dtype: of the weights.
        ids: of the special tokens.
        generation: the source's generation settings, which stay as they are but for the ids.
        card: the model card.
        tokenizer: a folder whose tokenizer files are copied, or None.
    """
    settings = {key: value for key, value in generation.items() if key not in (*KEYS, "_from_model_config")}
    generated = dict(sorted((settings | ids.generation).items()))
    return Companions(resolved.stored(dtype, ids.model), generated, card, tokenizer)


def generation_settings(folder: Path) -> Config:
    """Return the content of a folder's ``generation_config.json``; empty if there is none.

    Raises:
        GrowthError: it is no JSON object, or a link that leads out of the folder.
    """
    file = contained(folder, GENERATION_FILE)
    return load_config(file) if file.is_file() else {}
