"""Recomputation in the backward pass: the same bits, the memory of the formulas, and the operations that run again."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import pytest
import torch
from scenarios import TINY
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from phigrow.errors import GrowthError
from phigrow.models.capacity import SELECTIVE, activations
from phigrow.training import RunConfig
from phigrow.training.compilation import compile_layers
from phigrow.training.engine import engine_config
from phigrow.training.model import build_model
from phigrow.training.process import World
from phigrow.training.zero import restore_linear

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
SHAPES = {
    "even": TINY | {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2},
    "uneven": TINY | {"hidden_size": 96, "intermediate_size": 250, "num_attention_heads": 3, "num_key_value_heads": 3},
}
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "vocab_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


def built(sizes: dict[str, Any], setting: bool | str, documents: str = "plain") -> Any:
    config = RunConfig(zero=0, dtype="fp32", activation_checkpointing=setting, loss="full", documents=documents)
    return build_model(config, sizes, ALONE, "sdpa", {}, 0)


def blocks(rows: int = 2, length: int = 33) -> torch.Tensor:
    return torch.randint(96, (rows, length), generator=torch.Generator().manual_seed(0))


def stepped(model: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(5)  # of dropout
    loss = model(blocks())
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize(
    "sizes",
    [
        SHAPES["even"],
        SHAPES["uneven"],
        TINY | {"resid_pdrop": 0.3, "embd_pdrop": 0.2, "attention_dropout": 0.2},
        LLAMA,
    ],
    ids=["even", "uneven", "dropout", "llama"],
)
@pytest.mark.parametrize("documents", ["plain", "within"])
def test_the_loss_and_all_gradients_have_the_same_bits(sizes, documents):
    loss, gradients = stepped(built(sizes, False, documents))
    for setting in (SELECTIVE, True):
        found, others = stepped(built(sizes, setting, documents))
        assert torch.equal(found, loss)
        assert all(torch.equal(one, other) for one, other in zip(gradients, others, strict=True))
    other = stepped(built(sizes | {"initializer_range": 0.03}, SELECTIVE, documents))
    assert not torch.equal(other[0], loss)  # negative control


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("setting", [False, SELECTIVE, True])
def test_the_forward_pass_keeps_what_the_planner_counts(shape, setting):
    sizes, rows, length = SHAPES[shape] | {"num_hidden_layers": 4}, 1, 256
    model = built(sizes, setting)
    model(blocks(rows, length + 1)).backward()  # later passes make no gradients of parameters
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        loss = model(blocks(rows, length + 1))
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    kept = sum(event.nbytes() for event in events if event.name() == "[memory]")
    loss.backward()
    expected = activations(sizes, rows, length, dtype="fp32", checkpointing=setting, loss="full").kept
    rotary = 2 * 4 * length * sizes["hidden_size"] / sizes["num_attention_heads"] / 2  # tables of cosines and sines
    small = rotary + (len(torch.get_rng_state()) * sizes["num_hidden_layers"] if setting else 0)
    assert kept == pytest.approx(expected + small, rel=0.02)
    other = activations(sizes, rows, length, dtype="fp32", checkpointing=setting is not True, loss="full").kept
    assert kept != pytest.approx(other + small, rel=0.2)  # negative control


class Operations(TorchDispatchMode):
    """Count the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[operation.overloadpacket.__name__] += 1
        return operation(*args, **(kwargs or {}))


def test_only_cheap_operations_run_again():
    def forward_operations(setting: bool | str) -> Counter[str]:
        model = built(SHAPES["even"], setting)
        with Operations() as operations:
            model(blocks()).backward()
        return operations.counts

    kept, cheap, again = (forward_operations(setting) for setting in (False, SELECTIVE, True))
    layers = TINY["num_hidden_layers"]
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    for name, extra in (("addmm", 0), (attention, 0), ("gelu", layers), ("native_layer_norm", layers)):
        assert cheap[name] == kept[name] + extra, name
    assert again[attention] == kept[attention] + layers
    assert again["addmm"] > kept["addmm"]  # negative control


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_layers_recompute_inside_their_one_graph(monkeypatch):
    from torch._dynamo.utils import counters

    restore_linear()  # a test before this one may have built a model at stage 3
    warnings: list[str] = []
    log = logging.getLogger("torch._higher_order_ops.wrap")
    monkeypatch.setattr(log, "callHandlers", lambda record: warnings.append(record.getMessage()))
    loss, gradients = stepped(built(SHAPES["even"], False))
    torch._dynamo.reset()
    counters.clear()
    model = built(SHAPES["even"], SELECTIVE)
    compile_layers(model, backend="aot_eager")
    found, others = stepped(model)
    assert float(found) == pytest.approx(float(loss), rel=1e-6)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-7)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert warnings == []  # torch warns of operations in place, and there are none


def test_stage_3_refuses_it():
    with pytest.raises(GrowthError, match=r"selective requires ZeRO stage 0, 1 or 2 \(got 3\)"):
        engine_config(RunConfig(zero=3, activation_checkpointing=SELECTIVE), 1, 16)
    assert engine_config(RunConfig(zero=3, activation_checkpointing=True), 1, 16)["zero_optimization"]["stage"] == 3
