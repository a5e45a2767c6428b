"""Learning rates that follow the width: groups, rates and decay, and how far activations move at several widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import assert_continued, records
from safetensors.torch import load_file
from scenarios import TINY
from tiny_models import phi_config

import phigrow
from phigrow.errors import GrowthError
from phigrow.training import RunConfig
from phigrow.training.optimizer_spec import find_optimizer
from phigrow.training.schedule import learning_rate_schedule

BASE, LR, DECAY = 32, 0.01, 0.2


def model_of(hidden: int, seed: int = 0, **more: Any) -> Any:
    """A Phi with heads of 8, whose mlp is 4 times as wide as its residual stream."""
    from transformers import PhiConfig, PhiForCausalLM

    config = phi_config(hidden, hidden // 8, 4 * hidden, 2, **more)
    torch.manual_seed(seed)
    sizes = {key: value for key, value in config.items() if key not in ("architectures", "model_type", "torch_dtype")}
    return PhiForCausalLM(PhiConfig(**sizes))


def optimizer_of(model: Any, **settings: Any) -> tuple[Any, Any]:
    """The optimizer and the schedule of a run, as its engine gets them."""
    given = {"lr": LR, "weight_decay": DECAY, "schedule": "constant", "warmup": 0, "steps": 100}
    config = RunConfig(**given | settings)
    spec = find_optimizer(config.optimizer)
    optimizer = spec.build(spec.groups(model, config), config, False)
    return optimizer, learning_rate_schedule(optimizer, config)


def rates(model: Any, **settings: Any) -> dict[str, tuple[float, float]]:
    """Name -> learning rate and weight decay of every parameter."""
    optimizer, _ = optimizer_of(model, **settings)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == sum(len(group["params"]) for group in optimizer.param_groups)
    return {n: (groups[id(p)]["lr"], groups[id(p)]["weight_decay"]) for n, p in model.named_parameters()}


def test_every_parameter_has_the_rate_and_the_decay_of_the_table():
    found = rates(model_of(128), lr_base_width=BASE)
    for name, got in found.items():
        if name.endswith("bias") or "layernorm" in name:
            wanted = (LR, 0.0)
        elif "embed_tokens" in name:
            wanted = (LR, DECAY)
        else:
            assert "layers" in name or name == "lm_head.weight"
            wanted = (LR / 4, DECAY * 4)
        assert got == pytest.approx(wanted, rel=1e-12), name
    assert sum(rate == LR / 4 for rate, _ in found.values()) == 2 * 6 + 1


def test_at_the_base_width_every_rate_is_lr():
    model = model_of(BASE)
    assert rates(model, lr_base_width=BASE) == rates(model)
    assert {rate for rate, _ in rates(model_of(128)).values()} == {LR}


def test_the_schedule_multiplies_every_rate_and_records_show_lr():
    optimizer, schedule = optimizer_of(model_of(64), lr_base_width=BASE, warmup=4)
    for step in range(1, 7):
        optimizer.step()
        schedule.step()
        share = min(1.0, step / 4)
        assert schedule.get_last_lr() == pytest.approx([LR * share, LR / 2 * share, LR * share])


def test_a_step_moves_and_decays_a_matrix_as_adamw_does_at_its_own_rate():
    model = model_of(64)
    name = "model.layers.0.mlp.fc1.weight"
    weight = dict(model.named_parameters())[name]
    before = weight.detach().clone()
    optimizer, _ = optimizer_of(model, lr_base_width=BASE)
    weight.grad = torch.full_like(weight, 3.0)
    optimizer.step()
    # Adam's first step is the sign of the gradient; the decay is lr * weight_decay, whatever the width.
    torch.testing.assert_close(weight.detach(), before * (1 - LR * DECAY) - LR / 2, rtol=1e-5, atol=1e-7)


def initialised(model: Any, width: int) -> Any:
    """Initial values of muP: the spread of a matrix falls with the root of its inputs, that of the head with them."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            spread = 0.02 if "embed_tokens" in name else 1 / width if "lm_head" in name else parameter.shape[1] ** -0.5
            torch.nn.init.normal_(parameter, 0.0, spread)
    return model


def moves(width: int, **settings: Any) -> dict[str, float]:
    """Root mean square by which activations of fixed text move in one step."""
    model = initialised(model_of(width), width)
    text = torch.from_numpy(np.random.default_rng(0).integers(0, 61, (8, 17)))

    def activations() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            out = model(input_ids=text[:, :-1], output_hidden_states=True, use_cache=False)
        return {"residual": out.hidden_states[-2], "logits": out.logits}

    optimizer, _ = optimizer_of(model, weight_decay=0.0, **settings)
    before = activations()
    logits = model(input_ids=text[:, :-1], use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).backward()
    optimizer.step()
    after = activations()
    return {name: float((after[name] - before[name]).square().mean().sqrt()) for name in before}


