import json

import pytest
from tiny_models import phi_config

import phigrow
from phigrow.errors import GrowthError
from phigrow.growth.axes import AxisMap
from phigrow.growth.plan import Plan
from phigrow.inspection.explain import axis_rows, claim, cost_rows, layer_rows
from phigrow.models.config import load_config, normalised
from phigrow.models.cost import count_cost

SRC, DST = phi_config(32, 4, 48, 2, 4), phi_config(72, 6, 70, 5, 4, vocab=70)


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "wr", "anchor": "center"},
        {"method": "tile", "scale": "preserve", "noise": 0.3, "rounding": "floor", "seed": 4},
        {"method": "tile", "scale": "rms", "depth": "stack"},
        {"method": "lossless"},
    ],
)
def test_json_round_trip(arguments):
    plan = phigrow.plan(SRC, DST, **arguments)
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again.to_json() == plan.to_json()
    assert again.hash == plan.hash
    assert [r.name for r in again.recipes()] == [r.name for r in plan.recipes()]


def test_the_hash_follows_every_choice():
    choices = [
        {}, {"seed": 1}, {"noise": 0.1}, {"depth": "stack"}, {"rounding": "half-up"}, {"scale": "rms"},
        {"anchor": "center"}, {"method": "wr"},
    ]  # fmt: skip
    hashes = [phigrow.plan(SRC, DST, **{"method": "tile"} | choice).hash for choice in choices]
    assert len(set(hashes)) == len(hashes)
    assert phigrow.plan(SRC, DST).hash == hashes[-1]  # what is not chosen is wr


def test_a_damaged_plan_is_refused():
    data = phigrow.plan(SRC, DST).to_json()
    with pytest.raises(GrowthError, match="the plan has format 99, not 1"):
        Plan.from_json(data | {"format": 99})
    with pytest.raises(GrowthError, match="the plan has no 'seed'"):
        Plan.from_json({key: value for key, value in data.items() if key != "seed"})
    with pytest.raises(GrowthError, match=r"do not fit its configurations\n  where: axis mlp"):
        Plan.from_json(data | {"axes": data["axes"] | {"mlp": data["axes"]["hidden"]}})
    with pytest.raises(GrowthError, match="layer map of the plan does not fit"):
        Plan.from_json(data | {"depth": data["depth"] | {"layers": [0, 1, 2, 3, 9]}})
    layers = len(data["depth"]["layers"])
    for key, value in (("layers", [0.0] * layers), ("layers", ["0"] * layers), ("identity_layers", [layers])):
        with pytest.raises(GrowthError, match=r"layer map of the plan does not fit[\s\S]*make it again"):
            Plan.from_json(data | {"depth": data["depth"] | {key: value}})
    Plan.from_json(data | {"depth": data["depth"] | {"identity_layers": [layers - 1]}})  # the negative control


@pytest.mark.parametrize(
    ("runs", "dst_size", "why"),
    [
        ([[10**15, "fresh", 1.0, 1.0]], 70, "do not add up to 70 coordinates"),
        ([[10**15, "fresh", 1.0, 1.0]], 10**15, "accepts at most 16777216"),
        ([[71, 0, 1.0, 1.0], [-1, 0, 1.0, 1.0]], 70, "do not add up to 70 coordinates"),
        ([[70.0, 0, 1.0, 1.0]], 70, "do not add up to 70 coordinates"),
    ],
)
def test_runs_of_another_length_are_refused_before_memory_is_allocated(runs, dst_size, why):
    sound = {"src_size": 70, "dst_size": 70, "fresh_bias": 0.0, "runs": [[70, 0, 1.0, 1.0]]}
    assert AxisMap.from_json(sound).is_identity
    with pytest.raises(GrowthError, match=why):
        AxisMap.from_json(sound | {"runs": runs, "dst_size": dst_size})


