"""Attention: every implementation builds and steps a model, and the choice is made by what works.

flash-attn and PyTorch's kernel for document lengths run on GPUs only. Stand-ins with their signatures compute the same
with SDPA, so that everything around the kernels runs here.
"""

from __future__ import annotations

import importlib.machinery
import itertools
import json
import sys
import types
from typing import Any

import pytest
import torch
from scenarios import TINY
from torch import Tensor
from torch.nn import functional as F

from phigrow.errors import GrowthError
from phigrow.models.versions import reads_rope_parameters
from phigrow.training import RunConfig, attention_choice
from phigrow.training.attention import FUNCTIONS, registered_name
from phigrow.training.attention_choice import Shape, choose_attention, shape_of
from phigrow.training.model import build_model
from phigrow.training.process import World, deterministic_kernels
from phigrow.training.resolved import recorded_attention

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1, CPU)
EOS = 0
PLAIN, WITHIN = Shape(2, 4, 4, 32, 16), Shape(2, 4, 4, 32, 16, within=True)


def tokens_first(query: Tensor, key: Tensor, value: Tensor, scale: float | None, causal: bool) -> Tensor:
    """Attention of ``[n, tokens, heads, head_dim]``."""
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(*heads_first, is_causal=causal, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def by_lengths(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, scale: float | None, causal: bool) -> Tensor:
    """Attention of ``[tokens, heads, head_dim]`` inside documents."""
    parts = [
        tokens_first(*(x[None, start:end] for x in (query, key, value)), scale, causal)[0]
        for start, end in itertools.pairwise(borders.tolist())
    ]
    return torch.cat(parts)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for the package flash-attn, with the value of ``deterministic`` of every call."""
    module: Any = types.ModuleType("flash_attn")
    module.deterministic = []
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: Any = None,
        causal: bool = False,
        deterministic: bool = False,
    ) -> Tensor:
        module.deterministic.append(deterministic)
        return tokens_first(q, k, v, softmax_scale, causal)

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: Any = None,
        causal: bool = False,
        deterministic: bool = False,
    ) -> Tensor:
        module.deterministic.append(deterministic)
        assert max_seqlen_q == max_seqlen_k >= int(cu_seqlens_q.diff().max())
        assert cu_seqlens_q.dtype == torch.int32
        return by_lengths(q, k, v, cu_seqlens_q, softmax_scale, causal)

    module.__dict__.update(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module


@pytest.fixture
def varlen_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for PyTorch's kernel."""

    def stand_in(
        query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **rest: Any
    ) -> Tensor:
        assert rest["window_size"] == (-1, 0)
        assert max_q == max_k >= int(cu_q.diff().max())
        return by_lengths(query, key, value, cu_q, rest["scale"], True)

    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no kernel for documents")
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)


@pytest.fixture(autouse=True)
def no_memory():
    """Forget the trials and timings of other tests."""
    yield
    attention_choice.forget_trials()


def step(attention: str, documents: str) -> tuple[float, list[Tensor]]:
    """Build a model, and return the loss of a batch and all gradients."""
    config = RunConfig(zero=0, dtype="fp32", documents=documents, seed=3)
    model = build_model(config, TINY, ALONE, attention, {}, EOS)
    blocks = torch.randint(0, 96, (3, 17), generator=torch.Generator().manual_seed(0))
    blocks[0, 5] = blocks[1, 3] = blocks[1, 9] = EOS
    loss = model(blocks)
    loss.backward()
    return float(loss.detach()), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("documents", ["plain", "within"])
def test_every_attention_builds_and_steps_the_same_model(documents, flash_attn, varlen_attn):
    loss, gradients = step("eager", documents)
    for attention in ("sdpa", "flash_attention_2", *(["varlen"] if documents == "within" else [])):
        found, others = step(attention, documents)
        assert found == pytest.approx(loss, rel=1e-6), attention
        for one, other in zip(others, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7, msg=attention)
    other = "within" if documents == "plain" else "plain"  # negative control
    assert abs(step("flash_attention_2", other)[0] - loss) > 1e-4


@pytest.mark.skipif(not reads_rope_parameters(), reason="transformers 4 loads no kernels")
def test_transformers_takes_a_name_with_flash_for_a_kernel_to_load(flash_attn):
    """It is the reason for the names under which attention is registered."""
    from transformers import AutoModelForCausalLM, PhiConfig
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    names = [registered_name(name, within=True) for name in FUNCTIONS]
    assert not any("flash" in name for name in names)
    ALL_ATTENTION_FUNCTIONS.register("phigrow_flash_attention_2", FUNCTIONS["flash_attention_2"])
    sizes = {key: value for key, value in TINY.items() if key not in ("architectures", "model_type")}
    make: Any = AutoModelForCausalLM.from_config
    with pytest.raises(Exception, match=r"flash|kernel"):
        make(PhiConfig(**sizes), attn_implementation="phigrow_flash_attention_2")


def test_what_is_asked_for_must_work(flash_attn, monkeypatch):
    chosen = choose_attention("flash_attention_2", "bf16", CPU, PLAIN)
    assert (chosen.name, chosen.reason) == ("flash_attention_2", "flash-attn 2, as asked")
    assert choose_attention("eager", "fp32", CPU, PLAIN).name == "eager"
    assert choose_attention("sdpa", "fp32", CPU, PLAIN).name == "sdpa"
    attention_choice.forget_trials()
    monkeypatch.delattr(flash_attn, "flash_attn_func")  # FlashAttention 4 alone: the package without this function
    with pytest.raises(GrowthError, match=r"attention flash_attention_2 does not work here[\s\S]*ImportError"):
        choose_attention("flash_attention_2", "bf16", CPU, PLAIN)
    with pytest.raises(GrowthError, match=r"varlen does not work here[\s\S]*it is for documents: within"):
        choose_attention("varlen", "bf16", CPU, PLAIN)