def growth_of(name: str, measured: list[dict[str, float]]) -> float:
    """By what factor a move grows from one width to twice that width, in the mean."""
    return (measured[-1][name] / measured[0][name]) ** (1 / (len(measured) - 1))


def test_activations_move_alike_at_every_width_and_do_not_without_the_setting():
    widths = (32, 64, 128, 256)
    followed = [moves(width, lr_base_width=BASE, lr=5e-4) for width in widths]
    plain = [moves(width, lr=5e-4) for width in widths]
    for name in ("residual", "logits"):
        assert 0.8 < growth_of(name, followed) < 1.15  # measured: 1.02 and 0.88
        # Negative control: at one rate for all widths the moves grow with the width; measured: 1.46 and 1.54.
        assert growth_of(name, plain) > 1.35


def test_a_width_of_zero_is_refused():
    with pytest.raises(GrowthError, match="lr_base_width is 0"):
        RunConfig(lr_base_width=0)


def test_other_optimizers_and_tied_embeddings_are_refused():
    with pytest.raises(GrowthError, match="lr_base_width is set, but the model has tied embeddings"):
        rates(model_of(64, tie_word_embeddings=True), lr_base_width=BASE)
    with pytest.raises(GrowthError, match=r"lr_base_width requires optimizer adamw \(got muon\)"):
        RunConfig(optimizer="muon", lr_base_width=BASE)


# Runs

STAGES = [("fp32", 1), ("bf16", 2), ("fp32", 3)]


def scenarios(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """List one step of a grown model at every stage on two ranks: at one rate, by width, and with slower copies."""
    if ranks != 2:
        return []
    sizes = {key: value for key, value in TINY.items() if key not in ("architectures", "model_type")}
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    PhiForCausalLM(PhiConfig(**sizes)).save_pretrained(folder / "source")
    phigrow.expand(folder / "source", TINY | {"intermediate_size": 100}, method="wr", out=folder / "grown")
    base = {"init": str(folder / "grown"), "model": None, "schedule": "constant", "warmup": 0, "steps": 1, "lr": 1e-3}
    base |= {"export": "export", "export_dtype": "fp32", "eval_every": 0, "log_every": 1, "weight_decay": 0.0}
    runs = [
        {**base, **more, "dtype": dtype, "zero": stage, "out": f"{dtype}-{stage}{name}"}
        for dtype, stage in STAGES
        for name, more in (
            ("", {}),
            ("-width", {"lr_base_width": 8}),
            ("-copied", {"lr_base_width": 8, "copied_lr": 0.5}),
        )
    ]
    long = base | {"dtype": "fp32", "zero": 1, "steps": 4, "lr_base_width": 8, "save_every": 2, "weight_decay": 0.1}
    return [*runs, {**long, "out": "whole"}, {**long, "out": "cut", "stop_at": 3}, {**long, "out": "cut"}]


@pytest.fixture(scope="module")
def folder(launches) -> Path:
    return launches(__name__)


@pytest.mark.parametrize(("dtype", "stage"), STAGES)
def test_every_stage_steps_each_matrix_at_its_own_rate(folder, dtype, stage):
    from phigrow.training.per_value_lr import copied_mask, copied_values

    start = load_file(folder / "grown" / "model.safetensors")
    plain, width, copied = (
        load_file(folder / f"{dtype}-{stage}{name}" / "export" / "model.safetensors")
        for name in ("", "-width", "-copied")
    )
    copies = copied_values(RunConfig(init=str(folder / "grown")))
    for name, before in start.items():
        multiple = 8 / 32 if before.ndim == 2 and "embed_tokens" not in name else 1.0
        moved = plain[name] - before
        torch.testing.assert_close(width[name] - before, multiple * moved, rtol=0, atol=2e-7)
        share = torch.where(copied_mask(copies, name, tuple(before.shape)), 0.5, 1.0)
        torch.testing.assert_close(copied[name] - before, multiple * share * moved, rtol=0, atol=2e-7)
        assert float(moved.abs().max()) > 5e-4
    assert [r["lr"] for r in records(folder / f"{dtype}-{stage}-width", "step")] == [1e-3]


def test_a_resumed_run_keeps_the_rates_of_its_groups(folder):
    assert_continued(folder / "cut", folder / "whole")
