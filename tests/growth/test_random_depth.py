"""Depth method `random`: copies in order, and layers as a model from scratch has them, under every width method."""

import random

import numpy as np
import pytest
import torch
from tiny_models import model_of, phi_config, random_pair

import phigrow
from phigrow.errors import GrowthError
from phigrow.expansion.provenance import copied_values
from phigrow.growth.lift import InMemory, lift
from phigrow.growth.moments import POWER, STATES, moment_recipe
from phigrow.growth.origins import Kind, anatomy
from phigrow.growth.plan import Plan
from phigrow.growth.registry import all_methods
from phigrow.inspection.explain import layer_rows
from phigrow.inspection.tallies import by_line, totals
from phigrow.models.families import all_families
from phigrow.training.per_value_lr import copied_mask

FAMILIES = all_families()
LEARNED = {name for name, method in all_methods().items() if method.learns}


def deeper(family, method, seed=3):
    """Configurations of 2 and 5 layers that the method takes, and its plan with random layers."""
    rng = random.Random(seed)
    while True:
        src, dst = random_pair(FAMILIES[family], rng, whole=True)
        src, dst = ({**config, "num_hidden_layers": layers} for config, layers in ((src, 2), (dst, 5)))
        src, dst = ({k: v for k, v in config.items() if k != "layer_types"} for config in (src, dst))
        try:
            return src, dst, phigrow.plan(src, dst, method, depth="random")
        except GrowthError:
            continue


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", sorted(set(all_methods()) - LEARNED))
def test_new_layers_are_as_at_initialisation_and_copies_as_under_another_depth_method(method, family):
    src, dst, plan = deeper(family, method)
    assert plan.layers == (0, -1, -1, 1, -1)
    assert not plan.exact
    assert "random adds 3 layers of new values, which change the function" in plan.approximations
    shapes = FAMILIES[family].state_shapes(src)
    sources = {name: InMemory(torch.rand(shape, dtype=torch.float64)) for name, shape in shapes.items()}
    grown, stacked = (
        {recipe.name: lift(recipe, sources, torch.float64) for recipe in each.recipes()}
        for each in (plan, phigrow.plan(src, dst, method, depth="stack"))
    )
    drawn = []
    for recipe in plan.recipes():
        value = grown[recipe.name]
        if recipe.layer is None or plan.layers[recipe.layer] >= 0:
            assert not recipe.is_new
            continue
        assert recipe.is_new
        assert not recipe.is_zero
        if value.ndim == 2:
            drawn.append(value.flatten())
            assert anatomy(recipe).counts[Kind.FRESH] == value.numel()
        else:
            norm = recipe.name.endswith("norm.weight")
            assert torch.equal(value, torch.full_like(value, 1.0 if norm else 0.0)), recipe.name
    values = torch.cat(drawn) / plan.initializer_range
    assert abs(float(values.mean())) < 5 / len(values) ** 0.5
    assert float(values.std()) == pytest.approx(1.0, abs=5 / (2 * len(values)) ** 0.5)
    # Layer 0 of both is source layer 0, whatever else the depth methods do.
    for name, value in grown.items():
        if ".layers.0." in name and not plan.noise:
            assert torch.equal(value, stacked[name]), name


def test_every_new_layer_has_values_of_its_own_that_depend_on_the_seed_alone():
    src, dst = phi_config(layers=1), phi_config(layers=4)
    model = model_of(src)
    grown, again = (
        phigrow.expand_model(model, dst, method="wr", depth="random", seed=7).state_dict() for _ in range(2)
    )
    other = phigrow.expand_model(model, dst, method="wr", depth="random", seed=8).state_dict()
    names = [f"model.layers.{k}.mlp.fc2.weight" for k in range(4)]
    assert all(torch.equal(grown[name], again[name]) for name in grown)
    assert [torch.equal(grown[name], other[name]) for name in names] == [True, False, False, False]
    assert not any(torch.equal(grown[a], grown[b]) for a in names for b in names if a < b)


@pytest.mark.parametrize("method", ["wr", "tile", "lossless", "isometric", "hypercloning"])
def test_training_takes_new_layers_for_fresh_and_moments_start_at_zero(method):
    _, _, plan = deeper("phi", method)
    copies = copied_values(plan)
    for recipe in plan.recipes():
        mask = copied_mask(copies, recipe.name, recipe.shape)
        if recipe.is_new:
            assert not mask.any()
            assert all(moment_recipe(recipe, plan, moment, state) is None for moment in POWER for state in STATES)
        elif recipe.layer is not None and len(recipe.shape) == 2:
            assert mask.any()
            assert moment_recipe(recipe, plan, "exp_avg") is not None
    counts = totals(by_line(plan))
    new = sum(int(np.prod(recipe.shape)) for recipe in plan.recipes() if recipe.is_new and len(recipe.shape) == 2)
    assert counts[Kind.FRESH] >= new
    assert sum(counts.values()) == sum(int(np.prod(recipe.shape)) for recipe in plan.recipes())


def test_new_layers_read_nothing_of_the_source():
    # Negative control: a source of other values gives the same new layers, and other copies.
    src, dst = phi_config(layers=1), phi_config(48, 6, layers=3)
    plan = phigrow.plan(src, dst, "wr", depth="random")
    for recipe in plan.recipes():
        if recipe.layer is None or recipe.kind != "matrix":
            continue
        values = [
            lift(
                recipe,
                {name: InMemory(torch.full(recipe.source_shape, fill)) for name in recipe.sources},
                torch.float32,
            )
            for fill in (1.0, 2.0)
        ]
        assert torch.equal(*values) == recipe.is_new, recipe.name


def test_a_plan_names_new_layers_and_survives_its_json():
    plan = phigrow.plan(phi_config(layers=2), phi_config(layers=5), "wr", depth="random")
    assert layer_rows(plan) == [
        (0, 0, "kept"),
        (1, "-", "new random values"),
        (2, "-", "new random values"),
        (3, 1, "kept"),
        (4, "-", "new random values"),
    ]
    again = Plan.from_json(plan.to_json())
    assert (again.hash, again.layers) == (plan.hash, plan.layers)
    broken = plan.to_json()
    broken["depth"]["layers"] = [0, -2, -1, 1, -1]
    with pytest.raises(GrowthError, match="the layer map of the plan does not fit"):
        Plan.from_json(broken)
    same = phigrow.plan(phi_config(layers=2), phi_config(layers=2), "wr", depth="random")
    assert same.exact


@pytest.mark.parametrize("method", sorted(LEARNED))
def test_learned_growth_refuses_random_layers(method):
    with pytest.raises(
        GrowthError, match=rf"method {method} cannot use depth random\n(.|\n)*learned sum of source layers"
    ):
        phigrow.plan(phi_config(layers=2), phi_config(layers=5), method, depth="random")
