"""phi-1, phi-1.5 and phi-2: parallel attention and MLP behind one LayerNorm, biases everywhere, partial rotary heads.

Source: ``transformers.PhiForCausalLM``. phi-1, phi-1.5 and phi-2 have one key/value head per head, so group = 1.
"""

from __future__ import annotations

from phigrow.models.axis_sizes import SizeRules, axis_sizes
from phigrow.models.bounds import rotary_factor
from phigrow.models.config import Config
from phigrow.models.family import ROTARY_TABLES, Family, Sizes
from phigrow.models.forward import ACTIVATIONS, Ids, Values, Weights, attention, layer_norm, linear, rotate, split_heads
from phigrow.models.rotary import Turn

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
model.final_layernorm.weight|bias                    norm hidden -> final
lm_head.weight                                       vocab <- final    unless tie_word_embeddings
lm_head.bias                                         vocab
"""

_RULES = SizeRules(
    where="a Phi configuration",
    architecture="PhiForCausalLM",
    flags=("tie_word_embeddings", "qk_layernorm"),
    mlp_matrices=2,
    rotary=0.5,
)


def _sizes(config: Config) -> Sizes:
    return axis_sizes(config, _RULES)


def _config(sizes: Sizes) -> Config:
    heads = sizes["kv"] * sizes["group"]
    return {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        "vocab_size": sizes["vocab"],
        "hidden_size": heads * sizes["q"],
        "intermediate_size": sizes["mlp"],
        "num_hidden_layers": sizes["layer"],
        "num_attention_heads": heads,
        "num_key_value_heads": sizes["kv"],
        "partial_rotary_factor": rotary_factor(sizes["rotary"], sizes["q"]),
    }


def _forward(config: Config, sizes: Sizes, turn: Turn, weights: Weights, ids: Ids, last: int) -> Values:
    act, eps = ACTIVATIONS[config["hidden_act"]], config["layer_norm_eps"]
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(sizes["layer"]):
        at = f"model.layers.{layer}"
        normed = layer_norm(x, weights, f"{at}.input_layernorm", eps)
        q, k, v = (split_heads(linear(normed, weights, f"{at}.self_attn.{name}_proj"), sizes["q"]) for name in "qkv")
        if config["qk_layernorm"]:
            q = layer_norm(q, weights, f"{at}.self_attn.q_layernorm", eps)
            k = layer_norm(k, weights, f"{at}.self_attn.k_layernorm", eps)
        q, k = (rotate(each, turn) for each in (q, k))
        mixed = linear(attention(q, k, v), weights, f"{at}.self_attn.dense")
        x = x + mixed + linear(act(linear(normed, weights, f"{at}.mlp.fc1")), weights, f"{at}.mlp.fc2")
    x = layer_norm(x[:, -last:], weights, "model.final_layernorm", eps)
    if config["tie_word_embeddings"]:
        return linear(x, weights, "model.embed_tokens") + weights["lm_head.bias"]
    return linear(x, weights, "lm_head")


FAMILY = Family(
    name="phi",
    model_type="phi",
    architecture="PhiForCausalLM",
    table=_TABLE,
    sizes_of=_sizes,
    config_of=_config,
    function_keys={
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "qk_layernorm": False,
        "tie_word_embeddings": False,
    },
    forward=_forward,
    dropout_keys=("resid_pdrop", "embd_pdrop", "attention_dropout"),
    # Checkpoints written before transformers 4.40 carry the rotary table; it is computed, not learned.
    ignored_tensors=ROTARY_TABLES,
    former_model_types=("phi-msft", "mixformer-sequential"),
    former_tensors=(".mixer.Wqkv.weight", ".wte.weight"),
    former_advice="use the repository's current revision (microsoft/phi-1, phi-1_5 and phi-2 hold PhiForCausalLM now: "
    "leave --revision out, or download it again); a model made from the old upload must be renamed first: the rows of "
    "mixer.Wqkv are those of q_proj, k_proj and v_proj, one after the other, mixer.out_proj is dense",
)
