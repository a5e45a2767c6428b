"""GPT-NeoX and Pythia: fused queries, keys and values, partial rotary heads, two LayerNorms a layer, no grouped heads.

Source: ``transformers.GPTNeoXForCausalLM``. Rows of ``query_key_value`` are, head by head, the head's query, key and
value. Whether attention and MLP read the same stream (``use_parallel_residual``) changes the function, not the table.
Checkpoints call the head ``embed_out``; live models of transformers 5.20 and later call it ``lm_head``.
"""

from __future__ import annotations

from phigrow.models.bounds import check_division, check_total, check_values, rotary_factor
from phigrow.models.config import Config, normalised
from phigrow.models.family import Family, Sizes

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

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip
_WHERE = "a GPT-NeoX configuration"


def _sizes(config: Config) -> Sizes:
    config = normalised(config)
    flags = ("tie_word_embeddings", "attention_bias", "use_parallel_residual")
    check_values(config, _WHERE, sizes=_SIZES, flags=flags)
    heads, _ = check_division({**config, "num_key_value_heads": None}, _WHERE, "GPTNeoXForCausalLM")
    hidden = config["hidden_size"]
    head = hidden // heads
    sizes = {
        "vocab": config["vocab_size"],
        "hidden": hidden,
        "normed": hidden,
        "final": hidden,
        "kv": heads,
        "q": head,
        "k": head,
        "v": head,
        "rotary": int(head * config.get("partial_rotary_factor", 0.25)),
        "mlp": config["intermediate_size"],
        "layer": config["num_hidden_layers"],
    }
    check_total(sizes, _WHERE, matrices=2)
    return sizes


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
        "rope_theta": 10000.0,
        "rope_type": "default",
        "rope_settings": {},
        "use_parallel_residual": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    dropout_keys=("hidden_dropout", "attention_dropout"),
    live_names={"embed_out.weight": "lm_head.weight"},
    # Pythia's checkpoints carry the causal mask and the rotary table; neither is learned.
    ignored_tensors=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
)
