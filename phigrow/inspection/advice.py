"""Advice of the literature and of our study about a plan, each with its source. It is no part of the plan.

| topic | given where | source |
|---|---|---|
| growth | parameters or hidden more than double | 2605.13405: gains are most reliable up to 2x |
| tokens | the budget has more than 20 tokens a destination parameter | 2605.13405; gains vanish, 2307.06440 |
| dropout | an exact plan, into a configuration with dropout | equality holds in evaluation mode |
| copies | coordinates with equal legs, and no noise | 2409.12903, 1511.05641: they get equal gradients for ever |
| dtype | float16, and a stream or queries written with a gain above 1 | the largest float16 is 65504 |
| timing | a budget is given and layers grow | 2405.15319: how long to train the source |
| method | tile without noise | our study (docs/findings.md): wr learned faster at both sizes |
| rate | there are values that are no copies | our study: a rate of their own helped most |
| llama.cpp | a Phi whose mlp, rotary base or key/value heads are not those of phi-2 | the code of its converter |
| continued | under half a token a parameter, growth up to 3.6x | our study: training the source on cost fewer FLOPs |
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from phigrow.growth.axes import AxisMap
from phigrow.growth.axis_groups import group_of
from phigrow.growth.plan import Plan
from phigrow.models.config import normalised

MOST_GROWTH = 2.0
MOST_TOKENS = 20.0
"""Tokens a destination parameter."""

RELIABLE = "2605.13405"
NO_GAIN = "No Train No Gain, 2307.06440"
COPIES = "Net2Net, 1511.05641; HyperCloning, 2409.12903"
G_STACK = "G_stack, 2405.15319"
FLOAT16 = "IEEE 754, binary16"
CONVERTER = "llama.cpp, convert_hf_to_gguf.py: PhiForCausalLM"
CONVERTER_THETA = 10000.0
"""Rotary base of a Phi in llama.cpp: its converter writes none, and this is the default."""
STUDY = "our study, docs/findings.md: Phis of 3M parameters, 3 seeds"
FEW_TOKENS = 0.5
"""Tokens a destination parameter, about where the study's runs end (0.36 and 0.39)."""
STUDIED_GROWTH = 3.7
"""Parameters grew 1.8x and 3.6x in the study."""


@dataclass(frozen=True)
class Advice:
    """One piece of advice: its topic, one sentence, and its source."""

    topic: str
    text: str
    source: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.text} ({self.source})"


def advice(plan: Plan, *, tokens: float | None = None, dtype: str | None = None) -> list[Advice]:
    """Return advice about known problems of such a plan; empty if there are none.

    Args:
        plan: the plan.
        tokens: training tokens of the grown model, where they are known.
        dtype: of the output; by default the destination configuration's.

    >>> [each.topic for each in advice(phigrow.plan("phi-1_5", "phi2.json", "tile"), tokens=1e12)]  # doctest: +SKIP
    ['tokens', 'copies', 'timing', 'method']
    """
    dtype = dtype or plan.dst_config.get("dtype") or plan.dst_config.get("torch_dtype")
    return [*_growth(plan), *_tokens(plan, tokens), *_dropout(plan), *_copies(plan), *_dtype(plan, dtype),
            *_timing(plan, tokens), *_llama_cpp(plan), *_study(plan, tokens)]  # fmt: skip


def growth_timing(parameters: float, tokens: float) -> float:
    """Return the tokens on which G_stack would train the source before it grows.

    ``log10(d) = 0.88 log10(N) + 163.27 / log10(C) - 5.74``, N parameters of the grown model, C = 6 N D FLOPs of its
    training from scratch on D tokens; fitted for stacking, at a best factor of 4 in depth (2405.15319; the
    coefficients and a table of examples are in the authors' repository).

    >>> round(growth_timing(8e9, 15e12) / 1e9, 2)  # Llama 3 8B; 6.58B in the table
    6.59
    """
    compute = 6 * parameters * tokens
    return float(10 ** (0.88 * math.log10(parameters) + 163.27 / math.log10(compute) - 5.74))


def _growth(plan: Plan) -> Iterator[Advice]:
    old, new = (cost.parameters for cost in plan.cost())
    src, dst = plan.src_sizes[plan.table.residual], plan.dst_sizes[plan.table.residual]
    beyond = [
        f"{what} {ratio:.3g}x"
        for what, ratio in (("parameters grow", new / old), ("hidden grows", dst / src))
        if ratio > MOST_GROWTH
    ]
    if beyond:
        text = f"grow in stages: {' and '.join(beyond)}, and gains are most reliable up to {MOST_GROWTH:g}x"
        yield Advice("growth", text, RELIABLE)


def _tokens(plan: Plan, tokens: float | None) -> Iterator[Advice]:
    parameters = plan.cost()[1].parameters
    if tokens is not None and tokens > MOST_TOKENS * parameters:
        yield Advice(
            "tokens",
            f"compare your decayed run with one from scratch: the budget is {tokens / parameters:.3g} tokens per "
            f"parameter; gains are most reliable below about {MOST_TOKENS:g} and shrink with the budget",
            f"{RELIABLE}; {NO_GAIN}",
        )


