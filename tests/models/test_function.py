"""The function of a configuration against transformers: frequencies one by one, then the logits of whole models."""

from __future__ import annotations

import importlib
import json
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import hf_config_of, model_of
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN

import phigrow
from phigrow.checkpoints.configuration import resolve_config
from phigrow.errors import GrowthError
from phigrow.models.families import all_families
from phigrow.models.forward import ACTIVATIONS
from phigrow.models.function import function_differences, function_of
from phigrow.models.rotary import SETTINGS, compare, lengths_to_compare
from phigrow.models.versions import reads_rope_parameters

READS_ROPE_PARAMETERS = reads_rope_parameters()
CONTEXT = 48
IDS = torch.arange(40)[None] % 31
HEAD, ROTARY = 16, 8

ROTARY_CLASSES = {
    "phi": "PhiRotaryEmbedding",
    "gpt_neox": "GPTNeoXRotaryEmbedding",
    "llama": "LlamaRotaryEmbedding",
    "qwen2": "Qwen2RotaryEmbedding",
}


def config(name: str, **more: Any) -> dict[str, Any]:
    rotary = ROTARY if name in ("phi", "gpt_neox") else HEAD
    sizes = {"kv": 2, "group": 1, "q": HEAD, "rotary": rotary, "mlp": 24, "layer": 2, "vocab": 31, "hidden": 2 * HEAD}
    ids = {"bos_token_id": None, "eos_token_id": None, "initializer_range": 0.02}
    # transformers writes into the dictionaries that it is given.
    return {**all_families()[name].config_of(sizes), "max_position_embeddings": CONTEXT, **ids, **deepcopy(more)}


def scaled(name: str, kind: str, **more: Any) -> dict[str, Any]:
    """Rotary settings of a kind, with lists of the length that the family needs."""
    pairs = (ROTARY if name in ("phi", "gpt_neox") else HEAD) // 2
    lists = {"short_factor": [1 + 0.1 * k for k in range(pairs)], "long_factor": [2 + 0.3 * k for k in range(pairs)]}
    slopes = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    needed = {"longrope": lists, "llama3": {"factor": 8.0, **slopes}, "proportional": {}}.get(kind, {"factor": 4.0})
    return {"rope_type": kind, **needed, **more}


