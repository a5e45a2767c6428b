"""Configurations as transformers resolves them, and spelled for all its versions."""

import dataclasses

import pytest
from tiny_models import phi_config
from transformers import AutoConfig

from phigrow.checkpoints.configuration import ROTARY_KEYS, ResolvedConfig, resolve_config
from phigrow.errors import GrowthError
from phigrow.models.config import Config
from phigrow.models.families import all_families
from phigrow.models.versions import reads_rope_parameters

VALIDATED = pytest.mark.skipif(not reads_rope_parameters(), reason="transformers 4 does not check types of values")
SIZES = {"kv": 2, "group": 2, "q": 8, "rotary": 4, "mlp": 20, "layer": 2, "vocab": 40, "hidden": 32}


def config_of(name: str, **more: object) -> Config:
    """The least configuration of a family, with heads that turn as a whole where its family demands that."""
    family = all_families()[name]
    rotary = SIZES["q"] if name in ("llama", "qwen2") else SIZES["rotary"]
    return {**family.config_of({**SIZES, "rotary": rotary}), "max_position_embeddings": 64, **more}


def resolved(config: Config) -> ResolvedConfig:
    made = resolve_config(config, "the destination configuration")
    made.check_tensors(made.family.state_shapes(config))
    return made


@pytest.mark.parametrize("name", ["phi", "gpt_neox", "llama", "qwen2"])
def test_every_spelling_of_the_rotary_embedding_is_written(name):
    theta, part = ("rotary_emb_base", "rotary_pct") if name == "gpt_neox" else ("rope_theta", "partial_rotary_factor")
    config = config_of(name) | {theta: 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    stored = resolved(config).stored("bfloat16", {"eos_token_id": 3})
    assert (stored["rope_theta"], stored["dtype"], stored["torch_dtype"]) == (500.0, "bfloat16", "bfloat16")
    assert stored["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    parameters = {"rope_theta": 500.0, "rope_type": "linear", "factor": 4.0}
    if name in ("phi", "gpt_neox"):
        parameters |= {"partial_rotary_factor": 0.5}
        assert (stored["partial_rotary_factor"], config[part]) == (0.5, 0.5)
    assert stored["rope_parameters"] == parameters
    assert (stored.get("rotary_emb_base"), stored.get("rotary_pct")) == (
        (500.0, 0.5) if name == "gpt_neox" else (None,) * 2
    )
    assert list(stored) == sorted(stored)
    # What was written is read as the same function, and written again as the same bytes.
    again = resolved(stored)
    assert again.stored("bfloat16", {"eos_token_id": 3}) == stored
    assert again.hf_config.rope_parameters == parameters


def test_the_spelling_of_version_5_alone_is_written_in_both():
    config = config_of(
        "phi", rope_parameters={"rope_type": "default", "rope_theta": 70.0, "partial_rotary_factor": 0.25}
    )
    del config["partial_rotary_factor"]
    stored = resolved(config).stored("float32", {})
    assert {key: stored.get(key) for key in ROTARY_KEYS} == {
        "rope_theta": 70.0,
        "partial_rotary_factor": 0.25,
        "rotary_emb_base": None,
        "rotary_pct": None,
        "rope_scaling": None,
        "rope_parameters": config["rope_parameters"],
    }


def test_yarn_and_longrope_are_spelled_as_version_4_reads_them():
    yarn = {"rope_type": "yarn", "factor": 4.0}
    stored = resolved(config_of("llama", rope_scaling=dict(yarn))).stored("float32", {})
    # Version 4.51 would take 64 / 64 for the factor if the original context stood here.
    assert stored["rope_scaling"] == yarn
    assert stored["rope_parameters"]["original_max_position_embeddings"] == 64
    shorter = resolved(config_of("llama", rope_scaling={**yarn, "original_max_position_embeddings": 16}))
    assert shorter.stored("float32", {})["rope_scaling"]["original_max_position_embeddings"] == 16
    longrope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 8.0}
    longrope["original_max_position_embeddings"] = 16
    stored = resolved(config_of("llama", rope_scaling=longrope)).stored("float32", {})
    assert stored["original_max_position_embeddings"] == 16
    assert stored["rope_scaling"]["attention_factor"] == pytest.approx((1 + 3 / 4) ** 0.5)  # ln 8 / ln 16 = 3 / 4


def test_a_null_with_which_transformers_computes_is_written_as_the_value_that_it_stands_for():
    yarn = {"rope_type": "yarn", "factor": 4.0, "truncate": None, "beta_slow": None}
    stored = resolved(config_of("llama", rope_scaling=yarn)).stored("float32", {})
    assert (stored["rope_scaling"]["truncate"], stored["rope_parameters"]["truncate"]) == (False, False)
    assert "beta_slow" not in stored["rope_parameters"]
    del yarn["truncate"]
    assert "truncate" not in resolved(config_of("llama", rope_scaling=yarn)).stored("float32", {})["rope_scaling"]


def test_what_belongs_to_other_files_is_left_out():
    extra = {
        "auto_map": {"AutoModel": "code.Model"},
        "quantization_config": {"quant_method": "bitsandbytes"},
        "compression_config": {"format": "int-quantized"},
        "dtype": "float17",
        "torch_dtype": "float16",
    }
    stored = resolved(config_of("phi") | extra).stored("float32", {})
    assert not {"auto_map", "quantization_config", "compression_config"} & set(stored)
    assert (stored["dtype"], stored["torch_dtype"]) == ("float32", "float32")


def test_every_value_that_was_read_is_written():
    stored = resolved(config_of("phi")).stored("float32", {})
    assert (stored["hidden_act"], stored["layer_norm_eps"], stored["qk_layernorm"]) == ("gelu_new", 1e-5, False)
    config = config_of("qwen2")
    del config["max_position_embeddings"]
    assert resolved(config).stored("float32", {})["max_position_embeddings"] == 32768


@pytest.mark.parametrize("name", ["phi", "qwen2", "llama"])
def test_stale_layer_types_and_null_heads_do_not_reach_the_file(name, tmp_path):
    config = config_of(name, layer_types=["full_attention"] * 5, head_dim=None)
    stored = resolved(config).stored("float32", {})
    assert "layer_types" not in stored
    assert stored.get("head_dim") == (8 if name == "llama" else None)
    assert "head_dim" not in stored or stored["head_dim"] is not None
    AutoConfig.for_model(**{key: value for key, value in stored.items() if key not in ("dtype", "torch_dtype")})


def test_a_missing_number_of_key_value_heads_means_what_transformers_means():
    family = all_families()["qwen2"]
    config = config_of("qwen2", num_attention_heads=64, hidden_size=64, head_dim=2)
    del config["num_key_value_heads"]
    assert family.sizes_of(config)["kv"] == 32
    assert resolved(config).stored("float32", {})["num_key_value_heads"] == 32
    assert family.sizes_of({**config, "num_key_value_heads": None})["kv"] == 64
    with pytest.raises(GrowthError, match="num_key_value_heads is missing") as caught:
        family.sizes_of({**config, "num_attention_heads": 4})
    assert "transformers then takes 32" in str(caught.value)
    llama = config_of("llama")
    del llama["num_key_value_heads"]
    assert all_families()["llama"].sizes_of(llama)["kv"] == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        pytest.param({"layer_norm_eps": 1}, "layer_norm_eps", marks=VALIDATED),
        ({"rope_scaling": {"type": "yarn"}}, "factor"),
        ({"hidden_act": "nope"}, "nope"),
        pytest.param({"bos_token_id": [1, 2]}, "bos_token_id", marks=VALIDATED),
    ],
)
def test_what_transformers_refuses_is_refused(more, message):
    with pytest.raises(GrowthError, match=message):
        resolved(config_of("phi") | more)


