"""Build the model of a run: configuration, attention and weights."""

from __future__ import annotations

import contextlib
import functools
import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from phigrow.checkpoints.configuration import resolve_config
from phigrow.checkpoints.fingerprint import has_weights
from phigrow.checkpoints.hub_names import download_advice
from phigrow.checkpoints.stored_model import QUANTIZATION, stored_model_config
from phigrow.errors import GrowthError
from phigrow.files.foreign import recognise
from phigrow.models.config import Config, load_config, normalised
from phigrow.models.families import family_of
from phigrow.models.transformers_errors import transformers_errors
from phigrow.models.versions import no_init_weights
from phigrow.training.activation import fuse_gelu
from phigrow.training.attention import registered_name
from phigrow.training.configuration import DEMO_MODEL, RunConfig
from phigrow.training.loss import attach_loss
from phigrow.training.recompute import recompute_layers
from phigrow.training.settings import DEMO, SCRATCH
from phigrow.training.weights import fill_from_checkpoint, fill_from_scratch

if TYPE_CHECKING:
    from phigrow.training.process import World

_SIZES = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "partial_rotary_factor", "rope_theta",
)  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def model_config(config: RunConfig, *, data_vocab: int, seq_len: int, eos_token_id: int | None = None) -> Config:
    """Return the Hugging Face configuration that a run trains, checked against its data.

    Raises:
        GrowthError: ``model`` contradicts the checkpoint, the vocabulary is smaller than the data's, or the blocks are
            longer than ``max_position_embeddings``.
    """
    if config.init != SCRATCH:
        if not Path(config.init).is_dir():
            foreign = recognise(Path(config.init))
            if foreign is not None:
                raise foreign.error("there is no checkpoint to start from", str(Path(config.init).absolute()))
            raise GrowthError(
                "there is no checkpoint to start from",
                where=str(Path(config.init).absolute()),
                fix=f"set init to a checkpoint folder, or to scratch{download_advice(config.init, 'init')}",
            )
        out = stored_model_config(Path(config.init))
        if config.model is not None:
            _check_agreement(out, _named(config.model), config)
        _check_sizes(out, f"{config.init}/config.json", data_vocab)
        if config.vocab_size not in (None, out["vocab_size"]):
            raise GrowthError(
                f"vocab_size is {config.vocab_size}, but the checkpoint has {out['vocab_size']}",
                where=f"{config.init}/config.json",
                fix="remove vocab_size: a run that starts from a checkpoint trains the checkpoint's model",
            )
    else:
        out = _named(config.model or DEMO)
        if config.vocab_size is not None:
            out["vocab_size"] = config.vocab_size
        elif (config.model or DEMO) == DEMO:
            out["vocab_size"] = data_vocab
        _check_sizes(out, "model", data_vocab)
        out.pop(QUANTIZATION, None)  # the run trains floating point weights, and exports these
        if out.get("eos_token_id") is None:
            out["eos_token_id"] = eos_token_id
    if out["vocab_size"] < data_vocab:
        raise GrowthError(
            f"the model has a vocabulary of {out['vocab_size']} tokens, but the data has one of {data_vocab}",
            where="vocab_size",
            fix="raise vocab_size, or prepare the data with the model's tokenizer",
        )
    if seq_len > out.get("max_position_embeddings", seq_len):
        raise GrowthError(
            f"the data has blocks of {seq_len} tokens, but the model has {out['max_position_embeddings']} positions",
            where="max_position_embeddings",
            fix="prepare the data with a smaller --seq-len",
        )
    return out


def _check_sizes(model: Config, where: str, data_vocab: int) -> None:
    """Check the sizes of a configuration before anything is read from it.

    Raises:
        GrowthError: there is no family of its model type, or a size is missing or wrong.
    """
    if model.get("vocab_size") is None and "model_type" in model:
        raise GrowthError(
            "the model's configuration has no vocab_size",
            where=where,
            fix=f"set vocab_size: {data_vocab} for the tokens of the data, or a larger one",
        )
    try:
        family_of(model, where).sizes_of(model)
    except GrowthError as error:
        raise error if error.where == where else error.at(where) from None


def _named(model: str | Config) -> Config:
    return dict(DEMO_MODEL) if model == DEMO else load_config(model)


def _check_agreement(stored: Config, named: Config, config: RunConfig) -> None:
    stored, named = normalised(stored), normalised(named)
    for key in _SIZES:
        if key in named and stored.get(key) != named[key]:
            raise GrowthError(
                f"{key} is {stored.get(key)} in the checkpoint, but {named[key]} in model",
                where=f"model, and {config.init}/config.json",
                fix="leave model out: a run that starts from a checkpoint trains the checkpoint's model",
            )