def embeddings(name: str) -> dict[str, dict[str, Any]]:
    """Configurations with every rotary type, with and without each optional key, in each spelling."""
    original = {"original_max_position_embeddings": 20}
    theta, part = ("rotary_emb_base", "rotary_pct") if name == "gpt_neox" else ("rope_theta", "partial_rotary_factor")
    cases: dict[str, dict[str, Any]] = {
        "nothing": {},
        "another base": {theta: 500.0},
        "a base as a whole number": {theta: 500},
        "base and part of a GPT-NeoX": {"rotary_emb_base": 300.0, "rotary_pct": 0.5},
        "base of the others": {"rope_theta": 300.0},
        "both spellings of the base": {"rope_theta": 300.0, "rotary_emb_base": 700.0},
        "base inside and on top": {theta: 300.0, "rope_parameters": {"rope_theta": 900.0}},
        "null settings": {"rope_scaling": None, "rope_parameters": None},
        "type in the old spelling": {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "both types": {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}},
        "rope_scaling beside rope_parameters": {
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "yarn", "factor": 3.0, "rope_theta": 77.0},
        },
        "an empty rope_scaling beside rope_parameters": {"rope_scaling": {}, "rope_parameters": {"rope_theta": 77.0}},
        "both, with a base on top": {
            theta: 123.0,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_theta": 77.0},
        },
        "linear": {"rope_parameters": scaled(name, "linear")},
        "dynamic": {"rope_parameters": scaled(name, "dynamic")},
        "dynamic with another base": {theta: 500.0, "rope_scaling": scaled(name, "dynamic", factor=2)},
        "yarn": {"rope_parameters": scaled(name, "yarn")},
        "yarn with the context before": {"rope_parameters": scaled(name, "yarn", **original)},
        "yarn with the context before on top": {"rope_parameters": scaled(name, "yarn"), **original},
        "yarn with two contexts before": {
            "rope_parameters": scaled(name, "yarn", **original),
            "original_max_position_embeddings": 30,
        },
        "yarn without factor": {"rope_parameters": scaled(name, "yarn", factor=None, **original)},
        "yarn with attention_factor": {"rope_parameters": scaled(name, "yarn", attention_factor=1.5)},
        "yarn with nulls": {
            "rope_parameters": scaled(name, "yarn", attention_factor=None, beta_fast=None, mscale=None)
        },
        "yarn with betas": {"rope_parameters": scaled(name, "yarn", beta_fast=4, beta_slow=0.5, **original)},
        "yarn with mscale": {"rope_parameters": scaled(name, "yarn", mscale=0.7, mscale_all_dim=0.3)},
        "yarn with mscale alone": {"rope_parameters": scaled(name, "yarn", mscale=0.7)},
        "yarn without truncate": {"rope_parameters": scaled(name, "yarn", truncate=False, beta_fast=3, **original)},
        "yarn with a null truncate": {"rope_parameters": scaled(name, "yarn", truncate=None, beta_fast=3, **original)},
        "yarn of factor 1": {"rope_parameters": scaled(name, "yarn", factor=1.0)},
        "longrope": {"rope_parameters": scaled(name, "longrope")},
        "longrope with the context before": {"rope_parameters": scaled(name, "longrope", **original)},
        "longrope with the context before on top": {"rope_parameters": scaled(name, "longrope"), **original},
        "longrope with factor": {"rope_parameters": scaled(name, "longrope", factor=7.0, **original)},
        "longrope with attention_factor": {
            "rope_parameters": scaled(name, "longrope", attention_factor=1.2, **original)
        },
        "llama3": {"rope_parameters": scaled(name, "llama3")},
        "llama3 with the context before": {"rope_parameters": scaled(name, "llama3", **original)},
        "llama3 with the context before on top": {"rope_parameters": scaled(name, "llama3"), **original},
        "llama3 with equal factors": {"rope_parameters": scaled(name, "llama3", high_freq_factor=1.0)},
        "llama3 with reversed factors": {"rope_parameters": scaled(name, "llama3", low_freq_factor=9.0)},
        "keys that nobody reads": {"rope_parameters": scaled(name, "linear", beta_fast=9, mrope_section=[1, 2])},
    }
    if name in ("phi", "gpt_neox"):
        cases["part inside and on top"] = {part: 0.25, "rope_parameters": {"partial_rotary_factor": 0.5}}
        cases["part of the other spelling"] = {"partial_rotary_factor": 0.5, "rotary_pct": 0.5}
    elif READS_ROPE_PARAMETERS:
        cases["proportional"] = {"rope_parameters": scaled(name, "proportional")}
        cases["proportional with factor"] = {"rope_parameters": scaled(name, "proportional", factor=3.0)}
        part_of = {"rope_type": "proportional", "partial_rotary_factor": 0.5}
        cases["proportional in part"] = {"rope_parameters": part_of}
    if name in ("llama", "qwen2"):
        cases["a null part"] = {"partial_rotary_factor": None}
    return cases


CASES = [(name, case) for name in ROTARY_CLASSES for case in embeddings(name)]


def as_read(settings: dict[str, Any]) -> Any:
    """A configuration object of transformers; version 4 gets phigrow's spelling."""
    return hf_config_of(settings) if READS_ROPE_PARAMETERS else resolve_config(settings, "a configuration").hf_config


