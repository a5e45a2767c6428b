"""Decide, before a run trains, what its export has beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from phigrow.checkpoints.companions import Companions, generation_settings, make_companions
from phigrow.checkpoints.configuration import resolve_config
from phigrow.checkpoints.model_card import model_card
from phigrow.checkpoints.origin import Origin, origin_of
from phigrow.checkpoints.provenance import TRAINING_FILE
from phigrow.checkpoints.token_ids import BOS, EOS, TokenIds, choose_token_ids, tokenizer_ids
from phigrow.corpus.blocks import DataSource
from phigrow.models.config import Config
from phigrow.models.cost import count_cost
from phigrow.training.export_place import STORED
from phigrow.training.settings import SCRATCH

if TYPE_CHECKING:
    from phigrow.training.configuration import RunConfig

_MODEL = "the model's configuration"


def export_files(config: RunConfig, model_dict: Config, blocks: DataSource) -> Companions:
    """Return the files beside the weights of a run's export, after transformers has accepted the configuration.

    The generation settings, the licence and, where its own configuration has them, the ids of special tokens are those
    of the checkpoint that the run starts from. A run from scratch has the ids of its data.

    Args:
        config: the run.
        model_dict: the configuration of its model.
        blocks: its data, whose tokenizer is copied.

    Raises:
        GrowthError: transformers would not load the export, or a special token is outside the vocabulary.
    """
    scratch, start = config.init == SCRATCH, Path(config.init)
    generation = {} if scratch else generation_settings(start)
    tokenizer = Path(blocks.tokenizer_dir) if blocks.tokenizer_dir else None
    ids = _token_ids(model_dict, generation, tokenizer, blocks.eos_token_id, scratch=scratch)
    resolved = resolve_config(model_dict, _MODEL)
    resolved.check_tensors(resolved.family.state_shapes(model_dict))
    dtype = STORED[config.stored_dtype]
    origin = None if scratch else origin_of(start, start)
    card = model_card(
        _card_text(config, model_dict, origin, dtype),
        source=None if scratch else start,
        repository=origin.repository if origin else None,
        tags=["phigrow"],
    )
    return make_companions(resolved, dtype, ids, generation, card=card, tokenizer=tokenizer)


def _token_ids(
    model_dict: Config, generation: Config, tokenizer: Path | None, eos_token_id: int, *, scratch: bool
) -> TokenIds:
    named = model_dict
    if scratch:
        # A configuration that only gives sizes knows nothing of the data's tokens; padding is a part of the model.
        named = {key: value for key, value in model_dict.items() if key not in (BOS, EOS)}

    def from_data(key: str) -> int | None:
        if key == EOS:
            return eos_token_id
        return None if tokenizer is None else tokenizer_ids(tokenizer)(key)

    return choose_token_ids(
        named,
        vocab=model_dict["vocab_size"],
        where=_MODEL,
        generation=generation,
        tokenizer=from_data,
        source_place="the run's start",
    )


def _card_text(config: RunConfig, model_dict: Config, origin: Origin | None, dtype: str) -> str:
    parameters = count_cost(model_dict).parameters / 1e6
    start = "from scratch" if origin is None else f"from {origin.name}"
    return f"""# {model_dict["model_type"]} of {parameters:,.1f}M parameters, trained {start}

A run of phigrow trained it {start}, with seed {config.seed}, and stored it as {dtype}. `{TRAINING_FILE}` holds the
steps and losses of the run, and the tokens, FLOPs and seconds of all training so far.
"""
