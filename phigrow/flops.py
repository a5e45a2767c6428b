"""Parameters and floating-point operations of a Phi, counted from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

from phigrow.config import Config


@dataclass(frozen=True)
class Cost:
    """What a model costs. FLOPs are per token, one multiply-add counted as two."""

    parameters: int
    non_embedding_parameters: int
    forward_flops: float
    training_flops: float


def count(config: Config, seq_len: int | None = None) -> Cost:
    """Count parameters and FLOPs per token of a Phi at a context of ``seq_len`` tokens.

    Forward, per token: ``2 * (weights of all linear layers, lm_head included)`` plus attention's two products with
    the whole context, ``2 * 2 * layers * heads * head_dim * seq_len`` (not halved for causality, as in PaLM,
    appendix B, and as ``torch.utils.flop_counter`` counts). The embedding look-up, biases, LayerNorm, softmax and
    activations are left out. Training is three times forward: the backward pass makes two products for each one.

    Args:
        config: a Hugging Face configuration, as a dictionary.
        seq_len: tokens in context; by default ``max_position_embeddings``.

    Returns:
        The cost; ``non_embedding_parameters`` leaves out ``embed_tokens`` and ``lm_head``.

    >>> from phigrow.config import load_config
    >>> count(load_config("phi2.json")).parameters
    2779683840
    """
    hidden, mlp, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    vocab, heads = config["vocab_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = hidden // heads
    seq_len = seq_len or config.get("max_position_embeddings", 2048)
    attention, kv = heads * head_dim, kv_heads * head_dim
    layer_matrices = hidden * attention * 2 + hidden * kv * 2 + hidden * mlp * 2
    layer_vectors = 2 * hidden + attention + 2 * kv + hidden + mlp + hidden
    if config.get("qk_layernorm"):
        layer_vectors += 4 * head_dim
    body = layers * (layer_matrices + layer_vectors) + 2 * hidden
    tied = bool(config.get("tie_word_embeddings"))
    forward = 2.0 * (layers * layer_matrices + vocab * hidden) + 4.0 * layers * attention * seq_len
    return Cost(
        parameters=body + vocab * hidden * (1 if tied else 2) + vocab,
        non_embedding_parameters=body,
        forward_flops=forward,
        training_flops=3 * forward,
    )
