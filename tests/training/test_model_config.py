"""Mistakes in the configuration of a run's model: one error that names the key and the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scenarios import TINY

import phigrow
from phigrow.errors import GrowthError
from phigrow.models.versions import reads_rope_parameters
from phigrow.training import RunConfig
from phigrow.training.configuration import DEMO_MODEL
from phigrow.training.model import causal_lm_config, empty_model, model_config


def without(*keys: str, **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in TINY.items() if key not in keys} | changes


def of(config: RunConfig) -> dict[str, Any]:
    return model_config(config, data_vocab=90, seq_len=16, eos_token_id=0)


@pytest.mark.parametrize("kind", ["mapping", "file", "checkpoint", "checkpoint and vocab_size"])
def test_a_model_without_vocab_size_is_refused_wherever_it_stands(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps(without("vocab_size")))
    settings: dict[str, Any] = {
        "mapping": {"model": without("vocab_size")},
        "file": {"model": str(tmp_path / "config.json")},
        "checkpoint": {"init": str(tmp_path), "model": None},
        "checkpoint and vocab_size": {"init": str(tmp_path), "model": None, "vocab_size": 96},
    }[kind]
    message = r"configuration has no vocab_size\n  where: .+\n  what to do: set vocab_size: 90 "
    with pytest.raises(GrowthError, match=message):
        of(RunConfig(**settings))


def test_a_model_with_vocab_size_or_a_setting_for_it_is_read(tmp_path):
    assert of(RunConfig(model=TINY))["vocab_size"] == TINY["vocab_size"]
    assert of(RunConfig(model=without("vocab_size"), vocab_size=96))["vocab_size"] == 96
    assert of(RunConfig())["vocab_size"] == 90
    assert DEMO_MODEL["model_type"] == "phi"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size is None, but must be a positive whole number"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2', but must be"),
        ({"num_attention_heads": 5}, "hidden_size is 32, which is not a multiple of num_attention_heads 5"),
        ({"vocab_size": "many"}, "vocab_size is 'many', but must be"),
        ({"model_type": None}, "phigrow does not support model_type None"),
    ],
)
def test_a_wrong_size_is_refused_before_anything_is_built(changes, message):
    with pytest.raises(GrowthError, match=rf"{message}[\s\S]*where: model"):
        of(RunConfig(model=TINY | changes))


def test_what_transformers_cannot_build_is_one_error():
    config = RunConfig(model=TINY)
    with pytest.raises(GrowthError, match=r"transformers cannot build the model\n.*\n  why: KeyError: .*mystery"):
        empty_model(causal_lm_config(TINY | {"hidden_act": "mystery"}), config, "sdpa")
    if reads_rope_parameters():  # version 4 of transformers does not check types of values
        with pytest.raises(GrowthError, match=r"transformers cannot read the configuration\n.*\n  why: .*use_cache"):
            causal_lm_config(TINY | {"use_cache": "maybe"})


def test_a_checkpoint_that_transformers_cannot_load_is_one_error(save_model, tmp_path):
    from tiny_models import phi_config, phi_model

    folder: Path = save_model(phi_model(phi_config()))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "mystery"}))
    with pytest.raises(
        GrowthError, match=rf"transformers cannot load the checkpoint\n  where: {folder}\n  why: .*mystery"
    ):
        phigrow.verify(folder, folder, backend="transformers")


@pytest.mark.parametrize("key", ["zero_optimization", "bf16", "optimizer"])
def test_a_section_of_the_deepspeed_file_must_be_an_object(tmp_path, key):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({key: True}))
    with pytest.raises(GrowthError, match=f"{key} in the DeepSpeed file is True, but must be an object"):
        RunConfig(deepspeed=str(path)).stage  # noqa: B018
