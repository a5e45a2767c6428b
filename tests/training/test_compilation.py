"""Compiled training passes: equal to plain ones to rounding, one compilation a shape, and none for evaluations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scenarios import TINY, VOCAB, FakeBlocks
from torch import nn
from torch.nn import functional as F

from phigrow.training import RunConfig, automatic
from phigrow.training.attention import FUNCTIONS
from phigrow.training.compilation import (
    GELU_SCALE,
    SigmoidGELU,
    compile_layers,
    compile_training,
    compiled_evaluation,
    keep_rotary_tables,
    use_sigmoid_gelu,
)
from phigrow.training.evaluation import HeldOutLoss, held_out, heldout_loss
from phigrow.training.model import build_model
from phigrow.training.process import World

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # PyTorch's own

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def built(seed: int = 0) -> Any:
    return build_model(RunConfig(zero=0, dtype="fp32", seed=seed), TINY, ALONE, "sdpa", {})


def blocks(rows: int, length: int = 17) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(rows))


def test_the_sigmoid_form_is_the_tanh_form():
    values = torch.linspace(-30, 30, 4001, dtype=torch.float64, requires_grad=True)
    sigmoid = values * torch.sigmoid(GELU_SCALE * (values + 0.044715 * values**3))
    tanh = F.gelu(values, approximate="tanh")
    torch.testing.assert_close(sigmoid, tanh, rtol=0, atol=1e-14)
    one, other = (torch.autograd.grad(each.sum(), values)[0] for each in (sigmoid, tanh))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-13)
    assert math.isclose(GELU_SCALE, 2 * math.sqrt(2 / math.pi))


def test_what_is_not_compiled_computes_as_before():
    model = built()
    before = model(blocks(2))
    assert use_sigmoid_gelu(model) == TINY["num_hidden_layers"]
    (rotary,) = keep_rotary_tables(model)
    rotary.tables = "not read"
    assert torch.equal(model(blocks(2)), before)
    assert use_sigmoid_gelu(nn.Sequential(nn.GELU(), nn.ReLU())) == 0
    values = torch.randn(9)
    assert torch.equal(SigmoidGELU()(values), F.gelu(values, approximate="tanh"))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # raised while dynamo traces
@pytest.mark.parametrize("documents", ["plain", "within"])
def test_one_graph_serves_all_layers(documents):
    """Without a compiler behind it: the graphs are counted, and run as they are."""
    from torch._dynamo.utils import counters

    config = RunConfig(zero=0, dtype="fp32", documents=documents)
    layers = TINY | {"num_hidden_layers": 4}
    plain, compiled = (build_model(config, layers, ALONE, "sdpa", {}, 0) for _ in range(2))
    torch._dynamo.reset()
    counters.clear()
    compile_layers(compiled, backend="eager")
    for rows in (blocks(4), blocks(4).roll(1, 0)):
        losses = [model(rows) for model in (plain, compiled)]
        for loss in losses:
            loss.backward()
        assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=1e-6)
    for (name, one), (_, other) in zip(plain.named_parameters(), compiled.named_parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-7, msg=name)
    with torch.no_grad():
        assert torch.equal(compiled(blocks(3)), plain(blocks(3)))
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(compiled(blocks(4)), compiled(blocks(4)))
    for rows in (1, 2, 3, 5, 6, 7, 8, 9, 10):  # PyTorch's own limit is 8
        compiled(blocks(rows))  # negative control: another shape is another graph
    assert counters["stats"]["unique_graphs"] == 10


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_documents_by_their_lengths_take_one_graph_for_batches_with_other_documents(monkeypatch):
    from torch._dynamo.utils import counters

    def by_documents(
        module: Any, query: Any, key: Any, value: Any, mask: Any, cu_seq_lens_q: Any = None, **rest: Any
    ) -> Any:
        document = (torch.arange(query.shape[2])[:, None] >= cu_seq_lens_q).sum(dim=1)
        allowed = (document[:, None] == document).tril()
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed).transpose(1, 2).contiguous(), None

    monkeypatch.setitem(FUNCTIONS, "varlen", by_documents)
    config = RunConfig(zero=0, dtype="fp32", documents="within")
    model = build_model(config, TINY, ALONE, "varlen", {}, 0)
    masked = build_model(config, TINY, ALONE, "sdpa", {}, 0)
    torch._dynamo.reset()
    counters.clear()
    compile_layers(model, backend="eager")
    for documents in (1, 3, 6):
        batch = blocks(4).clamp_min(1)
        batch[:, 2 : 2 + documents] = 0
        assert float(model(batch).detach()) == pytest.approx(float(masked(batch).detach()), rel=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    batch[:, 1:15] = 0
    model(batch)
    assert counters["stats"]["unique_graphs"] == 2  # negative control: above 31 documents the lengths are 64


class Engine:
    """The part of DeepSpeed's engine that an evaluation uses."""

    def __init__(self, module: Any) -> None:
        self.module, self.eval, self.train = module, module.eval, module.train
        self.batches: list[int] = []

    def __call__(self, batch: torch.Tensor, by_row: bool) -> torch.Tensor:
        self.batches.append(len(batch))
        losses: torch.Tensor = self.module(batch, by_row=by_row)
        return losses


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_evaluations_of_one_shape_take_one_graph_more(monkeypatch):
    """10 held-out blocks of which the second rank reads 5, in batches of 3."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: None)
    data, rank = FakeBlocks(), World(1, 2, 1, 2, torch.device("cpu"))
    held = held_out(data, 10)

    def evaluated(module: Any, *, same_shape: bool) -> tuple[HeldOutLoss, list[int]]:
        engine = Engine(module)
        losses = heldout_loss(engine, data.heldout, held, 3, rank, by_group=True, same_shape=same_shape)
        return losses, engine.batches

    plain, compiled = built(), built()
    expected, batches = evaluated(plain, same_shape=False)
    assert batches == [3, 2]
    torch._dynamo.reset()
    counters.clear()
    compile_layers(compiled, backend="eager")
    compiled(blocks(3)).backward()
    assert counters["stats"]["unique_graphs"] == 1
    for _ in range(2):
        found, batches = evaluated(compiled, same_shape=True)
        assert batches == [3, 3]
        assert found.mean == pytest.approx(expected.mean, rel=1e-6)
        assert found.by_group == pytest.approx(expected.by_group, rel=1e-6)
    assert counters["stats"]["unique_graphs"] == 2
    compiled(blocks(3)).backward()
    assert counters["stats"]["unique_graphs"] == 2
    assert evaluated(compiled, same_shape=False)[0] == expected  # not compiled: no other graph, and the same bits
    assert counters["stats"]["unique_graphs"] == 2
    with compiled_evaluation(compiled), torch.no_grad():
        compiled.eval()(blocks(2), by_row=True)
    assert counters["stats"]["unique_graphs"] == 3  # negative control: a short batch is another graph


@pytest.mark.long
def test_models_of_one_shape_are_compiled_once_and_evaluations_never():
    from torch._dynamo.utils import counters

    counters.clear()
    for seed in (0, 1):
        plain, compiled = built(seed), built(seed)
        compile_training(compiled, plain_positions=True)
        losses = []
        for model in (plain, compiled):
            loss = model(blocks(4))
            loss.backward()
            losses.append(float(loss.detach()))
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        for (name, one), (_, other) in zip(plain.named_parameters(), compiled.named_parameters(), strict=True):
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-7, msg=name)
        # Held-out blocks of any number, with and without evaluation mode.
        with torch.no_grad():
            assert torch.equal(compiled(blocks(3)), plain(blocks(3)))
            compiled.eval()
            assert torch.equal(compiled(blocks(5), by_row=True), plain(blocks(5), by_row=True))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.long
def test_both_forms_of_a_pass_are_timed():
    seconds = automatic.time_compiled(TINY, 16, "fp32")
    assert set(seconds) == {"plain", "compiled"}
    assert all(0 < value < math.inf for value in seconds.values())
