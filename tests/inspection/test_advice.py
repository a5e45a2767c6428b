"""Every advice where it belongs and only there, with its numbers and its source."""

import json

import pytest
from tiny_models import phi_config
from typer.testing import CliRunner

import phigrow
from phigrow.cli import app
from phigrow.inspection.advice import advice, growth_timing

SRC = phi_config(32, 4, 48, 2, 4)
WIDER = phi_config(40, 5, 60, 2, 4)
CONVERTED = phi_config(32, 4, 128, 2, 4), phi_config(40, 5, 160, 2, 4)
"""Phis whose mlp is four times hidden, as llama.cpp's converter assumes."""


def said(plan, **known):
    return {each.topic: str(each) for each in advice(plan, **known)}


@pytest.mark.parametrize(
    ("parameters", "tokens", "timing"),
    [(8e9, 15e12, 6.58e9), (7e9, 2e12, 11.11e9), (13e9, 2e12, 15.84e9), (70e9, 2e12, 42.48e9)],
)
def test_the_timing_of_stacking_is_the_published_table(parameters, tokens, timing):
    assert growth_timing(parameters, tokens) == pytest.approx(timing, rel=0.003)


def test_what_needs_no_advice_gets_none():
    src, wider = CONVERTED
    plan = phigrow.plan(src, wider, "lossless")
    assert set(said(plan, tokens=20 * plan.cost()[1].parameters)) == {"rate"}  # which is no warning
    assert advice(phigrow.plan(src, src, "wr")) == []
    assert advice(phigrow.plan(src, src, "tile"), tokens=1e5) == []


@pytest.mark.parametrize(
    ("changes", "assumed"),
    [
        ({"intermediate_size": 170}, "intermediate_size 160 (here 170)"),
        ({"rope_theta": 20000.0}, "rope_theta 10000 (here 20000)"),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
         "rope_theta 10000 (here 500000)"),
        ({"num_key_value_heads": 1, "intermediate_size": 200, "rope_theta": 9999.0},
         "intermediate_size 160 (here 200), rope_theta 10000 (here 9999), num_key_value_heads 5 (here 1)"),
    ],
    ids=["mlp", "theta", "rope_parameters", "all"],
)  # fmt: skip
def test_sizes_that_the_converter_of_llama_cpp_does_not_read(changes, assumed):
    src, wider = ({**each, **changes} for each in CONVERTED)
    src, wider = ({key: value for key, value in each.items() if value is not None} for each in (src, wider))
    src["intermediate_size"] = 128
    src["num_key_value_heads"] = min(src["num_key_value_heads"], 4)
    found = said(phigrow.plan(src, wider, "wr"))["llama.cpp"]
    assert found == (
        f"if the model is to run in llama.cpp, choose other values: its converter assumes {assumed} "
        "(llama.cpp, convert_hf_to_gguf.py: PhiForCausalLM)"
    )


def test_the_converter_of_llama_cpp_reads_the_sizes_of_other_families():
    assert "llama.cpp" not in said(phigrow.plan(*CONVERTED, "wr"))
    assert "llama.cpp" not in said(phigrow.plan("phi-1_5.json", "phi2.json", "wr"))
    llama = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 40, "hidden_size": 32,
        "intermediate_size": 50, "num_hidden_layers": 1, "num_attention_heads": 4, "rope_theta": 5e5,
    }  # fmt: skip
    assert "llama.cpp" not in said(phigrow.plan(llama, llama, "wr"))


def test_growth_beyond_twice():
    twice = said(phigrow.plan(SRC, phi_config(64, 8, 48, 2, 4), "lossless"))
    assert twice["growth"].startswith(
        "grow in stages: parameters grow 2.86x, and gains"
    )  # and hidden by no more than 2x
    found = said(phigrow.plan(SRC, phi_config(72, 9, 48, 2, 4), "lossless"))
    assert found["growth"].startswith(
        "grow in stages: parameters grow 3.46x and hidden grows 2.25x, and gains are most reliable up to 2x"
    )
    assert found["growth"].endswith("(2605.13405)")
    deep = said(phigrow.plan(SRC, phi_config(32, 4, 48, 9, 4), "lossless"))
    assert deep["growth"].startswith("grow in stages: parameters grow 3.75x, ")


def test_more_than_twenty_tokens_a_parameter():
    plan = phigrow.plan("phi-1_5.json", "phi2.json", "lossless")
    parameters = plan.cost()[1].parameters
    assert "tokens" not in said(plan)
    assert "tokens" not in said(plan, tokens=20 * parameters)
    assert (
        "the budget is 504 tokens per parameter; gains are most reliable below about 20"
        in (said(plan, tokens=1.4e12)["tokens"])
    )


