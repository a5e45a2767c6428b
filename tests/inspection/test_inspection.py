"""Every value is what the inspection says, held against lifted values of tiny models; and what `inspect` prints."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from tiny_models import phi_config, phi_model, random_growth

import phigrow
from phigrow.errors import GrowthError
from phigrow.growth.axes import wrap
from phigrow.growth.draws import LEVELS
from phigrow.growth.lift import InMemory, lift
from phigrow.growth.origins import (
    Kind,
    anatomy,
    combine,
    first_copies,
    matching,
    named,
    span_lines,
)
from phigrow.inspection.tallies import by_line, percent, shares, totals
from phigrow.models.config import load_config

GROWTHS = [
    {"method": "wr"},
    {"method": "wr", "anchor": "center"},
    {"method": "tile"},
    {"method": "tile", "anchor": "center", "scale": "rms"},
    {"method": "tile", "scale": "preserve"},
    {"method": "tile", "scale": "preserve", "anchor": "center", "depth": "identity"},
    {"method": "lossless"},
]
MIXED = {"method": "isometric"}
COPIES = (Kind.COPIED, Kind.TILED, Kind.SCALED, Kind.TILED_SCALED)


def disagreements(found, source, grown):
    """How many values are not what their kind says; ``source`` and ``grown`` are float64 arrays."""
    kinds, gains = found.kinds(), found.gains()
    held = [np.maximum(side.whole.source, 0) for side in found.sides]
    copied = source[np.ix_(*held)]
    wrong = 0
    for kind in COPIES:
        expected = copied if kind in (Kind.COPIED, Kind.TILED) else copied * gains
        # Two gains are multiplied one after the other, which rounds once more; without a gain nothing may.
        tolerance = 0 if kind in (Kind.COPIED, Kind.TILED) else 1e-15 * np.abs(expected)
        wrong += int((np.abs(grown - expected) > tolerance)[kinds == kind].sum())
    wrong += int((grown != 0)[kinds == Kind.ZERO].sum())
    wrong += int((grown != gains)[kinds == Kind.CONSTANT].sum())
    mixed = grown[kinds == Kind.MIXED]  # which mixture it is, tests/growth/test_isometric.py says
    wrong += int(np.isin(mixed, source).sum()) + len(mixed) - len(np.unique(mixed))
    fresh = grown[kinds == Kind.FRESH]
    wrong += int(np.isin(fresh, source).sum()) + int((fresh == 0).sum())
    independent = LEVELS * (1 - (1 - 1 / LEVELS) ** len(fresh))  # values that so many independent draws give
    wrong += len(np.unique(fresh)) < 0.97 * independent
    for place, side in enumerate(found.sides):
        means = np.flatnonzero(side.whole.kinds == Kind.MEAN)
        others = [h if k != place else slice(None) for k, h in enumerate(held)]
        mean = source.mean(axis=place) if len(held) == 1 else source.mean(axis=place)[others[1 - place]]
        parts = found.recipe.legs[place].part_means  # means over one head each
        for at in means:
            here = np.take(grown, at, axis=place)
            mine = np.take(kinds, at, axis=place) == Kind.MEAN
            if parts is not None:
                inside = np.arange(parts.start[at], parts.start[at] + parts.size)
                mean = np.take(source, inside, axis=place).mean(axis=place)
                mean = mean if len(held) == 1 else mean[others[1 - place]]
            expected = mean * np.take(gains, at, axis=place)
            wrong += int((np.abs(here - expected) > 1e-14)[mine].sum())
    return wrong


def growths(seed, count=4, methods=GROWTHS):
    rng = random.Random(seed)
    for _ in range(count):
        src, dst = random_growth(rng)
        state = {name: tensor.detach() for name, tensor in phi_model(src).state_dict().items()}
        for arguments in methods:
            yield phigrow.plan(src, dst, seed=rng.randrange(99), **arguments), state


def test_every_value_is_what_its_kind_says():
    seen = dict.fromkeys(Kind, 0)
    for plan, state in growths(0, methods=[*GROWTHS, MIXED]):
        sources = {name: InMemory(tensor) for name, tensor in state.items()}
        for recipe in plan.recipes():
            found = anatomy(recipe)
            source = state[recipe.source]
            grown = lift(recipe, sources, torch.float64).numpy()
            assert found.kinds().shape == grown.shape
            assert disagreements(found, source.numpy(), grown) == 0, (plan.method, plan.options, recipe.name)
            for kind, count in found.counts.items():
                assert count == int((found.kinds() == kind).sum())
                seen[kind] += count
    assert all(seen.values()), seen  # every kind has been held against values


@pytest.mark.parametrize("switch", ["qk_layernorm", "tie_word_embeddings"])
@pytest.mark.parametrize("arguments", GROWTHS)
def test_tied_embeddings_and_norms_inside_heads_too(switch, arguments):
    src, dst = phi_config(32, 4, 48, 2, 4, **{switch: True}), phi_config(72, 6, 70, 3, 4, vocab=70, **{switch: True})
    plan = phigrow.plan(src, dst, **arguments)
    state = {name: tensor.detach() for name, tensor in phi_model(src).state_dict().items()}
    for recipe in plan.recipes():
        source = state[recipe.source]
        grown = lift(recipe, {recipe.source: InMemory(source)}, torch.float64).numpy()
        assert disagreements(anatomy(recipe), source.numpy(), grown) == 0, recipe.name


def test_a_wrong_kind_is_noticed():
    # Negative control: move every kind by one coordinate, and change one value under the right kinds.
    noticed = 0
    for plan, state in growths(1, count=1):
        recipe = next(r for r in plan.recipes() if r.name.endswith("0.self_attn.q_proj.weight"))
        found = anatomy(recipe)
        source = state[recipe.source]
        grown = lift(recipe, {recipe.source: InMemory(source)}, torch.float64).numpy().copy()
        rows = found.sides[0]
        shifted = dataclasses.replace(
            rows.whole, kinds=np.roll(rows.whole.kinds, 1), source=np.roll(rows.whole.source, 1)
        )
        wrong = dataclasses.replace(found, sides=(dataclasses.replace(rows, whole=shifted), found.sides[1]))
        assert disagreements(wrong, source.numpy(), grown) > 0
        grown[tuple(np.argwhere(np.isin(found.kinds(), COPIES))[0])] += 1e-9
        noticed += disagreements(found, source.numpy(), grown)
    assert noticed == len(GROWTHS)


def test_every_source_value_has_one_first_copy_in_a_matrix_that_keeps_it():
    for plan, _ in growths(2, count=3):
        for recipe in plan.recipes():
            found = anatomy(recipe)
            first = found.counts[Kind.COPIED] + found.counts[Kind.SCALED]
            assert first == (0 if recipe.is_zero else int(np.prod(recipe.source_shape))), recipe.name


def test_bfloat16_copies_are_bit_for_bit():
    plan = phigrow.plan(phi_config(32, 4, 48, 2, 4), phi_config(72, 6, 70, 3, 4), "tile", scale="preserve")
    state = phi_model(dict(plan.src_config), torch.bfloat16).state_dict()
    for recipe in plan.recipes():
        found = anatomy(recipe)
        grown = lift(recipe, {recipe.source: InMemory(state[recipe.source])}, torch.bfloat16)
        copied = state[recipe.source][np.ix_(*(side.whole.source for side in found.sides))]
        unscaled = torch.from_numpy(np.isin(found.kinds(), (Kind.COPIED, Kind.TILED)))
        assert torch.equal(grown[unscaled], copied[unscaled])


def test_noise_is_said_where_it_is_and_only_there():
    plan = phigrow.plan(phi_config(32, 4, 48, 2, 4), phi_config(64, 4, 96, 2, 4), "tile", scale="preserve", noise=0.3)
    quiet = dataclasses.replace(plan, noise=0.0)
    state = phi_model(dict(plan.src_config)).state_dict()
    noisy = 0
    for recipe, without_noise in zip(plan.recipes(), quiet.recipes(), strict=True):
        tensors = {recipe.source: InMemory(state[recipe.source])}
        with_noise, without = (lift(each, tensors, torch.float64) for each in (recipe, without_noise))
        assert bool(anatomy(recipe).noise) == (not torch.equal(with_noise, without)), recipe.name
        noisy += anatomy(recipe).noise == 0.3
    assert noisy > 0


def test_kinds_combine_as_lift_does():
    for one in Kind:
        for other in Kind:
            assert combine(one, other) == combine(other, one)
    assert combine(Kind.ZERO, Kind.FRESH) == Kind.ZERO  # a zero leg wins over a random one
    assert combine(Kind.FRESH, Kind.SCALED) == Kind.FRESH
    assert combine(Kind.MEAN, Kind.TILED) == Kind.MEAN
    assert combine(Kind.TILED, Kind.SCALED) == Kind.TILED_SCALED
    assert combine(Kind.MIXED, Kind.TILED) == combine(Kind.MIXED, Kind.MEAN) == Kind.MIXED
    assert combine(Kind.MIXED, Kind.FRESH) == Kind.FRESH  # a new head reads a mixed stream with new values


def test_the_first_copy_is_the_unbroken_one():
    assert first_copies(wrap(3, 5, "center")).tolist() == [False, True, True, True, False]
    assert first_copies(wrap(3, 7)).tolist() == [True] * 3 + [False] * 4


def test_counts_of_the_first_growth_of_the_project():
    plan = phigrow.plan("phi-1_5", "phi2.json", "lossless")
    lines = by_line(plan)
    assert sum(totals(lines).values()) == plan.cost()[1].parameters == 2_779_683_840
    q = named(lines["model.layers.{layer}.self_attn.q_proj.weight"])
    # 32 layers, 32 heads of 64 rows, 2048 columns, scaled by sqrt(80 / 64); everything else new.
    assert q["scaled"] == 32 * 32 * 64 * 2048
    assert q["fresh"] == 32 * 2560 * 2560 - q["scaled"]
    dense = named(lines["model.layers.{layer}.self_attn.dense.weight"])
    assert dense["zero"] == 8 * 2560 * 2560 + 24 * 2560 * 32 * 16  # identity layers; new coordinates of heads
    assert dense["mean"] == 24 * 512 * 32 * 64
    wr = by_line(phigrow.plan("phi-1_5", "phi2.json", "wr"))
    assert named(wr["model.embed_tokens.weight"])["copied"] == 51200 * 2048
    assert named(wr["model.final_layernorm.weight"])["constant"] == 512


def test_spans_in_words():
    plan = phigrow.plan("phi-1_5", "phi2.json", "tile", scale="preserve")
    (q,) = matching(plan, "model.layers.0.self_attn.q_proj.weight")
    assert span_lines(q) == [
        "rows heads: kv 0..31 <- 0..31",
        "rows heads: group 0 <- 0",
        "rows head: q 0..31 <- 0..31 x1.118",
        "rows head: q 32..47 <- 32..47 x0.559",
        "rows head: q 48..63 <- 48..63 x1.118",
        "rows head: q 64..79 <- 32..47 x0.559",
        "columns hidden: normed 0..511 <- 0..511 x0.5",
        "columns hidden: normed 512..2047 <- 512..2047",
        "columns hidden: normed 2048..2559 <- 0..511 x0.5",
    ]
    assert span_lines(q, most=1)[3] == "rows head: q and 3 more spans (all of them with --json)"
    lossless = phigrow.plan("phi-1_5", "phi2.json", "lossless")
    (fc2,) = matching(lossless, "model.layers.0.mlp.fc2.weight")
    assert span_lines(fc2) == [
        "rows hidden 0..2047 <- 0..2047 x1.118",
        "rows hidden 2048..2559 <- mean x1.118",
        "columns mlp 0..8191 <- 0..8191",
        "columns mlp 8192..10239 zero",
    ]
    assert dict(shares(fc2.counts)) == {"scaled": "64.0 %", "mean": "16.0 %", "zero": "20.0 %"}
    (norm,) = matching(lossless, "model.final_layernorm.weight")
    assert span_lines(norm) == [
        "values hidden: final 0..2047 <- 0..2047 x0.8944",
        "values hidden: final 2048..2559 constant 1",
    ]


def test_json_says_the_same():
    plan = phigrow.plan("phi-1_5", "phi2.json", "wr")
    (dense,) = matching(plan, "model.layers.4.self_attn.dense.weight")
    said = dense.to_json()
    assert (said["source"], said["shape"], said["source_shape"]) == (
        "model.layers.3.self_attn.dense.weight",
        [2560, 2560],
        [2048, 2048],
    )
    assert [axis["axis"] for axis in said["axes"]] == ["hidden", "(kv group v)"]
    assert [axis["leg"] for axis in said["axes"]] == ["write", "read"]
    assert said["axes"][1]["parts"][2]["spans"] == [
        {"start": 0, "stop": 64, "source": 0, "kind": "copied", "gain": 1.0},
        {"start": 64, "stop": 80, "source": None, "kind": "fresh", "gain": 1.0},
    ]
    assert said["values"]["copied"] + said["values"]["fresh"] == 2560 * 2560


def test_patterns_and_their_refusal():
    plan = phigrow.plan("phi-1_5", load_config("phi2.json"), "wr")
    assert len(matching(plan, "model.layers.0.*")) == 14
    with pytest.raises(
        GrowthError, match=r"no tensor matches 'q_proj'\n  where: .*\n  why: .* has 453 tensors, from model.embed_"
    ):
        matching(plan, "q_proj")


def test_a_percent_is_never_rounded_to_nothing_or_everything():
    assert percent({Kind.COPIED: 1, Kind.FRESH: 99_999}, Kind.COPIED) == "<0.1 %"
    assert percent({Kind.COPIED: 1, Kind.FRESH: 99_999}, Kind.FRESH) == ">99.9 %"
    assert percent({Kind.COPIED: 1, Kind.FRESH: 3}, Kind.COPIED) == "25.0 %"
    assert percent({Kind.COPIED: 3, Kind.FRESH: 0}, Kind.COPIED) == "100 %"
