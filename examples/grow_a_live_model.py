"""Grow a model that is already in memory, and see that it computes the same function.

Run: python examples/grow_a_live_model.py
"""

import torch
from transformers import PhiConfig, PhiForCausalLM

import phigrow

small = PhiForCausalLM(
    PhiConfig(vocab_size=512, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
).eval()

# Wider, more heads, more layers; every ratio may be uneven, the rotary part of a head must stay.
wanted = small.config.to_dict() | {
    "hidden_size": 96,
    "intermediate_size": 400,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
}
large = phigrow.expand_model(small, wanted, method="lossless")

tokens = torch.arange(32)[None]
with torch.no_grad():
    difference = (small(tokens).logits - large(tokens).logits).abs().max()
print(f"{small.num_parameters():,} -> {large.num_parameters():,} parameters, max |dlogit| {difference:.1e}")
