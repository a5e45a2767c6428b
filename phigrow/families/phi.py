"""phi-1, phi-1.5 and phi-2: parallel attention and MLP behind one LayerNorm, biases everywhere, partial rotary heads.

Source: ``transformers.PhiForCausalLM``. phi-1, phi-1.5 and phi-2 have one key/value head per head, so group = 1.
"""

from __future__ import annotations

from phigrow.config import Config, is_number, normalised
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

# The most of each size, tens to hundreds of times what any language model has: beyond, a configuration is a slip of
# the pen or an attack, and is refused before anything is allocated for it.
_MOST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 1 << 20,
    "num_key_value_heads": 1 << 20,
    "max_position_embeddings": 1 << 40,
}
_OPTIONAL = {"num_key_value_heads", "max_position_embeddings"}
_MOST_PARAMETERS = 10**14
# The least and the most of every other number that growth reads.
_RANGES = {
    "partial_rotary_factor": (0.0, 1.0),
    "initializer_range": (0.0, 1e3),
    "layer_norm_eps": (0.0, 1.0),
    "resid_pdrop": (0.0, 1.0),
    "embd_pdrop": (0.0, 1.0),
    "attention_dropout": (0.0, 1.0),
}
_FLAGS = ("tie_word_embeddings", "qk_layernorm")
_WHERE = "a Phi configuration"


def _check_values(config: Config) -> None:
    """Hold every value that decides shapes or arithmetic to what a Phi can have.

    Raises:
        GrowthError: one that is no number, is not whole, or is out of range; the message names the key.
    """
    for key, most in _MOST.items():
        value = config.get(key)
        if key in _OPTIONAL and (key not in config or (value is None and key == "num_key_value_heads")):
            continue
        if type(value) is not int or value < 1:
            raise GrowthError(f"{key} is {value!r}, not a positive whole number", where=_WHERE)
        if value > most:
            raise GrowthError(f"{key} is absurd: {value}", where=_WHERE, why=f"phigrow takes at most {most}")
    for key, (least, most_of) in _RANGES.items():
        if key in config and not (is_number(config[key]) and least <= config[key] <= most_of):
            raise GrowthError(f"{key} is {config[key]!r}, not a number in {least:g} .. {most_of:g}", where=_WHERE)
    for key in _FLAGS:
        if key in config and not isinstance(config[key], bool):
            raise GrowthError(f"{key} is {config[key]!r}, not true or false", where=_WHERE)


def _sizes(config: Config) -> Sizes:
    config = normalised(config)
    _check_values(config)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv = config.get("num_key_value_heads") or heads
    for whole, parts, what in ((hidden, heads, "hidden_size"), (heads, kv, "num_attention_heads")):
        if whole % parts:
            by = "num_attention_heads" if what == "hidden_size" else "num_key_value_heads"
            raise GrowthError(
                f"heads do not divide: {what} {whole} is no multiple of {by} {parts}",
                where=_WHERE,
                why="PhiForCausalLM gives every head hidden_size / num_attention_heads coordinates",
                fix=f"choose a {what} that is a multiple of {parts}",
            )
    head = hidden // heads
    if "head_dim" in config and (type(config["head_dim"]) is not int or config["head_dim"] != head):
        raise GrowthError(
            f"head_dim is {config['head_dim']!r}, not hidden_size / num_attention_heads = {head}",
            where=_WHERE,
            fix="leave head_dim out",
        )
    layers, mlp, vocab = config["num_hidden_layers"], config["intermediate_size"], config["vocab_size"]
    if (parameters := layers * hidden * (4 * hidden + 2 * mlp) + 2 * vocab * hidden) > _MOST_PARAMETERS:
        raise GrowthError(
            f"the sizes are absurd: {parameters:.3g} parameters",
            where=_WHERE,
            why=f"phigrow takes at most {_MOST_PARAMETERS:.0e}",
        )
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
    former_model_types=("phi-msft", "mixformer-sequential"),
    former_tensors=(".mixer.Wqkv.weight", ".wte.weight"),
    former_advice="use the repository's current revision (microsoft/phi-1, phi-1_5 and phi-2 hold PhiForCausalLM now: "
    "leave --revision out, or download it again); a model made from the old upload must be renamed first: the rows of "
    "mixer.Wqkv are those of q_proj, k_proj and v_proj, one after the other, mixer.out_proj is dense",
)