def build_model(
    config: RunConfig,
    model_dict: Config,
    world: World,
    attention: str,
    engine_config: dict[str, Any],
    eos_token_id: int | None = None,
    *,
    resumes: bool = False,
) -> Any:
    """Build the model on every rank and fill it; under ZeRO-3 a rank holds at most one complete layer at a time.

    At other stages a rank holds the model in the run's data type, on its device, and blocks of what it reads.

    With ``resumes``, a checkpoint of the run replaces the weights. The folder in ``init`` may then have none.

    Returns:
        A transformers model whose ``forward(blocks)`` is the loss, see `attach_loss`.

    Raises:
        GrowthError: transformers has no such model, or the checkpoint does not fit it.
    """
    hf_config = causal_lm_config(model_dict)
    _spare_imports()
    partitioned = config.stage == 3
    with contextlib.ExitStack() as stack:
        if partitioned:
            import deepspeed

            stack.enter_context(deepspeed.zero.Init(config_dict_or_path=engine_config))
        model = empty_model(hf_config, config, attention)
    model.tie_weights()  # transformers does this in its initialisation, which was skipped
    if partitioned:
        _restore_buffers(model, hf_config, world)
    else:
        place_parameters(model, DTYPES.get(config.dtype, torch.float32), world.device)
    if config.init == SCRATCH or (resumes and not has_weights(Path(config.init))):
        fill_from_scratch(model, config.seed, initializer_range(model_dict), world)
    else:
        fill_from_checkpoint(model, Path(config.init))
    recompute_layers(model, config.activation_checkpointing, partitioned=partitioned)
    fuse_gelu(model)
    attach_loss(model, config.loss, within=eos_token_id if config.documents == "within" else None)
    model.train()
    return model


def causal_lm_config(model_dict: Config) -> Any:
    """Return transformers' configuration object, and import the code of its model.

    The import must come before zero.Init, which replaces torch.tensor: inside it, torch's own modules fail to import.

    Raises:
        GrowthError: phigrow or transformers has no such model, or they read its configuration in different ways.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    hf_config = resolve_config(model_dict, "the model's configuration").hf_config
    MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)]
    return hf_config


def empty_model(hf_config: Any, config: RunConfig, attention: str) -> Any:
    """Build a transformers model in fp32 without giving its parameters values; the caller ties its weights.

    Args:
        hf_config: the result of `causal_lm_config`.
        config: the run; ``documents`` decides whether attention keeps inside documents.
        attention: the chosen attention, see `phigrow.training.attention_choice`.
    """
    from transformers import AutoModelForCausalLM

    name = registered_name(attention, within=config.documents == "within")
    make: Any = AutoModelForCausalLM.from_config  # it has no annotations
    with transformers_errors("build the model", "the model's configuration"), no_init_weights():
        return make(hf_config, attn_implementation=name, dtype=torch.float32)


@functools.cache
def _spare_imports() -> None:
    """Exclude all present objects from garbage collection; done once per process, before the model is built.

    DeepSpeed collects garbage up to five times when it makes an engine. With a million imported objects each collection
    takes 0.2 to 0.3 s.
    """
    gc.collect()
    gc.freeze()


def place_parameters(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give parameters without values memory in their final data type on their final device.

    So the ranks of a host do not each hold the model in fp32 in its memory before they move it. A value that is copied
    into a parameter is rounded once, as if it had been rounded after it was copied.
    """
    for parameter in model.parameters():
        parameter.data = torch.empty(parameter.shape, dtype=dtype, device=device)


def _restore_buffers(model: nn.Module, hf_config: Any, world: World) -> None:
    """Compute the rotary frequencies again, because torch.arange inside ``zero.Init`` has rounded them to bf16."""
    for module in model.modules():
        if "inv_freq" in dict(module.named_buffers(recurse=False)):
            fresh = type(module)(config=hf_config)
            for name, value in fresh.named_buffers(recurse=False):
                setattr(module, name, value.to(world.device))


def initializer_range(model_dict: Config) -> float:
    """Return the standard deviation of a model's scratch weights."""
    return float(model_dict.get("initializer_range", 0.02))


def has_dropout(model_dict: Config) -> bool:
    """Return true if training draws random numbers, because a dropout rate of the model is above 0."""
    keys = family_of(model_dict, "the model's configuration").dropout_keys
    return any(float(model_dict.get(key) or 0.0) > 0 for key in keys)
