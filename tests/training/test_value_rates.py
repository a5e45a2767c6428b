"""Rates of copied and new values with any optimizer, against the engine's arithmetic and against formulas."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import phi_config, phi_model

import phigrow
from phigrow.errors import GrowthError
from phigrow.growth.origins import Kind, matching
from phigrow.training import RunConfig, freeze_copied, fresh_lr
from phigrow.training.per_value_lr import PerValueLR, on_device

Build = Callable[..., torch.optim.Optimizer]


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> Path:
    """A Phi of hidden size 32 and two layers, grown by wr to 48 and three layers."""
    folder = tmp_path_factory.mktemp("rates")
    phi_model(phi_config(32, 4, 48, 2, 4)).save_pretrained(folder / "source")
    (folder / "dst.json").write_text(json.dumps(phi_config(48, 6, 72, 3, 4)))
    phigrow.expand(folder / "source", folder / "dst.json", method="wr", out=folder / "grown", dtype="float32")
    return folder / "grown"


@pytest.fixture(scope="module")
def start(grown) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(grown, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def masks(grown) -> dict[str, torch.Tensor]:
    """The copied values by name, from the plan: growth itself says where every value comes from."""
    plan = phigrow.plan(grown.parent / "source", grown.parent / "dst.json", "wr")
    return {each.recipe.name: torch.from_numpy(each.kinds() <= Kind.TILED_SCALED) for each in matching(plan, "*")}


def trained(start: torch.nn.Module, build: Build, attach: Callable, steps: int = 3, before: Callable | None = None):
    """Train a copy of a model for a few steps on fixed ids; return its values by name."""
    model = copy.deepcopy(start)
    optimizer = build(model.parameters())
    attach(optimizer, model)
    for step in range(steps):
        ids = (torch.arange(24).view(2, 12) * (step + 3)) % 61
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        if before:
            before(model)
        optimizer.step()
    return {name: value.detach() for name, value in model.named_parameters()}


def adamw(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, weight_decay=0.01)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.numpy().tobytes() == other.numpy().tobytes()


def test_adamw_trains_new_values_as_the_engine_does(grown, start, masks):
    def engine(optimizer, model):
        by_id = {id(parameter): masks[name] for name, parameter in model.named_parameters()}
        hooks = PerValueLR(optimizer, by_id, RunConfig(init=str(grown), fresh_lr=2.0, fresh_warmup=2))
        optimizer.register_step_post_hook(lambda *_: setattr(hooks, "step", hooks.step + 1))

    theirs = trained(start, adamw, engine)
    mine = trained(start, adamw, lambda optimizer, model: fresh_lr(optimizer, model, grown, warmup=2))
    plain = trained(start, adamw, lambda *_: None)
    assert all(same_bits(mine[name], theirs[name]) for name in masks)
    assert any(not torch.equal(mine[name], plain[name]) for name in masks)  # negative control
    # One step from fresh moments moves a value by its rate, and decays it by rate * 0.1.
    first = trained(start, adamw, lambda optimizer, model: fresh_lr(optimizer, model, grown, 2.0), steps=1)
    once = trained(start, adamw, lambda *_: None, steps=1)
    for name, value in start.named_parameters():
        factor = torch.where(masks[name], 1.0, 2.0)
        torch.testing.assert_close(first[name] - value, factor * (once[name] - value), rtol=1e-3, atol=1e-6)


def test_sgd_follows_its_formula(grown, start, masks):
    gradients = {}

    def keep(model):
        gradients.update({name: value.grad.clone() for name, value in model.named_parameters()})

    after = trained(start, sgd, lambda *both: fresh_lr(*both, grown, factor=3.0, copied=0.5), steps=1, before=keep)
    mixed = 0
    for name, value in start.named_parameters():
        rate = 0.1 * torch.where(masks[name], 0.5, 3.0)
        expected = value - rate * (gradients[name] + 0.01 * value)
        torch.testing.assert_close(after[name], expected.detach(), rtol=1e-5, atol=1e-6)
        mixed += bool(masks[name].any()) and not masks[name].all()
        # Negative control: with the rates the other way round, values do not fit.
        other = value - 0.1 * torch.where(masks[name], 3.0, 0.5) * (gradients[name] + 0.01 * value)
        assert (after[name] - other).abs().max() > 1e-6
    assert mixed > 5


@pytest.mark.parametrize("build", [adamw, sgd, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True)])
def test_frozen_values_stay_to_the_bit(grown, start, masks, build):
    start = copy.deepcopy(start)
    name = "model.layers.0.mlp.fc1.weight"
    with torch.no_grad():
        start.get_parameter(name)[0, 0] = -0.0  # adding zero to it would change its sign bit
    after = trained(start, build, lambda *both: freeze_copied(*both, grown), steps=4)
    for name, value in start.named_parameters():
        assert same_bits(after[name][masks[name]], value.detach()[masks[name]]), name
        if not masks[name].all():
            moved = after[name][~masks[name]] != value.detach()[~masks[name]]
            assert moved.float().mean() > 0.8, name
    plain = trained(start, build, lambda *_: None, steps=1)
    assert not same_bits(plain[name][masks[name]], start.get_parameter(name).detach()[masks[name]])


def test_frozen_values_do_not_count_in_the_norm_of_gradients(grown, start, masks):
    seen = {}

    def keep(model):
        seen.update({name: value.grad for name, value in model.named_parameters() if value.grad is not None})

    trained(start, sgd, lambda *both: freeze_copied(*both, grown), steps=1, before=keep)
    assert seen
    for name, gradient in seen.items():
        assert not gradient[masks[name]].any()
        assert gradient[~masks[name]].any()
    assert all(masks[name].all() for name in masks.keys() - seen.keys())


def test_hooks_can_be_removed_and_reach_wrapped_optimizers(grown, start):
    def removed(optimizer, model):
        fresh_lr(optimizer, model, grown).remove()
        hooks = fresh_lr(optimizer, model, grown, copied=0.0)
        assert 0.1 < hooks.copied < 0.9
        hooks.remove()

    plain = trained(start, adamw, lambda *_: None)
    again = trained(start, adamw, removed)
    assert all(torch.equal(plain[name], again[name]) for name in plain)

    def wrapped(optimizer, model):
        fresh_lr(SimpleNamespace(optimizer=optimizer), torch.nn.ModuleDict({"module": model}), grown)

    one, other = (trained(start, adamw, each) for each in (lambda *both: fresh_lr(*both, grown), wrapped))
    assert all(same_bits(one[name], other[name]) for name in one)


def test_what_cannot_be_trained_value_by_value_is_refused(grown, start, tmp_path):
    optimizer = adamw(start.parameters())
    with pytest.raises(GrowthError, match=r"there is no phigrow\.json in"):
        fresh_lr(optimizer, start, grown.parent / "source")
    with pytest.raises(GrowthError, match="factor is -1"):
        fresh_lr(optimizer, start, grown, factor=-1)
    stranger = adamw([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(GrowthError, match=r"a parameter of shape \(3,\) that is not in the model"):
        freeze_copied(stranger, start, grown)
    other = torch.nn.Linear(2, 2)
    with pytest.raises(GrowthError, match="does not record which values of a parameter are copies"):
        fresh_lr(adamw(other.parameters()), other, grown)


def test_masks_follow_a_model_that_moves_after_the_hooks_were_attached(grown, start, monkeypatch):
    """A trainer moves the values of a parameter to a GPU and keeps the object, so its mask must follow."""
    moves = []

    class Elsewhere:
        """A mask on a device that is not the parameter's."""

        device = torch.device("cuda")

        def to(self, device: torch.device) -> torch.Tensor:
            moves.append(device)
            return torch.ones(3, dtype=torch.bool)

    parameter = torch.nn.Parameter(torch.zeros(3))
    stored: dict = {id(parameter): Elsewhere()}
    for _ in range(2):
        assert on_device(stored, parameter).tolist() == [True] * 3
    assert moves == [parameter.device]  # once

    asked: list[str] = []
    for kind in ("per_value_lr", "value_rates"):  # the hooks of both read their masks here

        def spied(masks, parameter, kind=kind):
            asked.append(kind)
            return on_device(masks, parameter)

        monkeypatch.setattr(f"phigrow.training.{kind}.on_device", spied)
    trained(start, sgd, lambda *both: fresh_lr(*both, grown), steps=1)
    assert asked == ["per_value_lr"] * len(list(start.parameters()))
    asked.clear()
    trained(start, sgd, lambda *both: freeze_copied(*both, grown), steps=1)
    assert len(asked) % 3 == 0 < len(asked)  # a gradient, before and after the update
    assert set(asked) == {"value_rates"}


def test_wrapped_models_and_scattered_parameters_are_refused(grown, start, monkeypatch):
    model = copy.deepcopy(start)
    weight = model.get_parameter("model.layers.0.mlp.fc1.weight")
    weight.data = weight.data.t().contiguous().t()
    with pytest.raises(GrowthError, match=r"not contiguous in memory\n[\s\S]*fc1\.weight, strides \(1, 72\)"):
        fresh_lr(adamw(model.parameters()), model, grown)
    weight.data = weight.data.contiguous()
    fresh_lr(adamw(model.parameters()), model, grown)

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = start

    freeze_copied(adamw(model.parameters()), model, grown)
    monkeypatch.setattr("torch.nn.parallel.DistributedDataParallel", Wrapped)
    with pytest.raises(GrowthError, match="already in DistributedDataParallel"):
        freeze_copied(adamw(start.parameters()), Wrapped(), grown)