def test_the_first_plans_of_the_project_need_no_weights():
    plan = phigrow.plan("phi-1_5", "phi2.json", "lossless")
    assert plan.exact
    assert (plan.src_sizes["q"], plan.dst_sizes["q"], plan.src_sizes["rotary"]) == (64, 80, 32)
    old, new = plan.cost()
    # Published: 1.418B and 2.780B parameters, 1.208B and 2.517B without embeddings.
    assert (old.parameters, new.parameters) == (1_418_270_720, 2_779_683_840)
    assert (old.non_embedding_parameters, new.non_embedding_parameters) == (1_208_504_320, 2_517_488_640)
    # phi-2's two shards hold 5,559,367,680 bytes of float16.
    assert 2 * new.parameters == 5_559_367_680
    assert not phigrow.plan("phi-1-small.json", "phi-1.json", "tile").exact


def test_explanations():
    plan = phigrow.plan(phi_config(32, 4, 48, 2, 4), phi_config(72, 6, 70, 4, 4), "lossless")
    rows = {row[0]: row[1:] for row in axis_rows(plan)}
    assert rows["hidden"] == ("32 → 72", "32 kept, 40 written as the mean", "1.5", "0.6667")
    assert rows["head: k"] == ("8 → 12", "8 kept, 4 new (written zero and read zero)", "1", "1")
    assert rows["vocab"][1] == "unchanged"
    tile = {row[0]: row[1:] for row in axis_rows(phigrow.plan(SRC, DST, "tile", scale="preserve"))}
    assert tile["mlp"] == ("48 → 70", "48 kept, 22 further copies", "1", "0.5 to 1")
    assert [row[2] for row in layer_rows(plan)] == ["kept", "identity layer", "kept", "identity layer"]
    assert [row[2] for row in layer_rows(phigrow.plan(SRC, DST, "tile"))].count("repeated") == 3
    assert claim(plan).startswith("exact")
    assert claim(phigrow.plan(SRC, DST, "wr")) == (
        "approximate: wr reads new random coordinates of vocab, hidden, normed, kv, q, k, v, mlp, final; interpose "
        "repeats 3 of 2 layers, which then act twice"
    )
    assert cost_rows(phigrow.plan("phi-1_5", "phi2.json"))[0] == ("parameters", "1.418B", "2.780B", "1.96x")


