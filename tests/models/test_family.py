import random

import pytest
import torch
from einops import parse_shape
from tiny_models import phi_config, random_pair

from phigrow.errors import GrowthError
from phigrow.models.config import load_config
from phigrow.models.families import all_families, family_of
from phigrow.models.family import parse_table, stacked_names
from phigrow.testing import check_family


def skeleton(config):
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in config.items() if key not in ("torch_dtype", "architectures")}
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))


CONFIGS = {
    **{name: load_config(name) for name in ("phi-1-small.json", "phi-1.json", "phi-1_5.json", "phi2.json")},
    "qk_layernorm": phi_config(qk_layernorm=True),
    "grouped": phi_config(num_key_value_heads=2),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_is_the_state_dict_of_the_real_model(name):
    config = CONFIGS[name]
    model = skeleton(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert family_of(config, name).state_shapes(config) == shapes


@pytest.mark.parametrize("name", all_families())
def test_every_family_keeps_its_contract(name):
    """Its table is the state dict of real models of random sizes; test_contract.py runs every method in it."""
    check_family(all_families()[name], methods=())


def test_a_fused_axis_lies_one_after_the_other():
    (fused, bias) = parse_table("qkv.weight|bias  (kv q|k|v) <- normed")
    assert (fused.axes, bias.axes) == ((("kv", "q|k|v"), ("normed",)), (("kv", "q|k|v"),))
    assert fused.shape({"kv": 3, "q": 4, "k": 4, "v": 5, "normed": 7}) == (39, 7)


def test_sliding_windows_are_refused():
    config = random_pair(all_families()["qwen2"], random.Random(0))[0]
    config |= {"use_sliding_window": True, "max_window_layers": config["num_hidden_layers"] - 1}
    config.pop("layer_types", None)
    with pytest.raises(GrowthError, match="use_sliding_window is true, which phigrow does not support"):
        all_families()["qwen2"].sizes_of(config)


def test_a_wrong_table_is_noticed():
    # Negative control of the comparison above: another configuration of the same family differs.
    config, other = phi_config(mlp=48), phi_config(mlp=49)
    shapes = {key: tuple(tensor.shape) for key, tensor in skeleton(other).state_dict().items()}
    family = family_of(config, "test")
    assert family.state_shapes(config) != shapes
    with pytest.raises(
        GrowthError, match=r"the tensor has shape \[49, 32\], but the configuration gives it \[48, 32\]"
    ):
        family.check_tensors(config, shapes, "test")


def test_tied_embeddings_have_no_head_of_their_own():
    config = phi_config(tie_word_embeddings=True)
    shapes = family_of(config, "test").state_shapes(config)
    assert "lm_head.weight" not in shapes
    assert "lm_head.bias" in shapes


@pytest.mark.parametrize("name", all_families())
def test_axes_are_named_in_the_notation_of_einops(name):
    for parameter in all_families()[name].parameters:
        names = " ".join(name for axes in parameter.axes for part in axes for name in stacked_names(part))
        assert list(parse_shape(torch.zeros([1] * len(names.split())), names)) == names.split()


def test_table_notation():
    weight, bias, scale, shift = parse_table("""
        a.{layer}.weight|bias   out <- (heads dim)
        n.weight|bias           norm x -> y
    """)
    assert (weight.name, weight.axes, weight.written, weight.read) == (
        "a.{layer}.weight", (("out",), ("heads", "dim")), ("out",), ("heads", "dim"),
    )  # fmt: skip
    assert (bias.axes, bias.kind, bias.read) == ((("out",),), "bias", None)
    assert (scale.kind, scale.axes, scale.read, scale.written) == ("scale", (("y",),), ("x",), ("y",))
    assert shift.kind == "shift"
    (embedding,) = parse_table("embed.weight  vocab -> hidden")
    assert (embedding.axes, embedding.written) == ((("vocab",), ("hidden",)), ("hidden",))


@pytest.mark.parametrize("line", ["lonely", "x.weight a b", "x.weight a <- b <- c"])
def test_an_unreadable_line_is_named(line):
    with pytest.raises(GrowthError, match="family table"):
        parse_table(line)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 5}, "hidden_size is 32, which is not a multiple of num_attention_heads 5"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4, which is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": -32}, "hidden_size is -32, but must be a positive whole number"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2', but must be a positive whole number"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    config = phi_config() | change
    with pytest.raises(GrowthError, match=message):
        family_of(config, "test").sizes_of(config)


def test_an_unknown_family():
    with pytest.raises(GrowthError, match="phigrow does not support model_type 'gpt9'"):
        family_of({"model_type": "gpt9"}, "somewhere")


def test_both_spellings_of_a_configuration_give_the_same_sizes():
    old = phi_config()
    new = {
        key: value for key, value in old.items() if key not in ("partial_rotary_factor", "rope_theta", "torch_dtype")
    }
    new |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
    new |= {"dtype": "float32"}
    sizes_of = family_of(old, "test").sizes_of
    assert sizes_of(old) == sizes_of(new)
    assert sizes_of(old)["rotary"] == 4


def test_a_folder_is_never_taken_for_a_shipped_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("phi2")["hidden_size"] == 2560
    (tmp_path / "phi2").mkdir()
    with pytest.raises(
        GrowthError, match=r"(?s)the folder has no config\.json.*phi2\.json for the configuration that phigrow"
    ):
        load_config("phi2")
    assert load_config("phi2.json")["hidden_size"] == 2560
