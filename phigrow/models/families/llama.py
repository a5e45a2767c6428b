"""Llama: attention and gated MLP one after the other, each behind an RMSNorm, grouped key/value heads.

Source: ``transformers.LlamaForCausalLM``; SmolLM, TinyLlama and Yi are of this model type too. The whole of every head
turns, so no exact method grows heads: it adds more of them. ``head_dim`` may be set apart from hidden_size /
num_attention_heads.
"""

from __future__ import annotations

from phigrow.models.axis_sizes import SizeRules, axis_sizes
from phigrow.models.config import Config
from phigrow.models.family import ROTARY_TABLES, Family, Sizes
from phigrow.models.forward import Ids, Values, Weights, gated_forward
from phigrow.models.rotary import Turn

_TABLE = """
model.embed_tokens.weight                                  vocab -> hidden
model.layers.{layer}.input_layernorm.weight                rmsnorm hidden -> normed
model.layers.{layer}.self_attn.q_proj.weight               (kv group q) <- normed
model.layers.{layer}.self_attn.q_proj.bias                 (kv group q)              if attention_bias
model.layers.{layer}.self_attn.k_proj.weight               (kv k) <- normed
model.layers.{layer}.self_attn.k_proj.bias                 (kv k)                    if attention_bias
model.layers.{layer}.self_attn.v_proj.weight               (kv v) <- normed
model.layers.{layer}.self_attn.v_proj.bias                 (kv v)                    if attention_bias
model.layers.{layer}.self_attn.o_proj.weight               hidden <- (kv group v)
model.layers.{layer}.self_attn.o_proj.bias                 hidden                    if attention_bias
model.layers.{layer}.post_attention_layernorm.weight       rmsnorm hidden -> normed
model.layers.{layer}.mlp.gate_proj.weight                  mlp <- normed
model.layers.{layer}.mlp.gate_proj.bias                    mlp                       if mlp_bias
model.layers.{layer}.mlp.up_proj.weight                    mlp <- normed
model.layers.{layer}.mlp.up_proj.bias                      mlp                       if mlp_bias
model.layers.{layer}.mlp.down_proj.weight                  hidden <- mlp
model.layers.{layer}.mlp.down_proj.bias                    hidden                    if mlp_bias
model.norm.weight                                          rmsnorm hidden -> final
lm_head.weight                                             vocab <- final            unless tie_word_embeddings
"""

_RULES = SizeRules(
    where="a Llama configuration",
    architecture="LlamaForCausalLM",
    flags=("tie_word_embeddings", "attention_bias", "mlp_bias"),
    mlp_matrices=3,
    own_head_dim=True,
)


def _sizes(config: Config) -> Sizes:
    return axis_sizes(config, _RULES)


def _config(sizes: Sizes) -> Config:
    heads = sizes["kv"] * sizes["group"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sizes["vocab"],
        "hidden_size": -(-sizes["hidden"] // heads) * heads,  # transformers wants a multiple of heads all the same
        "intermediate_size": sizes["mlp"],
        "num_hidden_layers": sizes["layer"],
        "num_attention_heads": heads,
        "num_key_value_heads": sizes["kv"],
        "head_dim": sizes["q"],
    }


def _forward(config: Config, sizes: Sizes, turn: Turn, weights: Weights, ids: Ids, last: int) -> Values:
    return gated_forward(config, sizes["q"], turn, weights, ids, last)


FAMILY = Family(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    table=_TABLE,
    sizes_of=_sizes,
    config_of=_config,
    function_keys={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    },
    forward=_forward,
    dropout_keys=("attention_dropout",),
    ignored_tensors=ROTARY_TABLES,
)
