"""Tiny models of the real geometry: rotary part fixed, biases and LayerNorm random, hidden == heads * head_dim."""

from __future__ import annotations

import random
from typing import Any

import torch

from phigrow.testing.models import hf_config_of, logits, model_of, probe, random_pair

__all__ = ["hf_config_of", "logits", "model_of", "phi_config", "phi_model", "probe", "random_growth", "random_pair"]

Config = dict[str, Any]

torch.set_num_threads(1)  # tiny models gain nothing from threads, and lose much when another process wants the cores


def phi_config(
    hidden: int = 32,
    heads: int = 4,
    mlp: int = 48,
    layers: int = 2,
    rotary: int = 4,
    vocab: int = 61,
    **more: Any,
) -> Config:
    """A Phi configuration in the spelling of transformers 4."""
    return {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "partial_rotary_factor": rotary / (hidden // heads),
        "rope_theta": 10000.0,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "max_position_embeddings": 64,
        "qk_layernorm": False,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": None,
        **more,
    }


def phi_model(config: Config, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A model whose every parameter is random, biases and LayerNorm too: nothing is 0 or 1 by luck."""
    from transformers import PhiConfig, PhiForCausalLM

    settings = {key: value for key, value in config.items() if key not in ("torch_dtype", "dtype", "architectures")}
    model = PhiForCausalLM(PhiConfig(**settings)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.15
            parameter.copy_(values + (1 if "layernorm.weight" in name else 0))
    return model.eval()


def random_growth(rng: random.Random, *, whole: bool = False, gqa: bool = True) -> tuple[Config, Config]:
    """A random pair of configurations, the second larger; ``whole`` keeps the ratio of hidden a whole number."""
    while True:
        rotary = rng.choice([2, 4, 8])
        head = rotary + rng.randrange(0, 12)
        kv, group = rng.randrange(1, 4), rng.choice([1, 1, 2]) if gqa else 1
        new_kv, new_group = kv + rng.randrange(0, 4), group + (rng.randrange(0, 2) if gqa else 0)
        new_head = head + rng.randrange(0, 9)
        hidden, new_hidden = kv * group * head, new_kv * new_group * new_head
        if new_hidden > 160 or (whole and new_hidden % hidden) or (head == rotary and whole):
            continue
        mlp, layers, vocab = rng.randrange(5, 60), rng.randrange(1, 4), rng.randrange(20, 70)
        src = phi_config(hidden, kv * group, mlp, layers, rotary, vocab, num_key_value_heads=kv)
        dst = phi_config(
            new_hidden,
            new_kv * new_group,
            mlp + rng.randrange(0, 40),
            layers + rng.randrange(0, 4),
            rotary,
            vocab + (0 if whole else rng.randrange(0, 20)),
            num_key_value_heads=new_kv,
        )
        return src, dst
