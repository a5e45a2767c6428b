"""phi-1, phi-1.5 and phi-2: parallel attention and MLP behind one LayerNorm, biases everywhere, partial rotary heads.

Source: ``transformers.PhiForCausalLM``. phi-1, phi-1.5 and phi-2 have one key/value head per head, so group = 1.
"""

from __future__ import annotations

from phigrow.config import Config, normalised
from phigrow.errors import GrowthError
from phigrow.family import Family, Sizes

_TABLE = """
model.embed_tokens.weight                            vocab -> hidden
model.layers.{layer}.input_layernorm.weight|bias     norm hidden -> normed
model.layers.{layer}.self_attn.q_proj.weight|bias    (kv group q) <- normed
model.layers.{layer}.self_attn.k_proj.weight|bias    (kv k) <- normed
model.layers.{layer}.self_attn.v_proj.weight|bias    (kv v) <- normed
model.layers.{layer}.self_attn.dense.weight|bias     hidden <- (kv group v)
model.layers.{layer}.self_attn.q_layernorm.weight|bias  norm q -> q   if qk_layernorm
model.layers.{layer}.self_attn.k_layernorm.weight|bias  norm k -> k   if qk_layernorm
model.layers.{layer}.mlp.fc1.weight|bias             mlp <- normed
model.layers.{layer}.mlp.fc2.weight|bias             hidden <- mlp
model.final_layernorm.weight|bias                    norm hidden -> normed
lm_head.weight                                       vocab <- normed   unless tie_word_embeddings
lm_head.bias                                         vocab
"""

_SIZE_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def _sizes(config: Config) -> Sizes:
    config = normalised(config)
    for key in _SIZE_KEYS:
        if not isinstance(config.get(key), int) or isinstance(config[key], bool) or config[key] < 1:
            raise GrowthError(f"{key} is {config.get(key)!r}, not a positive whole number", where="a Phi configuration")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv = config.get("num_key_value_heads") or heads
    for whole, parts, what in ((hidden, heads, "hidden_size"), (heads, kv, "num_attention_heads")):
        if whole % parts:
            by = "num_attention_heads" if what == "hidden_size" else "num_key_value_heads"
            raise GrowthError(
                f"heads do not divide: {what} {whole} is no multiple of {by} {parts}",
                where="a Phi configuration",
                why="PhiForCausalLM gives every head hidden_size / num_attention_heads coordinates",
                fix=f"choose a {what} that is a multiple of {parts}",
            )
    head = hidden // heads
    return {
        "vocab": config["vocab_size"],
        "hidden": hidden,
        "normed": hidden,
        "kv": kv,
        "group": heads // kv,
        "q": head,
        "k": head,
        "v": head,
        "rotary": int(head * config.get("partial_rotary_factor", 0.5)),
        "mlp": config["intermediate_size"],
        "layer": config["num_hidden_layers"],
    }


FAMILY = Family(
    name="phi",
    model_type="phi",
    architecture="PhiForCausalLM",
    table=_TABLE,
    sizes_of=_sizes,
    function_keys=("hidden_act", "layer_norm_eps", "rope_theta", "rope_type", "qk_layernorm", "tie_word_embeddings"),
    dropout_keys=("resid_pdrop", "embd_pdrop", "attention_dropout"),
    # Checkpoints written before transformers 4.40 carry the rotary table; it is computed, not learned.
    ignored_tensors=(".rotary_emb.inv_freq",),
)
