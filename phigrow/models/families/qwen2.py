"""Qwen2 and Qwen2.5: a Llama with biases on queries, keys and values; the small ones tie their embeddings.

Source: ``transformers.Qwen2ForCausalLM``. Layers with a sliding window, which no published Qwen2 has, are refused: the
depth of a layer decides, and growth changes it. A configuration may turn windows on and begin them past its last layer.
phigrow writes such a model with windows turned off, because more layers would have one otherwise.
"""

from __future__ import annotations

from phigrow.errors import GrowthError
from phigrow.models.axis_sizes import SizeRules, axis_sizes
from phigrow.models.config import Config
from phigrow.models.family import ROTARY_TABLES, Family, Sizes
from phigrow.models.forward import Ids, Values, Weights, gated_forward
from phigrow.models.rotary import Turn

_TABLE = """
model.embed_tokens.weight                                  vocab -> hidden
model.layers.{layer}.input_layernorm.weight                rmsnorm hidden -> normed
model.layers.{layer}.self_attn.q_proj.weight|bias          (kv group q) <- normed
model.layers.{layer}.self_attn.k_proj.weight|bias          (kv k) <- normed
model.layers.{layer}.self_attn.v_proj.weight|bias          (kv v) <- normed
model.layers.{layer}.self_attn.o_proj.weight               hidden <- (kv group v)
model.layers.{layer}.post_attention_layernorm.weight       rmsnorm hidden -> normed
model.layers.{layer}.mlp.gate_proj.weight                  mlp <- normed
model.layers.{layer}.mlp.up_proj.weight                    mlp <- normed
model.layers.{layer}.mlp.down_proj.weight                  hidden <- mlp
model.norm.weight                                          rmsnorm hidden -> final
lm_head.weight                                             vocab <- final            unless tie_word_embeddings
"""

FIRST_WITH_WINDOW = 28
"""transformers' default of ``max_window_layers``."""

_RULES = SizeRules(
    where="a Qwen2 configuration",
    architecture="Qwen2ForCausalLM",
    flags=("tie_word_embeddings", "use_sliding_window"),
    mlp_matrices=3,
    own_head_dim=True,
    kv_heads=32,
)


def _sizes(config: Config) -> Sizes:
    sizes = axis_sizes(config, _RULES)
    if (first := _first_with_window(config, sizes["layer"])) < sizes["layer"]:
        raise GrowthError(
            "use_sliding_window is true, which phigrow does not support",
            where=_RULES.where,
            why=f"of {sizes['layer']} layers, those from layer {first} on would have a sliding window, and growth "
            "moves layers",
            fix="set use_sliding_window to false, as in the published models",
        )
    return sizes


def _first_with_window(config: Config, layers: int) -> int:
    """Return the first layer with a sliding window, as transformers chooses it; the number of layers if none has."""
    kinds = config.get("layer_types")
    if not config.get("use_sliding_window") or config.get("sliding_window", 0) is None:
        return layers
    if isinstance(kinds, list) and len(kinds) == layers:  # these are all full_attention, as `axis_sizes` checked
        return layers
    first = config.get("max_window_layers", FIRST_WITH_WINDOW)
    return max(first, 0) if type(first) is int else 0


def _config(sizes: Sizes) -> Config:
    heads = sizes["kv"] * sizes["group"]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": sizes["vocab"],
        "hidden_size": -(-sizes["hidden"] // heads) * heads,
        "intermediate_size": sizes["mlp"],
        "num_hidden_layers": sizes["layer"],
        "num_attention_heads": heads,
        "num_key_value_heads": sizes["kv"],
        "head_dim": sizes["q"],
    }


def _forward(config: Config, sizes: Sizes, turn: Turn, weights: Weights, ids: Ids, last: int) -> Values:
    return gated_forward(config, sizes["q"], turn, weights, ids, last)


FAMILY = Family(
    name="qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    table=_TABLE,
    sizes_of=_sizes,
    config_of=_config,
    function_keys={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    forward=_forward,
    dropout_keys=("attention_dropout",),
    has_layer_types=True,
    without_effect={"use_sliding_window": False},
    ignored_tensors=ROTARY_TABLES,
)