def _dropout(plan: Plan) -> Iterator[Advice]:
    keys = [key for key in plan.table.dropout_keys if plan.dst_config.get(key)]
    if keys and plan.exact:
        values = ", ".join(f"{plan.dst_config[key]:g}" for key in keys)
        text = (
            f"set {', '.join(keys)} (now {values}) to 0 in the destination: "
            "with dropout, training does not start at the source's loss"
        )
        yield Advice("dropout", text, "phigrow verify measures in evaluation mode")


def _copies(plan: Plan) -> Iterator[Advice]:
    family = plan.table
    alike = [
        axis
        for axis in (family.residual, *family.heads, family.mlp)
        if not plan.noise and not (plan.maps and plan.maps.sha256) and _equal_copies(plan.axes[axis])
    ]
    if alike:
        if all(part.split(":")[0].rpartition("=")[2] == "tile" for part in plan.method.split(",")):
            instead = "add --noise (with --scale preserve, it does not change the function)"
        elif "snr" in plan.options:
            instead = "set snr=10"
        else:
            instead = "use a method that breaks the symmetry of copies, such as lemon, lossless or isometric"
        names = ", ".join(dict.fromkeys(group_of(family, axis) for axis in alike))
        text = f"{instead}: now, copies of {names} get equal gradients for ever and act as one unit"
        yield Advice("copies", text, COPIES)


def _equal_copies(axis: AxisMap) -> bool:
    """Two coordinates copy one source coordinate of one layer with the same gains on both legs."""
    from_next = np.zeros(axis.dst_size) if axis.from_next_layer is None else axis.from_next_layer
    legs = np.stack([axis.source, axis.write, axis.read, from_next])[:, axis.is_copy]
    return bool(legs.shape[1] > len(np.unique(legs, axis=1).T))


def _dtype(plan: Plan, dtype: str | None) -> Iterator[Advice]:
    if dtype != "float16":
        return
    family = plan.table
    gains = {name: float(plan.axes[name].write.max()) for name in (family.residual, family.query)}
    above = [f"{name} {gain:.4g}x" for name, gain in gains.items() if gain > 1]
    if above:
        text = f"store and train in bfloat16: activations grow ({', '.join(above)}), and the largest float16 is 65504"
        yield Advice("dtype", text, FLOAT16)


def _timing(plan: Plan, tokens: float | None) -> Iterator[Advice]:
    src, dst = plan.src_sizes["layer"], plan.dst_sizes["layer"]
    if tokens is None or src == dst:
        return
    timing = growth_timing(plan.cost()[1].parameters, tokens)
    text = f"for {tokens:.3g} tokens, stacking to 4x the layers did best with a source trained on {timing:.3g} tokens"
    yield Advice("timing", f"{text}; here layers grow {dst / src:.3g}x", G_STACK)


def _llama_cpp(plan: Plan) -> Iterator[Advice]:
    """Name the sizes that llama.cpp's converter does not read from the configuration of a Phi."""
    if plan.table.model_type != "phi":
        return
    family, sizes = plan.table, plan.dst_sizes
    mlp, theta = 4 * sizes[family.residual], float(normalised(plan.dst_config)["rope_theta"])
    heads = math.prod(sizes[axis] for axis in family.heads)
    assumed = [
        *([f"intermediate_size {mlp} (here {sizes[family.mlp]})"] if sizes[family.mlp] != mlp else []),
        *([f"rope_theta {CONVERTER_THETA:g} (here {theta:g})"] if theta != CONVERTER_THETA else []),
        *([f"num_key_value_heads {heads} (here {sizes[family.heads[0]]})"] if sizes[family.heads[0]] != heads else []),
    ]
    if assumed:
        text = f"if the model is to run in llama.cpp, choose other values: its converter assumes {', '.join(assumed)}"
        yield Advice("llama.cpp", text, CONVERTER)


def _study(plan: Plan, tokens: float | None) -> Iterator[Advice]:
    if plan.method.startswith("tile") and not plan.noise and plan.src_config != plan.dst_config:
        text = (
            "consider wr: at 1.8x the parameters, it reached tile's final loss with 1.09x [1.04, 1.14] fewer tokens; "
            "at 3.6x, it reached scratch's with 1.24x [1.23, 1.25] fewer tokens, and tile did not reach it"
        )
        yield Advice("method", text, STUDY)
    if any((axis.write_random | axis.read_random).any() for axis in plan.axes.values()):
        text = (
            "train fresh values at twice the learning rate (fresh_lr: 2): this lowered the final loss of wr and "
            "lossless by 0.02 to 0.07 nats, of lemon by 0.015"
        )
        yield Advice("rate", text, STUDY)
    old, new = (cost.parameters for cost in plan.cost())
    if tokens is not None and old < new <= STUDIED_GROWTH * old and tokens <= FEW_TOKENS * new:
        text = (
            f"consider training the source on without growth: the budget is {tokens / new:.2g} tokens per parameter; "
            "at 0.4, the source reached scratch's loss with 1.44x [1.27, 1.63] fewer FLOPs, charged (against 1.8x the "
            "parameters), and 2.25x [1.97, 2.58] (against 3.6x); growth saved less"
        )
        yield Advice("continued", text, STUDY)
