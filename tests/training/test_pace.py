"""Copied and fresh values of a grown checkpoint at learning rates of their own, value by value, at every stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import losses
from safetensors.torch import load_file
from scenarios import TINY

import phigrow
from phigrow.errors import GrowthError
from phigrow.growth.origins import Kind, matching
from phigrow.training import RunConfig, per_value_lr, train
from phigrow.training.per_value_lr import PerValueLR, copied_mask, copied_values, packed, unpacked

STAGES = [("fp32", 0), ("fp32", 2), ("bf16", 0), ("bf16", 1), ("bf16", 2), ("bf16", 3)]
SIZES = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 100}
COPIED, FRESH = 0.5, 0.25


def write_grown(folder: Path) -> Path:
    """Write a tiny model and what two depth methods grow of it."""
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    sizes = {key: value for key, value in TINY.items() if key not in ("architectures", "model_type")}
    model = PhiForCausalLM(PhiConfig(**sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.1)
    model.save_pretrained(folder / "source")
    (folder / "dst.json").write_text(json.dumps(TINY | SIZES | {"num_hidden_layers": 3}))
    for name, depth in (("wr", "interpose"), ("identity", "identity")):
        phigrow.expand(
            folder / "source", folder / "dst.json", method="wr", depth=depth, out=folder / name, dtype="float32"
        )
    return folder


def scenarios(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """List one and two steps of a grown model at every stage, plain and paced, on two ranks."""
    if ranks != 2:
        return []
    write_grown(folder)
    base = {"init": str(folder / "wr"), "model": None, "schedule": "constant", "warmup": 0, "steps": 1}
    base |= {"export": "export", "export_dtype": "fp32", "eval_every": 0, "log_every": 1}
    runs: list[dict[str, Any]] = []
    for dtype, stage in STAGES:
        own = base | {"dtype": dtype, "zero": stage}
        runs += [
            {**own, "out": f"{dtype}-{stage}"},
            {**own, "out": f"{dtype}-{stage}-paced", "copied_lr": COPIED, "fresh_lr": FRESH},
            {**own, "out": f"{dtype}-{stage}-warm", "fresh_warmup": 4},
        ]
    long = base | {"dtype": "bf16", "zero": 2, "steps": 4, "fresh_warmup": 3, "save_every": 2}
    runs += [
        {**long, "out": "whole"},
        {**long, "out": "cut", "stop_at": 3},
        {**long, "out": "cut"},
    ]
    return runs


@pytest.fixture(scope="module")
def folder(launches) -> Path:
    return launches(__name__)


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> Path:
    return write_grown(tmp_path_factory.mktemp("grown"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("dtype", "stage"), STAGES)
def test_every_value_moves_at_its_own_rate(folder, dtype, stage):
    plan = phigrow.plan(folder / "source", folder / "dst.json", "wr")
    masks = {found.recipe.name: torch.from_numpy(found.kinds() <= Kind.TILED_SCALED) for found in matching(plan, "*")}
    before = weights(folder / "wr")
    plain, paced, warm = (weights(folder / f"{dtype}-{stage}{end}" / "export") for end in ("", "-paced", "-warm"))
    for name, start in before.items():
        mask, moved = masks[name], plain[name] - start
        factor = torch.where(mask, COPIED, FRESH)
        torch.testing.assert_close(paced[name] - start, factor * moved, rtol=1e-3, atol=2e-7, msg=name)
        assert torch.equal(warm[name], torch.where(mask, plain[name], start)), name  # to the bit
    # Negative control: the masks say something, and the other way round they do not fit.
    name = "model.layers.1.mlp.fc1.weight"
    assert 0.3 < masks[name].float().mean() < 0.5
    moved = plain[name] - before[name]
    assert (paced[name] - before[name] - torch.where(masks[name], FRESH, COPIED) * moved).abs().max() > 1e-3


def test_a_resumed_run_goes_on_at_its_pace(folder):
    assert losses(folder / "cut") == losses(folder / "whole")
    one, other = weights(folder / "cut" / "export"), weights(folder / "whole" / "export")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_a_grown_folder_says_is_what_inspection_says(grown):
    for kind in ("wr", "identity"):
        found = copied_values(RunConfig(init=str(grown / kind)))
        depth = "identity" if kind == "identity" else "interpose"
        plan = phigrow.plan(grown / "source", grown / "dst.json", "wr", depth=depth)
        for each in matching(plan, "*"):
            mask = copied_mask(found, each.recipe.name, each.recipe.shape)
            assert torch.equal(mask, torch.from_numpy(each.kinds() <= Kind.TILED_SCALED)), each.recipe.name
    assert found["fresh"]  # the inserted layer's writers


def test_a_checkpoint_that_was_not_grown_has_no_fresh_values(grown, tmp_path):
    with pytest.raises(GrowthError, match="require a grown checkpoint") as error:
        train(RunConfig(fresh_warmup=10))
    assert "the run starts from scratch" in str(error.value)
    with pytest.raises(GrowthError, match=r"there is no phigrow\.json"):
        train(RunConfig(init=str(grown / "source"), copied_lr=0.5, data="embedded"))
    (tmp_path / "phigrow.json").write_text('{"plan": {}}')
    with pytest.raises(GrowthError, match="does not record which values are copies"):
        copied_values(RunConfig(init=str(tmp_path), fresh_lr=2.0))
    with pytest.raises(
        GrowthError, match=r"the growth does not record which values of a parameter are copies[\s\S]*other\.weight"
    ):
        copied_mask({"spans": {}, "fresh": []}, "other.weight", (2, 2))


def with_copies(optimizer: torch.optim.Optimizer, mask: torch.Tensor, copied: float, fresh: float) -> None:
    """Scale updates by the plain formula, on whole tensors: a copy, the factors and the result are alive together."""
    former: list[torch.Tensor] = []
    (parameter,) = optimizer.param_groups[0]["params"]
    optimizer.register_step_pre_hook(lambda *_: former.append(parameter.detach().clone()))

    def after(*_: Any) -> None:
        with torch.no_grad():
            parameter.copy_(torch.lerp(former.pop(), parameter, torch.where(mask, copied, fresh)))

    optimizer.register_step_post_hook(after)


def adamw(values: torch.Tensor) -> torch.optim.Optimizer:
    parameter = torch.nn.Parameter(values.clone())
    parameter.grad = values.sin()
    return torch.optim.AdamW([parameter], lr=0.1, fused=True)


def most_bytes(work: Callable[[], object]) -> int:
    """Return the most bytes of tensors at any moment of some work, over those before it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        work()
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]
    return max(accumulate(changes))


