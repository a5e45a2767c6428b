"""Tiny models for contract tests: random sizes of any family, and every parameter random."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from phigrow.growth.plan import Plan
from phigrow.models.config import Config
from phigrow.models.family import Family

if TYPE_CHECKING:
    import torch


def random_pair(family: Family, rng: random.Random, *, whole: bool = False, **flags: Any) -> tuple[Config, Config]:
    """Configurations of any family, the second larger on every axis that its architecture lets one choose freely.

    Heads keep their coordinates half of the time (an architecture whose whole head turns can grow them by no exact
    method).

    Args:
        family: the family.
        rng: decides the sizes.
        whole: double hidden by doubling the key/value heads, and keep everything that is not a whole factor.
        flags: keys of both configurations.
    """
    rotary = rng.choice([2, 4, 8])
    head = rotary + rng.randrange(0, 10)
    head += head % 2
    src = {
        "kv": rng.randrange(1, 4), "group": rng.choice([1, 1, 2]), "q": head, "rotary": rotary,
        "mlp": rng.randrange(5, 50), "layer": rng.randrange(1, 4), "vocab": rng.randrange(20, 60),
    }  # fmt: skip
    src["hidden"] = src["kv"] * src["group"] * head + rng.choice([0, 12])
    if whole:
        dst = {**src, "kv": 2 * src["kv"], "hidden": 2 * src["hidden"]}
    else:
        dst = {axis: size + rng.randrange(0, 4) for axis, size in src.items()}
        dst |= {"q": head + rng.choice([0, 0, 2, 4]), "rotary": rotary, "vocab": src["vocab"]}
        dst["group"] = src["group"] + rng.randrange(0, 2)
        dst["mlp"] = src["mlp"] + rng.randrange(0, 40)
        dst["hidden"] = src["hidden"] + rng.randrange(0, 60)
    settings = {"initializer_range": 0.02, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None}
    old, new = ({**family.config_of(sizes), **settings, **flags} for sizes in (src, dst))
    return old, new


def model_of(config: Config, dtype: torch.dtype | None = None, seed: int = 0) -> Any:
    """Build transformers' model of a configuration, in evaluation mode, with every parameter random.

    Args:
        config: the configuration.
        dtype: of the parameters, and of the arithmetic of its RMSNorms; by default float64.
        seed: of the values.
    """
    import torch

    model = _built(config).to(dtype or torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.15
            parameter.copy_(values + (1 if parameter.ndim == 1 and name.endswith("weight") else 0))
    return _for_comparison(model)


def hf_config_of(config: Config) -> Any:
    """A configuration object; version 4 of transformers, which ignores rope_parameters, gets phigrow's spelling."""
    from transformers import AutoConfig

    from phigrow.checkpoints.configuration import resolve_config
    from phigrow.models.versions import reads_rope_parameters

    if not reads_rope_parameters() and (config.get("rope_parameters") or config.get("rope_scaling")):
        return resolve_config(config, "the configuration").hf_config
    settings = {key: value for key, value in config.items() if key not in ("torch_dtype", "dtype", "architectures")}
    return AutoConfig.for_model(**settings)


def _built(config: Config) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        hf_config_of(config), attn_implementation="sdpa"
    )


def _for_comparison(model: Any) -> Any:
    from phigrow.expansion.logits import widen_norms

    widen_norms(model)
    return model.eval()


def grown_model(plan: Plan, model: Any) -> Any:
    """Grow a live model by a plan, tensor by tensor as `phigrow.expand` does.

    Args:
        plan: the plan.
        model: the source's model, of float64.

    Returns:
        The destination's model, in evaluation mode.
    """
    import torch

    from phigrow.growth.lift import InMemory, lift

    family = plan.table
    sources = {family.stored_name(name): InMemory(tensor.detach()) for name, tensor in model.state_dict().items()}
    new = _built(plan.dst_config).to(torch.float64)
    names = set(new.state_dict())
    grown = {family.name_among(r.name, names): lift(r, sources, torch.float64) for r in plan.recipes()}
    if family.ties(plan.dst_config):
        head, embedding = (family.name_among(str(n), names) for n in (family.head_matrix, family.embedding))
        grown[head] = grown[embedding]
    new.load_state_dict(grown, strict=True)
    return _for_comparison(new)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits [rows, length, vocab] of a model, without gradients."""
    import torch

    with torch.no_grad():
        values: torch.Tensor = model(ids, use_cache=False).logits
    return values


def probe(vocab: int, rows: int = 2, length: int = 24) -> torch.Tensor:
    """Return random token ids [rows, length]."""
    import torch

    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(1))