REFUSALS = [
    (
        phi_config(32, 4), phi_config(16, 2), {},
        r"the destination is smaller: hidden 32 -> 16\n  where: axis hidden, met first in model.embed_tokens.weight\n"
        r"  why: growth never drops coordinates\n  what to do: choose a destination configuration with at least 32",
    ),
    (
        phi_config(32, 4), phi_config(32, 2), {},
        r"smaller: kv 4 -> 2\n  where: axis heads: kv, met first in model.layers.*q_proj",
    ),
    (phi_config(layers=4), phi_config(layers=2), {}, r"fewer layers: 4 -> 2\n  where: num_hidden_layers"),
    (
        phi_config(32, 4, rotary=4), phi_config(64, 4, rotary=6), {"method": "lossless"},
        r"lossless cannot grow the rotary part of a head, 4 -> 6 coordinates\n  where: axis head: rotary, met first "
        r"in model.layers.\{layer\}.self_attn.q_proj.weight\n  why: it turns at all frequencies of the smaller one "
        r"only if it grows by a whole factor\n  what to do: set partial_rotary_factor to 4 / head_dim = 0.25 ",
    ),
    (phi_config(32, 4, rotary=3), phi_config(64, 4, rotary=3), {}, r"the rotary part of a head is odd, 3 -> 3"),
    (
        phi_config(), phi_config(hidden=30), {},
        r"hidden_size is 30, which is not a multiple of num_attention_heads 4",
    ),
    (
        phi_config(), phi_config(48, 6, layer_norm_eps=1e-6), {"method": "lossless"},
        r"compute different functions\n.*\n  why: layer_norm_eps: 1e-05 -> 1e-06",
    ),
    (
        phi_config(), phi_config(48, 6, tie_word_embeddings=True), {},
        r"differ in tie_word_embeddings\n  where: lm_head.weight",
    ),
    (
        phi_config(), phi_config(48, 6), {"method": "wr", "noise": 0.1},
        r"method wr takes no noise \(got 0.1\)\n  where: noise\n  why: it does not set takes_noise; of phigrow",
    ),
    (
        phi_config(),
        phi_config(48, 6),
        {"method": "tile", "noise": -1.0},
        r"noise -1.0 is not allowed\n  where: noise\n  what to do: give a number, 0 or more",
    ),
    (phi_config(), phi_config(48, 6), {"method": "copy"}, r"method 'copy' is unknown"),
    (phi_config(), phi_config(48, 6), {"depth": "deep"}, r"depth method 'deep' is unknown\n.*\n.*interpose, .*solar"),
    (phi_config(), phi_config(48, 6), {"rounding": "up"}, r"rounding 'up' is unknown"),
    (phi_config(), phi_config(48, 6), {"method": "lossless", "scale": "rms"}, r"method lossless has no option 'scale'"),
    ({"model_type": "gpt9"}, phi_config(), {},
     r"phigrow does not support model_type 'gpt9'\n  where: the source configuration"),
    (
        phi_config(), "phi3.json", {},
        r"no configuration 'phi3.json'\n(.*\n)*  what to do: give a path, or one of phi-1-small",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("src", "dst", "arguments", "message"), REFUSALS, ids=[m[:30] for *_, m in REFUSALS])
def test_what_a_plan_cannot_do_is_refused_with_its_reason(src, dst, arguments, message):
    with pytest.raises(GrowthError, match=message):
        phigrow.plan(src, dst, **arguments)


def test_different_functions_make_the_other_methods_approximate():
    plan = phigrow.plan(phi_config(), phi_config(hidden_act="relu"), "tile")
    assert plan.approximations == ("the configurations compute different functions: hidden_act: gelu_new -> relu",)


def test_both_spellings_of_a_configuration_are_one_function():
    old = phi_config()
    new = {key: value for key, value in old.items() if key not in ("partial_rotary_factor", "rope_theta")}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    assert phigrow.plan(old, new, "lossless").exact
    new["rope_parameters"]["rope_theta"] = 5000.0
    with pytest.raises(GrowthError, match=r"rope_theta: 10000.0 -> 5000.0"):
        phigrow.plan(old, new, "lossless")


def test_shipped_configurations_are_the_published_values():
    facts = {
        "phi-1-small.json": (20, 1024, 16, 4096, 0.5, 0.0, None),
        "phi-1.json": (24, 2048, 32, 8192, 0.5, 0.0, None),
        "phi-1_5.json": (24, 2048, 32, 8192, 0.5, 0.0, None),
        "phi2.json": (32, 2560, 32, 10240, 0.4, 0.1, 50256),
    }
    keys = (
        "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "partial_rotary_factor",
        "resid_pdrop", "eos_token_id",
    )  # fmt: skip
    for name, values in facts.items():
        config = load_config(name)
        assert tuple(config[key] for key in keys) == values
        assert int(config["hidden_size"] // config["num_attention_heads"] * config["partial_rotary_factor"]) == 32
        for key, value in {
            "vocab_size": 51200, "max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "initializer_range": 0.02,
            "attention_dropout": 0.0, "embd_pdrop": 0.0, "qk_layernorm": False, "tie_word_embeddings": False,
            "hidden_act": "gelu_new", "torch_dtype": "float16",
        }.items():  # fmt: skip
            assert config[key] == value, (name, key)
        assert normalised(config)["rope_theta"] == 10000.0
        assert load_config(name.removesuffix(".json")) == config


def test_unreadable_configurations(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(GrowthError, match=r"the configuration cannot be read\n.*\n  why: not JSON: expecting"):
        load_config(tmp_path / "broken.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(GrowthError, match="it holds a JSON list, not an object"):
        load_config(tmp_path / "list.json")


@pytest.mark.parametrize("kv", [4, 2])
def test_flops_are_those_that_torch_counts(kv):
    import torch
    from tiny_models import phi_model
    from torch.utils.flop_counter import FlopCounterMode

    config = phi_config(64, 4, 200, 3, 4, vocab=301, num_key_value_heads=kv, attn_implementation="eager")
    model = phi_model(config, torch.float32)
    length = 48
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long), use_cache=False)
    cost = count_cost(config, length)
    assert cost.forward_flops * length == pytest.approx(counter.get_total_flops(), rel=0.01)
    tokens = torch.zeros(2, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    assert cost.training_flops * 2 * length == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.training_flops == 3 * cost.forward_flops
