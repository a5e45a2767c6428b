"""GPT-NeoX and Pythia: fused queries, keys and values, partial rotary heads, two LayerNorms a layer, no grouped heads.

Source: ``transformers.GPTNeoXForCausalLM``. Rows of ``query_key_value`` are, head by head, the head's query, key and
value. ``use_parallel_residual`` (attention and MLP read the same stream) changes the function, not the table.
Checkpoints call the head ``embed_out``; live models of transformers 5.20 and later call it ``lm_head``.
"""

from __future__ import annotations

import numpy as np

from phigrow.models.axis_sizes import SizeRules, axis_sizes
from phigrow.models.bounds import rotary_factor
from phigrow.models.config import Config
from phigrow.models.family import ROTARY_TABLES, Family, Sizes
from phigrow.models.forward import ACTIVATIONS, Ids, Values, Weights, attention, layer_norm, linear, rotate, split_heads
from phigrow.models.rotary import Turn

_TABLE = """
gpt_neox.embed_in.weight                                          vocab -> hidden
gpt_neox.layers.{layer}.input_layernorm.weight|bias               norm hidden -> normed
gpt_neox.layers.{layer}.attention.query_key_value.weight          (kv q|k|v) <- normed
gpt_neox.layers.{layer}.attention.query_key_value.bias            (kv q|k|v)           if attention_bias
gpt_neox.layers.{layer}.attention.dense.weight                    hidden <- (kv v)
gpt_neox.layers.{layer}.attention.dense.bias                      hidden               if attention_bias
gpt_neox.layers.{layer}.post_attention_layernorm.weight|bias      norm hidden -> normed
gpt_neox.layers.{layer}.mlp.dense_h_to_4h.weight|bias             mlp <- normed
gpt_neox.layers.{layer}.mlp.dense_4h_to_h.weight|bias             hidden <- mlp
gpt_neox.final_layer_norm.weight|bias                             norm hidden -> final
embed_out.weight                                                  vocab <- final       unless tie_word_embeddings
"""

_RULES = SizeRules(
    where="a GPT-NeoX configuration",
    architecture="GPTNeoXForCausalLM",
    flags=("tie_word_embeddings", "attention_bias", "use_parallel_residual"),
    mlp_matrices=2,
    grouped=False,
    rotary=0.25,
)


def _sizes(config: Config) -> Sizes:
    return axis_sizes(config, _RULES)


def _config(sizes: Sizes) -> Config:
    heads = sizes["kv"] * sizes.get("group", 1)
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": sizes["vocab"],
        "hidden_size": heads * sizes["q"],
        "intermediate_size": sizes["mlp"],
        "num_hidden_layers": sizes["layer"],
        "num_attention_heads": heads,
        "rotary_pct": rotary_factor(sizes["rotary"], sizes["q"]),
    }


def _forward(config: Config, sizes: Sizes, turn: Turn, weights: Weights, ids: Ids, last: int) -> Values:
    act, eps, head = ACTIVATIONS[config["hidden_act"]], config["layer_norm_eps"], sizes["q"]
    x = weights["gpt_neox.embed_in.weight"][ids]
    for layer in range(sizes["layer"]):
        at = f"gpt_neox.layers.{layer}"
        normed = layer_norm(x, weights, f"{at}.input_layernorm", eps)
        fused = split_heads(linear(normed, weights, f"{at}.attention.query_key_value"), 3 * head)
        q, k = (rotate(each, turn) for each in np.split(fused, 3, axis=-1)[:2])
        mixed = linear(attention(q, k, fused[..., 2 * head :]), weights, f"{at}.attention.dense")
        read = x if config["use_parallel_residual"] else x + mixed
        normed = layer_norm(read, weights, f"{at}.post_attention_layernorm", eps)
        wide = act(linear(normed, weights, f"{at}.mlp.dense_h_to_4h"))
        x = x + mixed + linear(wide, weights, f"{at}.mlp.dense_4h_to_h")
    x = layer_norm(x[:, -last:], weights, "gpt_neox.final_layer_norm", eps)
    return linear(x, weights, "gpt_neox.embed_in" if config["tie_word_embeddings"] else "embed_out")


FAMILY = Family(
    name="gpt_neox",
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    table=_TABLE,
    sizes_of=_sizes,
    config_of=_config,
    heads=("kv",),
    function_keys={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    forward=_forward,
    dropout_keys=("hidden_dropout", "attention_dropout"),
    live_names={"embed_out.weight": "lm_head.weight"},
    # Pythia's checkpoints carry the causal mask and the rotary table; neither is learned.
    ignored_tensors=(".attention.bias", ".attention.masked_bias", *ROTARY_TABLES),
)