def test_a_package_that_computes_something_else_does_not_count(flash_attn, monkeypatch):
    real = flash_attn.flash_attn_func
    monkeypatch.setattr(flash_attn, "flash_attn_func", lambda *args, causal, **rest: real(*args, causal=False, **rest))
    with pytest.raises(GrowthError, match="its values are off by"):
        choose_attention("flash_attention_2", "bf16", CPU, PLAIN)


def test_without_the_package_the_error_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(GrowthError, match=r"flash_attn[\s\S]*what to do: .*attention: auto"):
        choose_attention("flash_attention_2", "bf16", CPU, PLAIN)


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, problems: dict[str, str], seconds: dict[str, float]) -> None:
    monkeypatch.setattr(attention_choice, "problem_of", lambda name, *_: problems.get(name))
    monkeypatch.setattr(attention_choice, "timed", lambda name, *_: seconds[name])
    monkeypatch.setattr(attention_choice, "kernel", lambda name, *_: name)


def test_auto_takes_the_faster_on_a_gpu(monkeypatch):
    cuda = torch.device("cuda")
    on_a_gpu(monkeypatch, {}, {"flash_attention_2": 0.002, "sdpa": 0.001, "varlen": 0.004})
    plain = choose_attention("auto", "bf16", cuda, PLAIN)
    assert (plain.name, plain.seconds) == ("sdpa", {"flash_attention_2": 0.002, "sdpa": 0.001})
    timing = "a timing, PyTorch's if it takes less than 90 %: flash_attention_2 2 ms, sdpa 1 ms"
    assert plain.record()["reason"] == f"sdpa ({timing})"
    assert choose_attention("auto", "bf16", cuda, WITHIN).name == "flash_attention_2"
    assert choose_attention("auto", "fp32", cuda, PLAIN).name == "sdpa"
    assert choose_attention("auto", "bf16", CPU, PLAIN).name == "sdpa"


def test_auto_takes_what_works_on_a_gpu(monkeypatch):
    cuda = torch.device("cuda")
    on_a_gpu(monkeypatch, {"flash_attention_2": "ImportError: undefined symbol"}, {})
    found = choose_attention("auto", "bf16", cuda, PLAIN)
    assert (found.name, found.reason) == ("sdpa", "sdpa (flash_attention_2: ImportError: undefined symbol)")
    assert choose_attention("auto", "fp16", cuda, WITHIN).name == "varlen"
    on_a_gpu(monkeypatch, {"flash_attention_2": "none", "varlen": "RuntimeError: sm_75"}, {})
    found = choose_attention("auto", "fp16", cuda, WITHIN)
    assert (found.name, "sm_75" in found.reason) == ("sdpa", True)


def test_a_timing_runs_every_implementation(flash_attn, varlen_attn):
    for name, shape in (
        ("sdpa", PLAIN),
        ("flash_attention_2", PLAIN),
        ("flash_attention_2", WITHIN),
        ("varlen", WITHIN),
    ):
        assert attention_choice.problem_of(name, torch.bfloat16, CPU, shape) is None
        assert attention_choice.timed(name, torch.float32, CPU, shape) > 0


def test_the_shape_is_read_from_the_configuration():
    model = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64, "attention_dropout": 0.1}
    assert shape_of(model, rows=3, tokens=16, within=True) == Shape(3, 8, 2, 16, 8, True, True)
    assert shape_of(model | {"head_dim": 32}, rows=3, tokens=16, within=False) == Shape(3, 8, 2, 16, 32, False, True)


@pytest.mark.parametrize("documents", ["plain", "within"])
def test_deterministic_kernels_are_asked_for_while_a_run_lasts(documents, flash_attn):
    with deterministic_kernels(True):
        assert torch.are_deterministic_algorithms_enabled()
        step("flash_attention_2", documents)
    assert set(flash_attn.deterministic) == {True}
    assert not torch.are_deterministic_algorithms_enabled()
    flash_attn.deterministic.clear()
    with deterministic_kernels(False):
        step("flash_attention_2", documents)
    assert set(flash_attn.deterministic) == {False}


def test_a_run_keeps_its_kernel_where_timings_are_close(monkeypatch, tmp_path):
    cuda = torch.device("cuda")
    on_a_gpu(monkeypatch, {}, {"flash_attention_2": 0.0020, "sdpa": 0.0019})
    assert choose_attention("auto", "bf16", cuda, PLAIN).name == "flash_attention_2"
    kept = choose_attention("auto", "bf16", cuda, PLAIN, "sdpa")
    assert (kept.name, kept.reason) == ("sdpa", "sdpa (as in the records of this run)")
    assert choose_attention("flash_attention_2", "bf16", cuda, PLAIN, "sdpa").name == "flash_attention_2"  # asked
    on_a_gpu(monkeypatch, {"sdpa": "gone"}, {})
    assert choose_attention("auto", "bf16", cuda, PLAIN, "sdpa").name == "flash_attention_2"  # another machine
    config = RunConfig(branch_from=str(tmp_path / "trunk"), schedule="wsd", decay=2)
    assert recorded_attention(config, tmp_path / "run") is None
    for name, attention in (("trunk", "varlen"), ("run", "sdpa")):
        (tmp_path / name).mkdir()
        record = {"type": "run", "arm": "a", "seed": 0, "attention": {"name": attention}}
        (tmp_path / name / "records.jsonl").write_text(json.dumps(record) + "\n")
        assert recorded_attention(config, tmp_path / "run") == attention
