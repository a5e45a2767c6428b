"""The chunked loss is the loss of full logits, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from phigrow.training import loss as loss_module
from phigrow.training.loss import attach_loss, recomputed_loss, token_loss

TOKENS, HIDDEN, VOCAB = 75, 12, 211


def inputs(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, HIDDEN), (VOCAB, HIDDEN), (VOCAB,))
    tensors = [torch.randn(s, dtype=torch.float64, generator=generator).to(dtype) for s in shapes]
    return [t.requires_grad_() for t in tensors], torch.randint(0, VOCAB, (TOKENS,), generator=generator)


def reference(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    logits = hidden @ weight.T + bias
    picked = logits.gather(1, targets[:, None])[:, 0]
    return (logits.logsumexp(1) - picked).mean()


def result(function: Any, dtype: torch.dtype, *more: Any) -> list[Tensor]:
    tensors, targets = inputs(dtype)
    loss = function(*tensors, targets, *more)
    loss.backward()
    return [loss.detach(), *(t.grad for t in tensors)]  # type: ignore[misc]


PATHS: dict[str, tuple[Any, ...]] = {
    "full": (token_loss, "full"),
    "auto": (token_loss, "auto"),
    "chunked": (token_loss, "chunked"),
    "recomputed": (recomputed_loss,),
}


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 8 * VOCAB)  # 75 tokens: nine whole chunks and a rest


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)]
)
def test_every_path_equals_the_formula(path, dtype, tolerance):
    function, *more = PATHS[path]
    wanted, found = result(reference, torch.float64), result(function, dtype, *more)
    for name, a, b in zip(("loss", "hidden", "weight", "bias"), wanted, found, strict=True):
        assert (a - b.double()).abs().max() <= tolerance * a.abs().max(), name
    assert found[0].dtype == torch.promote_types(dtype, torch.float32)


def test_a_bf16_loss_is_not_rounded_to_bf16():
    (exact, *_), (found, *_) = result(reference, torch.float64), result(token_loss, torch.bfloat16, "chunked")
    assert abs(found - exact) / exact < 3e-3
    assert found != found.bfloat16().float()


@pytest.mark.usefixtures("small_chunks")
def test_a_forgotten_bias_is_noticed():
    # Negative control: the comparison above sees an error of one part of the loss.
    broken = result(lambda h, w, b, t: token_loss(h, w, b * 0, t, "chunked"), torch.float64)
    wanted = result(reference, torch.float64)
    assert (wanted[0] - broken[0]).abs() > 1e-3
    assert (wanted[3] - broken[3]).abs().max() > 1e-6


def test_auto_is_full_where_logits_are_few(monkeypatch):
    asked: list[int] = []

    def noticed(*arguments: Any, **options: Any) -> Tensor:
        asked.append(1)
        return F.cross_entropy(F.linear(arguments[0], arguments[1]), arguments[2], reduction="none")

    monkeypatch.setattr(F, "linear_cross_entropy", noticed, raising=False)
    result(token_loss, torch.float32, "auto")
    assert not asked
    monkeypatch.setattr("phigrow.models.capacity.FULL_LOGITS", TOKENS * VOCAB - 1)
    tensors, targets = inputs(torch.float32)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        token_loss(*tensors, targets, "auto")
        assert asked


@pytest.mark.parametrize("mode", ["full", "chunked"])
def test_the_attached_loss_is_transformers_own(mode):
    from transformers import PhiConfig, PhiForCausalLM

    config = PhiConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        resid_pdrop=0.0,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    model = PhiForCausalLM(config).double()
    blocks = torch.randint(0, 61, (3, 18))
    labels = torch.cat([torch.full((3, 1), -100), blocks[:, 1:]], dim=1)
    wanted = model(input_ids=blocks, labels=labels).loss
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    attach_loss(model, mode)
    found = model(blocks)
    found.backward()
    # transformers computes its loss in float32 whatever the model's dtype.
    torch.testing.assert_close(found, wanted.double(), rtol=1e-6, atol=0)
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-7)
