"""Configurations that have ``rope_parameters`` alone, which transformers 4 ignores without a word.

`make oldest` runs these tests with transformers 4, and the default tests with version 5.
"""

import json

import pytest
import torch
from tiny_models import phi_config, phi_model

import phigrow
from phigrow.checkpoints.configuration import resolve_config, stored_hf_config
from phigrow.errors import GrowthError
from phigrow.expansion.logits import compute_logits
from phigrow.models.versions import reads_rope_parameters

CONFIG = phi_config(32, 4, 48, 2, 2)  # a quarter of each head turns; transformers' default is a half
PARAMETERS = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25}


def with_parameters_alone(config):
    """The same configuration as transformers 5 spells it."""
    others = {key: value for key, value in config.items() if key not in ("rope_theta", "partial_rotary_factor")}
    return {**others, "rope_parameters": dict(PARAMETERS)}


@pytest.fixture
def stored(save_model):
    """A checkpoint whose configuration has rope_parameters alone, and logits of it in float64."""
    spelled = {**CONFIG, "rope_theta": 500.0}
    folder = save_model(phi_model(spelled))
    path = folder / "config.json"
    saved = json.loads(path.read_text())
    for key in ("rope_theta", "partial_rotary_factor", "rope_scaling"):
        saved.pop(key, None)
    path.write_text(json.dumps({**saved, "rope_parameters": PARAMETERS}))
    return folder


IDS = torch.arange(20).reshape(2, 10).numpy()


def test_both_backends_read_the_part_of_a_head_that_turns(stored):
    expected, _ = compute_logits(stored, IDS, "float64", "numpy")
    got, _ = compute_logits(stored, IDS, "float64", "transformers")
    assert abs(got - expected).max() < 1e-5
    # Negative control: a half of each head gives other logits.
    path = stored / "config.json"
    path.write_text(path.read_text().replace('"partial_rotary_factor": 0.25', '"partial_rotary_factor": 0.5'))
    other, _ = compute_logits(stored, IDS, "float64", "transformers")
    assert abs(other - expected).max() > 0.01


def test_the_model_that_training_builds_turns_the_part_that_the_configuration_names(stored):
    config = with_parameters_alone(CONFIG)
    for hf_config in (resolve_config(config, "x").hf_config, stored_hf_config(stored, config, "x")):
        from transformers import PhiForCausalLM

        model = PhiForCausalLM(hf_config)
        inverse = next(buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq"))
        assert inverse.tolist() == [1.0]  # one pair of coordinates; a half of a head has two
        assert model.model.layers[0].self_attn.rotary_ndims == 2


def test_expanding_it_preserves_the_function(stored, tmp_path):
    destination = with_parameters_alone(phi_config(48, 6, 72, 2, 2))
    phigrow.expand(stored, destination, tmp_path / "out", method="lossless")
    certificate = phigrow.verify(stored, tmp_path / "out", backend="transformers")
    assert certificate.passed
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["partial_rotary_factor"], written["rope_theta"]) == (0.25, 500.0)


def test_a_live_model_that_was_loaded_without_its_parameters_is_refused():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {key: value for key, value in CONFIG.items() if key not in ("torch_dtype", "architectures")}
    live = AutoModelForCausalLM.from_config(AutoConfig.for_model(**with_parameters_alone(config)))
    destination = with_parameters_alone(phi_config(48, 6, 72, 2, 2))
    if reads_rope_parameters():
        assert phigrow.expand_model(live, destination, method="lossless").config.hidden_size == 48
        return
    with pytest.raises(GrowthError, match="loaded the model with another rotary embedding") as caught:
        phigrow.expand_model(live, destination, method="lossless")
    assert "the axis rotary: 2 -> 4" in str(caught.value)
    # A model whose two spellings agree is grown.
    both = {**with_parameters_alone(config), "rope_theta": 500.0, "partial_rotary_factor": 0.25}
    live = AutoModelForCausalLM.from_config(AutoConfig.for_model(**both))
    assert phigrow.expand_model(live, destination, method="lossless").config.hidden_size == 48
