"""Figures of docs/stages.md on grown optimizer state: moments that `scale` grows, against gradients of the grown model.

``python tests/state_table.py --write`` writes the table into the page. Nothing is subtracted from either side: every
value whose moment comes from the source is compared with the moment of the gradients that the grown model has there.
Moments are plain averages over `BATCHES` batches at fixed weights.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_models import model_of, probe

import phigrow
from phigrow.expansion.logits import widen_norms
from phigrow.growth.lift import InMemory, lift
from phigrow.growth.moments import POWER, moment_recipe, moment_source
from phigrow.models.families import all_families

PAGE = Path(__file__).parents[1] / "docs" / "stages.md"
START, END = "<!-- state table: written by tests/state_table.py -->\n", "<!-- end of the state table -->\n"
EXACT = 1e-10
BATCHES = 4
HIDDEN, WIDE = 32, 128
FAMILIES = all_families()
LAYER_NORM, RMS_NORM = ("phi", "gpt_neox"), ("llama", "qwen2")
ROWS: list[tuple[str, str, dict[str, Any], bool, tuple[tuple[str, ...], ...]]] = [
    ("lossless", "lossless", {}, False, (("phi",), ("gpt_neox",), RMS_NORM)),
    ("lemon", "lemon", {}, False, (("phi",), ("gpt_neox",), RMS_NORM)),
    ("gesmundo", "gesmundo", {}, False, (RMS_NORM,)),
    ("isometric", "isometric", {}, False, (("phi",), ("gpt_neox",), RMS_NORM)),
    ("tile, scale=preserve, noise=0.3", "tile", {"scale": "preserve", "noise": 0.3}, True, (LAYER_NORM, RMS_NORM)),
    ("hypercloning, snr=none", "hypercloning", {"snr": "none"}, True, (LAYER_NORM, RMS_NORM)),
    ("hypercloning, snr=10", "hypercloning", {}, True, (LAYER_NORM, RMS_NORM)),
]
"""Label, method, options, True at whole factors, and the families of each row."""
NAMES = {"phi": "Phi", "gpt_neox": "GPT-NeoX", "llama": "Llama", "qwen2": "Qwen2"}


@dataclass
class Figures:
    """Measurements of one growth.

    Attributes:
        errors: moment -> line of the family table -> largest relative error of a tensor, in the norm of its values from
            the source; of second moments, that of their roots.
        zero: line -> largest share of a tensor's exp_avg, in the norm, in values whose moments start at zero.
    """

    errors: dict[str, dict[str, float]] = field(default_factory=lambda: {moment: {} for moment in POWER})
    zero: dict[str, float] = field(default_factory=dict)


def sizes(family: str, hidden: int, mlp: int, head: int = 8) -> dict[str, Any]:
    rotary = head if family in RMS_NORM else head // 2
    axes = {"kv": hidden // head, "group": 1, "q": head, "rotary": rotary, "mlp": mlp, "layer": 2, "vocab": 61}
    settings = {"initializer_range": 0.02, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None}
    return {**FAMILIES[family].config_of(axes | {"hidden": hidden}), **settings}


Moments = dict[str, dict[str, np.ndarray]]


def moments_of(plan: phigrow.Plan, model: Any, batches: list[torch.Tensor]) -> Moments:
    """Moment -> name in checkpoints -> average over batches of the gradient, or of its square; float64."""
    names = {live: name for name, live in plan.table.live_names.items()}
    found: Moments = {moment: {} for moment in POWER}
    for ids in batches:
        model.zero_grad()
        logits = model(ids, use_cache=False).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        for live, parameter in model.named_parameters():
            for moment, power in POWER.items():
                name, value = names.get(live, live), parameter.grad.numpy() ** power / len(batches)
                found[moment][name] = found[moment].get(name, 0.0) + value
    return found


def measure(family: str, method: str, options: dict[str, Any], *, whole: bool, hidden: int = HIDDEN) -> Figures:
    """Grow a model of random weights, and compare both models' gradients on the same tokens."""
    src = sizes(family, hidden, 3 * hidden)
    dst = sizes(family, 2 * hidden if whole else hidden * 3 // 2, 6 * hidden if whole else 4 * hidden)
    return measure_pair(src, dst, method, options)


def measure_heads() -> Figures:
    """Grow the heads of a Phi that normalises inside them."""
    src, dst = (sizes("phi", heads * 4, 3 * HIDDEN, head=heads) | {"qk_layernorm": True} for heads in (8, 16))
    return measure_pair(src, dst, "lossless", {})


def measure_pair(src: dict[str, Any], dst: dict[str, Any], method: str, options: dict[str, Any]) -> Figures:
    """As `measure`, for any configurations."""
    plan = phigrow.plan(src, dst, method, depth="identity", **options)
    assert plan.exact, plan.approximations
    model = model_of(src)
    grown = phigrow.expand_model(model, dst, method=method, depth="identity", **options)
    widen_norms(grown)
    batches = list(probe(src["vocab_size"], rows=2 * BATCHES, length=16).split(2))
    names = {live: name for name, live in plan.table.live_names.items()}
    weights = {names.get(name, name): p.detach() for name, p in model.named_parameters()}
    return compare(plan, weights, moments_of(plan, model, batches), moments_of(plan, grown, batches))


def compare(plan: phigrow.Plan, weights: dict[str, torch.Tensor], source: Moments, grown: Moments) -> Figures:
    """Compare moments that the library grows with those that the grown model's gradients have."""
    figures = Figures()
    for recipe in plan.recipes():
        for moment, power in POWER.items():
            how, want = moment_recipe(recipe, plan, moment), grown[moment][recipe.name] ** (1 / power)
            if how is None:
                continue

            def read(name: str, kind: str, moment: str = moment) -> InMemory:
                return InMemory(weights[name] if kind == "fp32" else torch.from_numpy(source[moment][name]))

            made = lift(how, {recipe.source: moment_source(recipe, moment, read)}, torch.float64).numpy() ** (1 / power)
            if power == 1:
                first = made
            elif how.is_dense:  # as `phigrow grow-optimizer` does
                made = np.maximum(made, np.abs(first))
            legs = [np.full(leg.dst_size, True) if leg.dense is not None else leg.is_copy for leg in how.legs]
            kept = np.logical_and.outer(*legs) if len(legs) == 2 else legs[0]
            errors, line = figures.errors[moment], recipe.line
            off = float(np.linalg.norm((made - want)[kept]) / np.linalg.norm(want[kept]))
            errors[line] = max(off, errors.get(line, 0.0))
            if power == 1:
                left = float(np.linalg.norm(want[~kept]) / np.linalg.norm(want))
                figures.zero[line] = max(left, figures.zero.get(line, 0.0))
    return figures


def row(label: str, families: tuple[str, ...], figures: list[Figures]) -> str:
    cells = [label, ", ".join(NAMES[family] for family in families)]
    for moment in POWER:
        off = [error for each in figures for error in each.errors[moment].values()]
        exact = sum(error <= EXACT for error in off)
        cells.append("exact" if exact == len(off) else f"{percent(max(off))} ({exact} of {len(off)})")
    cells.append(percent(max(share for each in figures for share in each.zero.values())))
    return f"| {' | '.join(cells)} |"


def percent(value: float) -> str:
    return "0" if value <= EXACT else f"{100 * value:.2g} %"


HEAD = """| method | families | error of `exp_avg` | error of the root of `exp_avg_sq` | left at zero |
|---|---|--:|--:|--:|
"""


def table() -> str:
    """The table of the page."""
    lines = [
        row(label, families, [measure(family, method, options, whole=whole) for family in families])
        for label, method, options, whole, groups in ROWS
        for families in groups
    ]
    wide = row(f"lossless, hidden {WIDE}", ("phi",), [measure("phi", "lossless", {}, whole=False, hidden=WIDE)])
    heads = row("lossless, heads of 16 with qk_layernorm", ("phi",), [measure_heads()])
    return HEAD + "\n".join([*lines, heads, wide]) + "\n"


def written(page: str) -> str:
    """The table that the page holds."""
    return page.split(START)[1].split(END)[0]


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    now = table()
    if "--write" in sys.argv:
        PAGE.write_text(page.replace(written(page), now), encoding="utf-8")
    sys.stdout.write(now)


if __name__ == "__main__":
    main()
