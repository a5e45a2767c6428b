import pytest
import torch
from einops import parse_shape
from models import phi_config

from phigrow.config import load_config
from phigrow.errors import GrowthError
from phigrow.families import all_families, family_of
from phigrow.family import parse_table


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


def test_a_wrong_table_is_noticed():
    # Negative control of the comparison above: another configuration of the same family differs.
    config, other = phi_config(mlp=48), phi_config(mlp=49)
    shapes = {key: tuple(tensor.shape) for key, tensor in skeleton(other).state_dict().items()}
    family = family_of(config, "test")
    assert family.state_shapes(config) != shapes
    with pytest.raises(GrowthError, match=r"shape \[49, 32\] where the configuration says \[48, 32\]"):
        family.check_tensors(config, shapes, "test")


def test_tied_embeddings_have_no_head_of_their_own():
    config = phi_config(tie_word_embeddings=True)
    shapes = family_of(config, "test").state_shapes(config)
    assert "lm_head.weight" not in shapes
    assert "lm_head.bias" in shapes


@pytest.mark.parametrize("name", all_families())
def test_axes_are_named_in_the_notation_of_einops(name):
    for parameter in all_families()[name].parameters:
        names = " ".join(axis for axes in parameter.axes for axis in axes)
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
        ({"num_attention_heads": 5}, "heads do not divide: hidden_size 32 is no multiple of num_attention_heads 5"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"hidden_size": -32}, "hidden_size is -32, not a positive whole number"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2', not a positive whole number"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    config = phi_config() | change
    with pytest.raises(GrowthError, match=message):
        family_of(config, "test").sizes_of(config)


def test_not_a_phi():
    with pytest.raises(GrowthError, match="not a Phi: model_type is 'llama'"):
        family_of({"model_type": "llama"}, "somewhere")


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