def test_updates_are_scaled_to_the_bit_with_one_copy_of_the_weights(monkeypatch):
    monkeypatch.setattr(per_value_lr, "BLOCK", 1 << 14)
    for count in (1, 7, 8, 1 << 14, (1 << 20) + 5):
        values = torch.linspace(-1, 1, count)
        mask = (torch.arange(count) % 7) % 3 == 0
        plain, hooked, copying = (adamw(values) for _ in range(3))
        config = RunConfig(copied_lr=COPIED, fresh_lr=2.0)
        PerValueLR(hooked, {id(hooked.param_groups[0]["params"][0]): mask}, config)
        with_copies(copying, mask, COPIED, 2.0)
        for each in (plain, hooked, copying):
            each.step()
        one, other, third = (each.param_groups[0]["params"][0] for each in (hooked, copying, plain))
        assert one.detach().numpy().tobytes() == other.detach().numpy().tobytes()
        assert (count == 1) == torch.equal(one[1:], third[1:])  # the negative control: they were scaled
    none, ours, whole = (most_bytes(each.step) for each in (plain, hooked, copying))  # of a million values
    print("bytes a value: without", none / count, "in blocks", ours / count, "on whole tensors", whole / count)
    assert (ours - none) / count < 4.5
    assert (whole - none) / count > 11  # the negative control: three copies are seen


def test_a_mask_takes_one_bit_a_value(monkeypatch):
    monkeypatch.setattr(per_value_lr, "BLOCK", 64)
    for count in (0, 1, 8, 63, 64, 65, 1000):
        mask = torch.arange(count) % 5 < 2
        bits = packed(mask)
        assert (bits.dtype, bits.numel()) == (torch.uint8, (count + 7) // 8)
        assert torch.equal(unpacked(bits, count), mask)