def test_dropout_where_exactness_is_claimed():
    wider = WIDER | {"resid_pdrop": 0.1}
    assert said(phigrow.plan(SRC, wider, "lossless"))["dropout"].startswith("set resid_pdrop (now 0.1) to 0")
    assert "dropout" not in said(phigrow.plan(SRC, wider, "wr"))
    assert "dropout" not in said(phigrow.plan(SRC, WIDER, "lossless"))


DOUBLE = phi_config(64, 8, 96, 2, 4)


@pytest.mark.parametrize(
    ("how", "axes", "instead"),
    [
        ({"method": "tile"}, "hidden, heads, mlp", "add --noise"),
        ({"method": "hypercloning", "snr": "none"}, "hidden, heads, mlp", "set snr=10"),
        ({"method": "fpi"}, "hidden, heads, mlp", "such as lemon, lossless or isometric"),
        ({"method": "tile,mlp=tile:scale=preserve"}, "hidden, heads, mlp", "add --noise"),
        ({"method": "tile,hidden=lossless"}, "heads, mlp", "such as lemon, lossless or isometric"),  # it takes no noise
        ({"method": "lossless,mlp=net2net"}, "mlp", "such as lemon, lossless or isometric"),
    ],
)
def test_copies_that_nothing_tells_apart(how, axes, instead):
    found = said(phigrow.plan(SRC, DOUBLE, **how))["copies"]
    assert f": now, copies of {axes} get equal gradients for ever and act as one unit (" in found
    assert instead in found


@pytest.mark.parametrize(
    "how",
    [
        {"method": "tile", "scale": "preserve", "noise": 0.1}, {"method": "hypercloning"}, {"method": "lemon"},
        {"method": "lossless"}, {"method": "isometric"}, {"method": "wr"}, {"method": "shrink_perturb"},
        {"method": "aki"},
    ],
)  # fmt: skip
def test_copies_that_noise_or_shares_tell_apart(how):
    assert "copies" not in said(phigrow.plan(SRC, DOUBLE, **how))


def test_float16_under_gains():
    plan = phigrow.plan(SRC, phi_config(50, 5, 60, 2, 4), "lossless")
    assert said(plan, dtype="float16")["dtype"].startswith(
        "store and train in bfloat16: activations grow (hidden 1.25x, q 1.1"
    )
    assert "dtype" not in said(plan, dtype="bfloat16")
    assert "dtype" not in said(plan)  # the configuration says float32
    half = phigrow.plan(SRC, phi_config(40, 5, 60, 2, 4, torch_dtype="float16"), "wr")
    assert "dtype" not in said(half)


def test_the_timing_is_said_where_layers_grow_and_a_budget_is_given():
    plan = phigrow.plan("phi-1_5.json", "phi2.json", "lossless")
    found = said(plan, tokens=1e11)
    assert "timing" not in said(plan)
    timing = growth_timing(plan.cost()[1].parameters, 1e11)
    assert (
        f"with a source trained on {timing:.3g} tokens; here layers grow 1.33x (G_stack, 2405.15319)" in found["timing"]
    )
    assert "timing" not in said(phigrow.plan(SRC, WIDER, "lossless"), tokens=1e5)


def test_the_command_line_says_it():
    words = ["plan", "--src", "phi-1_5.json", "--dst-config", "phi2.json", "--tokens", "1.4T", "--method", "tile"]
    done = CliRunner(env={"COLUMNS": "400"}).invoke(app, words)
    lines = [line for line in done.stdout.splitlines() if line.startswith("advice: ")]
    assert [line.split()[1] for line in lines] == ["compare", "add", "for", "consider"]
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)["advice"]
    assert [each["topic"] for each in found] == ["tokens", "copies", "timing", "method"]
    assert f"advice: {found[1]['text']} ({found[1]['source']})" == lines[1]


def test_what_our_study_says_of_tile_and_of_small_budgets():
    plan = phigrow.plan(SRC, WIDER, "tile")
    assert said(plan)["method"].startswith(
        "consider wr: at 1.8x the parameters, it reached tile's final loss with 1.09x [1.04, 1.14] fewer tokens"
    )
    assert "method" not in said(phigrow.plan(SRC, WIDER, "wr"))
    assert "method" not in said(phigrow.plan(SRC, WIDER, "tile", scale="preserve", noise=0.5))
    assert said(phigrow.plan(SRC, WIDER, "wr"))["rate"].startswith("train fresh values at twice the learning rate")
    assert "rate" in said(phigrow.plan(SRC, WIDER, "lossless"))
    assert "rate" not in said(plan)  # tile copies everything
    parameters = plan.cost()[1].parameters
    assert "the budget is 0.5 tokens per parameter; at 0.4, " in said(plan, tokens=0.5 * parameters)["continued"]
    assert "continued" not in said(plan, tokens=0.6 * parameters)
    larger = phi_config(72, 9, 108, 3, 4)
    assert "continued" not in said(phigrow.plan(SRC, larger, "tile"), tokens=100)  # more than the study grew
    assert "continued" not in said(phigrow.plan(SRC, SRC, "tile"), tokens=100)