def test_a_value_that_is_read_in_two_ways_is_refused(monkeypatch):
    # A default of phigrow's that is not transformers' is met.
    family = all_families()["phi"]
    monkeypatch.setitem(family.function_keys, "layer_norm_eps", 1e-6)
    with pytest.raises(GrowthError, match="transformers reads the configuration as another model") as caught:
        resolve_config(config_of("phi"), "the destination configuration")
    assert "layer_norm_eps: 1e-06 -> 1e-05" in str(caught.value)


def test_tensors_are_compared_with_the_model_that_transformers_builds():
    config = phi_config()
    made = resolve_config(config, "the destination configuration")
    shapes = made.family.state_shapes(config)
    made.check_tensors(shapes)
    with pytest.raises(GrowthError, match=r"lm_head.bias is a tensor for transformers, but not for phigrow"):
        made.check_tensors({name: shape for name, shape in shapes.items() if name != "lm_head.bias"})
    with pytest.raises(GrowthError, match=r"lm_head.bias is \[61\] for transformers, \[62\] for phigrow"):
        made.check_tensors({**shapes, "lm_head.bias": (62,)})
    whole = {**made.spelled, "rope_parameters": {**made.spelled["rope_parameters"], "partial_rotary_factor": 1.0}}
    with pytest.raises(GrowthError, match="is 4 coordinates for transformers, 8 for phigrow"):
        dataclasses.replace(made, spelled=whole).check_tensors(shapes)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_rotary_part_that_only_version_4_would_read_is_not_written(name):
    stored = resolved(config_of(name, partial_rotary_factor=0.5)).stored("float32", {})
    assert "partial_rotary_factor" not in {**stored, **stored["rope_parameters"]}
