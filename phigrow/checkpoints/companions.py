"""The one writer of the files beside the weights: configurations, tokenizer files and the model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from phigrow.checkpoints.configuration import ResolvedConfig
from phigrow.checkpoints.model_card import CARD_FILE
from phigrow.checkpoints.token_ids import CONFIG_FILE, GENERATION_FILE, KEYS, TokenIds
from phigrow.checkpoints.tokenizer_folder import copy_tokenizer
from phigrow.files.atomic import atomic_json, atomic_write
from phigrow.files.untrusted import contained
from phigrow.models.config import Config, load_config


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


LEGACY_GENERATION: Config = {
    "max_length": 20, "min_length": 0, "do_sample": False, "early_stopping": False, "num_beams": 1,
    "num_beam_groups": 1, "num_return_sequences": 1, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0,
    "repetition_penalty": 1.0, "length_penalty": 1.0, "diversity_penalty": 0.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "remove_invalid_values": False, "exponential_decay_length_penalty": None,
    "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
"""Generation settings that older versions of transformers stored in ``config.json``, with their defaults there."""


def generation_settings(folder: Path) -> Config:
    """Return the content of a folder's ``generation_config.json``.

    Without this file, transformers takes the generation settings of ``config.json``. Those that are no defaults are
    returned; the result is empty if there are none.

    Raises:
        GrowthError: a file is no JSON object, or a link that leads out of the folder.
    """
    file = contained(folder, GENERATION_FILE)
    if file.is_file():
        return load_config(file)
    config = load_config(folder) if contained(folder, CONFIG_FILE).is_file() else {}
    found = {key: config.get(key) for key in LEGACY_GENERATION}
    return {key: value for key, value in found.items() if value not in (None, LEGACY_GENERATION[key])}