def theirs(name: str, settings: dict[str, Any], length: int) -> tuple[np.ndarray, float]:
    """Frequencies and scaling in transformers' module, after it has seen a sequence of this length."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    embedding = getattr(module, ROTARY_CLASSES[name])(as_read(deepcopy(settings)))
    embedding(torch.zeros(1), torch.arange(length)[None])
    return embedding.inv_freq.numpy().astype(np.float64), float(embedding.attention_scaling)


def apart(name: str, settings: dict[str, Any], length: int, other: int | None = None) -> float:
    rotary = function_of(all_families()[name], settings).rotary
    inverse, scaling = theirs(name, settings, length)
    worst = 0.0
    for dtype, tolerance in ((np.float32, 1.0), (np.float64, 1.0)):
        ours = rotary.at(other or length, dtype)
        assert ours.inverse.dtype == dtype
        assert ours.inverse.shape == inverse.shape
        difference = np.abs(ours.inverse - inverse) / np.where(inverse == 0, 1, np.abs(inverse))
        worst = max(worst, tolerance * float(difference.max()), abs(ours.scaling - scaling) / scaling)
    return worst


@pytest.mark.parametrize("name", ROTARY_CLASSES)
def test_frequencies_are_those_of_transformers(name):
    for case, more in embeddings(name).items():
        settings = config(name, **more)
        for length in (1, 20, 21, CONTEXT, CONTEXT + 1, 3 * CONTEXT):
            assert apart(name, settings, length) < 3e-6, (case, length)


def test_every_rotary_type_of_transformers_is_compared():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    new_in_5 = set() if READS_ROPE_PARAMETERS else {"proportional"}
    assert set(SETTINGS) - new_in_5 == {"default", *ROPE_INIT_FUNCTIONS}


def test_another_length_or_setting_is_noticed():
    # Negative control of the comparison with transformers.
    assert apart("llama", config("llama", rope_parameters=scaled("llama", "dynamic")), 80, other=CONTEXT) > 0.1
    longrope = config("llama", rope_parameters=scaled("llama", "longrope", original_max_position_embeddings=20))
    assert apart("llama", longrope, 21, other=20) > 0.1


def pairs() -> list[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """(family, case, source, destination): settings on top of one configuration."""
    out: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = []
    longer = {"max_position_embeddings": 2 * CONTEXT}
    for name in ROTARY_CLASSES:
        yarn, dynamic, longrope, llama3 = (scaled(name, kind) for kind in ("yarn", "dynamic", "longrope", "llama3"))
        before = {"original_max_position_embeddings": 20}
        theta = "rotary_emb_base" if name == "gpt_neox" else "rope_theta"
        linear = scaled(name, "linear")
        both = {
            "rope_scaling": linear,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        }
        out += [
            (name, "yarn, longer context", {"rope_scaling": yarn}, {"rope_scaling": yarn, **longer}),
            (name, "yarn with its context, longer", {"rope_scaling": {**yarn, **before}},
             {"rope_scaling": {**yarn, **before}, **longer}),
            (name, "yarn, its context spelled out", {"rope_scaling": yarn},
             {"rope_scaling": {**yarn, "original_max_position_embeddings": CONTEXT}, **longer}),
            (name, "yarn without factor, longer", {"rope_scaling": {**yarn, "factor": None, **before}},
             {"rope_scaling": {**yarn, "factor": None, **before}, **longer}),
            (name, "llama3, longer context", {"rope_scaling": llama3}, {"rope_scaling": llama3, **longer}),
            (name, "longrope, longer context", {"rope_scaling": {**longrope, **before}},
             {"rope_scaling": {**longrope, **before}, **longer}),
            (name, "longrope with factor, longer", {"rope_scaling": {**longrope, **before, "factor": 3.0}},
             {"rope_scaling": {**longrope, **before, "factor": 3.0}, **longer}),
            (name, "longrope, another long_factor", {"rope_scaling": {**longrope, **before}},
             {"rope_scaling": {**longrope, **before, "long_factor": [9.0] * len(longrope["long_factor"])}}),
            (name, "longrope, never long", {"rope_scaling": longrope},
             {"rope_scaling": {**longrope, "long_factor": [9.0] * len(longrope["long_factor"])}}),
            (name, "dynamic, longer context", {"rope_scaling": dynamic}, {"rope_scaling": dynamic, **longer}),
            (name, "dynamic, shorter context", {"rope_scaling": dynamic},
             {"rope_scaling": dynamic, "max_position_embeddings": CONTEXT // 2}),
            (name, "dynamic within its context", {}, {"rope_scaling": dynamic}),
            (name, "dynamic of factor 1", {"rope_scaling": {**dynamic, "factor": 1.0}},
             {"rope_scaling": {**dynamic, "factor": 4.0}}),
            (name, "context before on top", {"rope_scaling": {**yarn, **before}},
             {"rope_scaling": {**yarn, **before}, "original_max_position_embeddings": 4000}),
            (name, "context before moved", {"rope_scaling": {**yarn, **before}}, {"rope_scaling": yarn, **before}),
            (name, "rope_scaling beside rope_parameters", {theta: 500.0}, both),
            (name, "rope_scaling hides rope_parameters", {"rope_scaling": scaled(name, "linear")}, both),
            (name, "linear of factor 1", {}, {"rope_scaling": scaled(name, "linear", factor=1.0)}),
            (name, "yarn of factor 1", {}, {"rope_scaling": {**yarn, "factor": 1.0}}),
            (name, "longer context", {}, longer),
            (name, "null settings", {}, {"rope_scaling": None}),
            (name, "the base in three spellings", {theta: 500}, {"rope_parameters": {"rope_theta": 5e2}}),
            (name, "the old keys of a GPT-NeoX", {}, {"rotary_emb_base": 500.0}),
            (name, "the new keys", {}, {"rope_theta": 500.0}),
            (name, "a new key beside an old one", {"rotary_emb_base": 10000.0, "rope_theta": 500.0},
             {"rotary_emb_base": 500.0, "rope_theta": 500.0}),
            (name, "rope_scaling hides a base", {"rope_scaling": linear, "rope_parameters": {"rope_theta": 500.0}},
             {"rope_scaling": linear, theta: 500.0}),
            (name, "an attention factor", {"rope_scaling": yarn}, {"rope_scaling": {**yarn, "attention_factor": 1.5}}),
            (name, "an attention factor spelled out", {"rope_scaling": yarn},
             {"rope_scaling": {**yarn, "attention_factor": 0.1 * np.log(4.0) + 1}}),
            (name, "tanh under another name", {"hidden_act": "gelu_new"}, {"hidden_act": "gelu_pytorch_tanh"}),
            (name, "swish", {"hidden_act": "silu"}, {"hidden_act": "swish"}),
            (name, "two activations", {"hidden_act": "gelu"}, {"hidden_act": "gelu_new"}),
            (name, "an activation that numpy lacks", {"hidden_act": "mish"}, {"hidden_act": "mish"}),
            (name, "the same epsilon", {"layer_norm_eps": 1e-5, "rms_norm_eps": 1e-5},
             {"layer_norm_eps": 0.00001, "rms_norm_eps": 0.00001}),
            (name, "another epsilon", {}, {"layer_norm_eps": 1e-2, "rms_norm_eps": 1e-2}),
            (name, "keys that no family reads", {}, {"final_logit_softcapping": 1.0, "logit_scale": 0.1}),
            (name, "the default window of layers", {}, {"layer_types": ["full_attention"] * 2}),
        ]  # fmt: skip
    out.append(("gpt_neox", "the part of the others", {"rotary_pct": 0.5}, {"partial_rotary_factor": 0.25}))
    return out


SAME = {
    "yarn with its context, longer", "yarn, its context spelled out", "longrope with factor, longer",
    "longrope, never long", "dynamic within its context", "dynamic of factor 1", "context before moved",
    "rope_scaling hides rope_parameters", "linear of factor 1", "yarn of factor 1", "longer context", "null settings",
    "the base in three spellings", "an attention factor spelled out", "tanh under another name", "swish",
    "an activation that numpy lacks", "the same epsilon", "keys that no family reads", "the default window of layers",
    "the part of the others",
}  # fmt: skip


def same(name: str, case: str) -> bool:
    if case in ("the old keys of a GPT-NeoX", "the new keys", "a new key beside an old one"):
        return (name == "gpt_neox") == (case == "the new keys")
    return case in SAME


def lengths_of(name: str, source: dict[str, Any], destination: dict[str, Any]) -> tuple[int, ...]:
    """The lengths that decide, after a short one, which is enough for everything that is not rotary."""
    old, new = (function_of(all_families()[name], each) for each in (source, destination))
    return tuple(sorted({12, *lengths_to_compare(old.rotary, new.rotary, max(old.context, new.context))}))


def logits_apart(name: str, source: dict[str, Any], destination: dict[str, Any]) -> float:
    """Largest |dlogit| of one set of weights under two configurations, in transformers."""
    models = [model_of(deepcopy(each), torch.float32) for each in (source, destination)]
    worst = 0.0
    for length in lengths_of(name, source, destination):
        ids = torch.arange(length)[None] * 7 % 31
        with torch.no_grad():
            one, two = (model(ids, use_cache=False).logits for model in models)
        worst = max(worst, float((one - two).abs().max()))
    return worst


@pytest.mark.parametrize("name", ROTARY_CLASSES)
def test_a_plan_is_exact_only_if_transformers_computes_the_same(name):
    for family, case, old, new in pairs():
        if family != name:
            continue
        source, destination = config(name, **old), config(name, **new)
        plan = phigrow.plan(source, destination, "tile")
        measured = logits_apart(name, source, destination)
        assert (measured < 2e-5) == same(name, case), (case, measured)
        assert plan.exact == same(name, case), (case, plan.approximations, measured)
        if not plan.exact:
            assert measured > 2e-4, case
            with pytest.raises(GrowthError, match="compute different functions"):
                phigrow.plan(source, destination, "lossless")


def generated_apart(settings: dict[str, Any], length: int = 24) -> float:
    """Largest |dlogit| between one pass over a sequence and the same sequence token by token, through the cache."""
    model = model_of(settings, torch.float32)
    ids, past, steps = torch.arange(length)[None] * 7 % 31, None, []
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for k in range(length):
            out = model(ids[:, k : k + 1], past_key_values=past, use_cache=True)
            past = out.past_key_values
            steps.append(out.logits)
    return float((torch.cat(steps, 1) - whole).abs().max())


@pytest.mark.parametrize("name", ROTARY_CLASSES)
def test_a_stray_sliding_window_shortens_the_cache(name):
    plain, window = config(name), config(name, sliding_window=6)
    assert generated_apart(plain) < 2e-5
    shortened = generated_apart(window) > 1e-2
    assert shortened == (name != "qwen2")  # which reads its window only where use_sliding_window is true
    plan = phigrow.plan(plain, window, "tile")
    assert plan.exact == (not shortened)
    assert phigrow.plan(window, window, "tile").exact
    whole = ["full_attention"] * 2
    kinds = config(name, sliding_window=6, layer_types=whole)
    assert generated_apart(kinds) < 2e-5
    assert phigrow.plan(config(name, layer_types=whole), kinds, "tile").exact
    if shortened:
        change = "sliding_window: None -> 6"
        assert plan.approximations == (f"the configurations compute different functions: {change}",)


@pytest.mark.parametrize("name", ROTARY_CLASSES)
def test_layers_that_see_fewer_positions_are_refused(name):
    for kinds in (["full_attention", "sliding_attention"], ["chunked_attention"] * 2, "sliding_attention", [3, 3]):
        stray = config(name, layer_types=kinds, sliding_window=6)
        with pytest.raises(GrowthError, match=r"layer_types holds .*, which phigrow does not support"):
            phigrow.plan(config(name), stray, "tile")
    assert phigrow.plan(config(name), config(name, layer_types=["attention"] * 2), "tile").exact


WINDOWS = {
    "begin past the last layer": {"max_window_layers": 2},
    "begin past the last layer by default": {},
    "are absent from the listed layers": {"max_window_layers": 0, "layer_types": ["full_attention"] * 2},
    "have no length": {"max_window_layers": 0, "sliding_window": None},
}


@pytest.mark.parametrize("more", WINDOWS.values(), ids=WINDOWS)
def test_windows_that_no_layer_has_are_written_as_turned_off(more, save_model):
    plain = config("qwen2")
    given = plain | {"use_sliding_window": True, "sliding_window": 6} | more
    slides = given | {"sliding_window": 6, "max_window_layers": 1, "layer_types": None}
    whole, same, other = (model_of(each)(IDS).logits.detach() for each in (plain, given, slides))
    assert torch.equal(whole, same)
    assert float((whole - other).abs().max()) > 1e-2
    deeper = {key: value for key, value in plain.items() if key != "layer_types"} | {"num_hidden_layers": 4}
    source = save_model(model_of(given, torch.float32))
    (source / "config.json").write_text(json.dumps(given))  # transformers adds layer_types
    grown = phigrow.expand(source, deeper, source.with_name("grown"), method="lossless", dtype="float32")
    before, after = (AutoModelForCausalLM.from_pretrained(folder)(IDS).logits.detach() for folder in (source, grown))
    assert float((before - after).abs().max()) < 2e-5
    stored = resolve_config(given, "here").stored("float32", {})
    assert stored["use_sliding_window"] is False  # so that the same keys with more layers have the same function


def test_windows_that_more_layers_would_have_are_refused():
    given = config("qwen2") | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
    for layers, kinds in ((4, None), (3, ["full_attention"] * 2)):
        deeper = given | {"num_hidden_layers": layers, "layer_types": kinds}
        with pytest.raises(
            GrowthError, match=rf"(?s)use_sliding_window is true.*of {layers} layers, those from layer 2"
        ):
            phigrow.plan(given, deeper, "lossless")


@pytest.mark.parametrize("activation", [["gelu_new"], {"name": "gelu_new"}, 1])
def test_an_activation_is_a_name(activation):
    with pytest.raises(GrowthError, match="it is the name of an activation"):
        phigrow.plan(config("phi"), config("phi", hidden_act=activation), "tile")
    assert phigrow.plan(config("phi"), config("phi", hidden_act="gelu_new"), "tile").exact


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_type": "su"}, "rope_type is 'su', which transformers does not have"),
        ({"rope_type": None}, "rope_type is None, which transformers does not have"),
        ({"rope_type": ["yarn"]}, r"rope_type is \['yarn'\], which transformers does not have"),
        ({"rope_type": "linear"}, "rope_type linear needs factor"),
        ({"rope_type": "linear", "factor": None}, "factor is None, but must be a positive number"),
        ({"rope_type": "dynamic", "factor": 0}, "factor is 0, but must be a positive number"),
        ({"rope_type": "yarn"}, "rope_type yarn needs factor"),
        ({"rope_type": "yarn", "factor": 2.0, "mscale": "much"}, "mscale is 'much', but must be a number"),
        (
            {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0},
            "the frequencies of rope_type yarn cannot be computed",
        ),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 8}, r"a list of 8 positive numbers"),
        ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}, "rope_type llama3 needs high_freq_factor"),
        ({"full_attention": {"rope_theta": 500.0}}, "the rotary settings hold an object, full_attention"),
        (
            {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
            "rope_type linear turns 8 coordinates of a head, but the model turns 16",
        ),
    ],
)
def test_settings_that_transformers_cannot_compute_are_refused(settings, message):
    with pytest.raises(GrowthError, match=message):
        phigrow.plan(config("llama"), config("llama", rope_parameters=settings), "tile")


def test_a_plan_names_keys_that_transformers_does_not_read():
    stray = config("gpt_neox", rope_theta=500.0)
    notes = phigrow.plan(config("gpt_neox"), stray, "tile").notes
    assert notes == ("in the destination configuration, rope_theta 500.0 is not read: the rotary base is 10000.0",)
    other = config("gpt_neox", rope_theta=500.0, rotary_emb_base=300.0)
    with pytest.raises(
        GrowthError, match=r"rope_theta: 300.0 -> 10000.0; in the source configuration, rope_theta 500.0 is"
    ):
        phigrow.plan(other, config("gpt_neox"), "lossless")
    hidden = config("llama", rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={"rope_theta": 500.0})
    notes = phigrow.plan(hidden, hidden, "tile").notes
    assert notes[0] == "in the source configuration, rope_parameters is not read: rope_scaling replaces all of it"
    for sound in ({"rope_theta": 500.0}, {"rope_theta": 500.0, "rope_parameters": {"rope_theta": 500.0}}):
        assert phigrow.plan(config("llama", **sound), config("llama", **sound), "tile").notes == ()


def test_a_rotary_part_that_grows_by_a_whole_factor_keeps_the_frequencies_of_its_pairs():
    sizes = {"kv": 2, "group": 1, "q": 32, "rotary": 32, "mlp": 24, "layer": 2, "vocab": 31, "hidden": 64}
    larger = {**all_families()["llama"].config_of(sizes), "max_position_embeddings": CONTEXT}
    llama = all_families()["llama"]
    for more, equal in (({}, True), ({"rope_scaling": scaled("llama", "linear")}, True),
                        ({"rope_scaling": scaled("llama", "dynamic")}, False)):  # fmt: skip
        old, new = (function_of(llama, {**each, **deepcopy(more)}).rotary for each in (config("llama"), larger))
        assert (old.size, new.size) == (16, 32)
        assert (compare(old, new, 2 * CONTEXT) is None) == equal, more
        assert compare(old, new, CONTEXT) is None


def test_activations_of_one_function_are_those_of_transformers():
    x = np.linspace(-6, 6, 241)
    for name, function in ACTIVATIONS.items():
        theirs = ACT2FN[name](torch.from_numpy(x)).numpy()
        assert np.abs(function(x) - theirs).max() < 1e-12, name
    # Negative control: the two kinds of GELU differ.
    assert np.abs(ACTIVATIONS["gelu"](x) - ACTIVATIONS["gelu_new"](x)).max() > 1e-4


def test_null_and_a_missing_key_are_the_default():
    for name in ROTARY_CLASSES:
        default = AutoConfig.for_model(name)
        for key, value in all_families()[name].function_keys.items():
            assert getattr(default, key) == value, (name, key)
        nulls = dict.fromkeys(("hidden_act", "rope_scaling", "rope_parameters", "sliding_window", "layer_types"))
        old, new = (function_of(all_families()[name], each) for each in (config(name), config(name, **nulls)))
        assert function_differences(old, new) == []
        without = {key: value for key, value in config(name).items() if key != "max_position_embeddings"}
        assert function_of(all_families()[name], without).context == default.max_position_embeddings
        parts = ("partial_rotary_factor", "rotary_pct")
        assert apart(name, {key: value for key, value in config(name).items() if key not in parts}, 12) < 3e-6


def test_growing_leaves_the_callers_settings_alone():
    def settings() -> dict[str, Any]:
        return config("llama", rope_parameters=scaled("llama", "yarn"))

    destination = settings()
    grown = phigrow.expand_model(model_of(settings(), torch.float32), destination, method="lossless")
    assert grown.config.rope_parameters["original_max_position_embeddings"] == CONTEXT
    assert destination == settings()
    if not READS_ROPE_PARAMETERS:
        return
    # Negative control: transformers 5 writes into what it is given.
    AutoConfig.for_model(**{key: value for key, value in destination.items() if key != "architectures"})
    assert destination != settings()
