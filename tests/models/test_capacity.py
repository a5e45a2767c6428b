"""Memory, time and cost against DeepSpeed's own estimators, published runs and arithmetic by hand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from types import SimpleNamespace

import pytest

from phigrow.errors import GrowthError
from phigrow.models.capacity import (
    GIB,
    LAYOUTS,
    PEAK_FLOPS,
    REDUCE_BUCKET,
    RESERVED,
    SELECTIVE,
    States,
    ZeroLayout,
    activations,
    capacity,
    lightest_recomputation,
    model_states,
    muon_parameters,
    parse_amount,
    parse_gpus,
)
from phigrow.models.config import load_config

PHI_2 = 2_779_683_840


@pytest.mark.parametrize("ranks", [1, 8, 96])
def test_states_agree_with_deepspeeds_estimators(ranks):
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    nodes, each = max(1, ranks // 8), min(ranks, 8)

    def two(offload: bool) -> int:
        return estimate_zero2_model_states_mem_needs(PHI_2, each, nodes, cpu_offload=offload)[1]

    def three(offload: bool, param: bool) -> int:  # without the largest layer, which is a buffer here
        return estimate_zero3_model_states_mem_needs(PHI_2, 0, each, nodes, offload, param)[1]

    def held(*layout: int) -> float:
        return model_states(PHI_2, ranks, ZeroLayout(*layout)).held

    # At stage 2 the estimator counts the bf16 gradients beside their fp32 sums; DeepSpeed frees them bucket by bucket.
    assert held(2) == pytest.approx(two(False) - 2 * PHI_2 / ranks, rel=1e-6)
    assert held(2, True) == pytest.approx(two(True), rel=1e-6)
    assert held(3) == pytest.approx(three(False, False), rel=1e-6)
    assert held(3, True) == pytest.approx(three(True, False), rel=1e-6)
    assert held(3, True, True) == pytest.approx(three(True, True), abs=1)
    assert held(1) > 1.05 * held(2)  # a negative control: another stage is another number


def test_states_by_hand():
    states = model_states(10**9, 4, ZeroLayout(2), bucket=10**8)
    assert (states.weights, states.gradients, states.optimizer) == (2e9, 1e9, 3e9)
    assert (states.buffers, states.reduction, states.host) == (4e8, 6e8, 0)
    offloaded = model_states(10**9, 4, ZeroLayout(3, True, True), bucket=10**8, live=10**8)
    assert (offloaded.held, offloaded.buffers, offloaded.host) == (0, 6e8, 4.5e9)
    assert model_states(10**9, 4, ZeroLayout(0), dtype="fp32").held == 16e9


def test_muon_keeps_one_moment_of_matrices_inside_layers():
    adam, muon = (model_states(10**9, 4, ZeroLayout(1), muon=count) for count in (0, 9 * 10**8))
    assert (adam.optimizer - muon.optimizer, adam.held - muon.held) == (9e8, 9e8)
    phi2 = load_config("phi2")
    assert muon_parameters(phi2) == 32 * (4 * 2560**2 + 2 * 2560 * 10240)
    found = capacity(phi2, "8x80", optimizer="muon")
    assert [fit.layout.stage for fit in found.fits] == [1, 3]
    assert found.recipe["optimizer"] == "muon"
    less = capacity(phi2, "8x80").fits[1].states.optimizer - found.fits[0].states.optimizer
    assert less == 4 * muon_parameters(phi2) / 8
    with pytest.raises(GrowthError, match="no memory formula for the optimizer 'lion'"):
        capacity(phi2, "8x80", optimizer="lion")


def test_activations_grow_with_tokens_and_shrink_with_checkpointing():
    phi2 = load_config("phi2")
    one, two = (activations(phi2, rows, 2048, loss="chunked") for rows in (1, 2))
    assert two.kept == 2 * one.kept
    layer = 2 * (7 * 2560 + 2 * 10240) + 4 * 32 + 8 + 4 * 2560
    assert one.kept == 2048 * (32 * layer + 4 * 2560 + 8)
    again = activations(phi2, 1, 2048, loss="chunked", checkpointing=True)
    assert again.kept == 2048 * (32 * 2 * 2560 + 4 * 2560 + 8)
    assert again.peak > again.kept + 2048 * layer


def test_cheap_recomputation_keeps_products_and_is_advised_where_it_is_enough():
    phi2 = load_config("phi2")
    kept, cheap, again = (
        activations(phi2, 1, 2048, loss="chunked", checkpointing=each) for each in (False, SELECTIVE, True)
    )
    assert cheap.kept == 2048 * (32 * (2 * (6 * 2560 + 10240) + 4 * 32) + 4 * 2560 + 8)
    assert again.kept < cheap.kept < 0.7 * kept.kept
    assert again.peak < cheap.peak < kept.peak

    def advised(rows: int, checkpointing: bool | str = False) -> bool | str | None:
        options = {"gpus": "8x24", "micro_batch": rows}
        return lightest_recomputation(capacity(phi2, checkpointing=checkpointing, **options), phi2, **options)

    assert [advised(rows) for rows in (4, 16, 64)] == [SELECTIVE, True, None]
    assert (advised(16, SELECTIVE), advised(64, True)) == (True, None)
    assert capacity(phi2, "8x24", checkpointing=SELECTIVE).recipe["activation_checkpointing"] == SELECTIVE


@pytest.mark.parametrize(
    ("name", "gpus", "tokens", "days", "mfu"),
    [
        # phi-2, "14 days on 96 A100" for 1.4T tokens; phi-1.5, 150B tokens in 1.5K A100 hours (2309.05463, table 1);
        # phi-1-base, 51B tokens in 770 A100 hours (2306.11644).
        ("phi2", "96x80", 1.4e12, 14, 0.691),
        ("phi-1_5", "32x40", 150e9, 1500 / 32 / 24, 0.809),
        ("phi-1", "8x80", 51e9, 770 / 8 / 24, 0.536),
    ],
)
def test_published_runs_imply_their_mfu(name, gpus, tokens, days, mfu):
    found = capacity(name, gpus, tokens=tokens, mfu=1.0)
    assert found.seconds is not None
    assert found.seconds / 86400 / days == pytest.approx(mfu, abs=0.001)


def test_the_largest_micro_batch_is_the_largest_that_fits():
    found = capacity("phi2", "8x80")
    assert found.batch == 512
    for fit in found.fits:
        assert fit.total <= found.usable_bytes == 80 * GIB * (1 - RESERVED)
        more = capacity("phi2", "8x80", micro_batch=2 * fit.largest)
        (next_one,) = [each for each in more.fits if each.layout == fit.layout]
        assert not next_one.fits
    assert found.chosen == ZeroLayout(1)
    assert [fit.layout for fit in found.fits] == list(LAYOUTS)


def test_smaller_gpus_need_higher_stages_then_offload_then_nothing_fits():
    chosen = [
        capacity("phi2", gpus, micro_batch=1, checkpointing=True).chosen
        for gpus in ("8x80", "8x24", "8x16", "1x80", "1x24", "1x2")
    ]
    assert chosen == [ZeroLayout(1), ZeroLayout(2), ZeroLayout(3), ZeroLayout(1), ZeroLayout(2, True), None]


def test_the_choice_is_said_in_keys_that_a_run_takes():
    from phigrow.training import RunConfig
    from phigrow.training.engine import engine_config

    for gpus in ("8x80", "8x24", "8x16", "1x24"):
        found = capacity("phi2", gpus, checkpointing=True)
        assert found.chosen is not None
        config = RunConfig(model="phi2", **found.recipe)
        assert config.activation_checkpointing
        zero = engine_config(config, found.gpus, found.recipe["micro_batch"])["zero_optimization"]
        assert zero["stage"] == found.chosen.stage
        assert ("offload_optimizer" in zero) == found.chosen.offload_optimizer
    assert ZeroLayout(3, True, True).keys == {"zero": 3, "offload_optimizer": "cpu", "offload_param": "cpu"}
    assert capacity("phi2", "1x2").recipe == {}
    with pytest.raises(GrowthError, match="choose a multiple of 96, such as 2016 or 2112"):
        capacity("phi2", "96x80", batch=2048)


def test_time_and_cost_are_arithmetic():
    found = capacity("phi2", "8x80", tokens=1e11, mfu=0.5, peak="h100", price=2.5)
    assert found.flops is not None
    assert found.seconds == pytest.approx(found.flops / (8 * PEAK_FLOPS["h100"] * 0.5))
    assert found.cost == pytest.approx(2.5 * 8 * found.seconds / 3600)
    assert capacity("phi2", "8x80").seconds is None


def test_other_models_are_refused_rather_than_guessed():
    with pytest.raises(GrowthError, match="capacity has no memory formula for model_type 'llama'"):
        capacity(load_config("phi2") | {"model_type": "llama"}, "8x80")


def test_amounts_and_gpus_are_read_strictly():
    assert [parse_amount(text) for text in ("100B", "1.4T", "5e9", "250_000", "3M")] == [1e11, 1.4e12, 5e9, 2.5e5, 3e6]
    assert parse_gpus("8x80GB") == parse_gpus("8x80GiB") == (8, 80 * GIB)
    for text in ("", "B", "-1", "0", "1e999", "nan", "1 000"):
        with pytest.raises(GrowthError, match="is not a positive amount"):
            parse_amount(text)
    for text in ("", "8", "8x", "x80", "0x80", "8x0", "-8x80", "8x80x2", "8.5x80"):
        with pytest.raises(GrowthError, match="number x memory in GiB"):
            parse_gpus(text)


def most_bytes(work: Callable[[], object]) -> int:
    """Return the most bytes of tensors at any moment of some work, over those before it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        work()
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]
    return max(accumulate(changes), default=0)


@pytest.mark.parametrize("reduce_dtype", ["fp32", "bf16"])
def test_deepspeed_copies_a_bucket_as_often_as_the_formula_says(monkeypatch, reduce_dtype):
    """Its own functions sum a bucket, with collectives that do nothing, at stages 2, 3, 0 and 1."""
    import torch
    from deepspeed import comm
    from deepspeed.runtime.comm import coalesced_collectives
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero import stage_1_and_2
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    for name, value in (("all_reduce", None), ("get_world_size", 1), ("get_rank", 0)):
        monkeypatch.setattr(comm, name, lambda *_, value=value, **__: value)
    monkeypatch.setitem(vars(coalesced_collectives), "_torch_reduce_scatter_fn", lambda *_, **__: None)
    dtype, bucket = {"fp32": torch.float32, "bf16": torch.bfloat16}[reduce_dtype], 300_000
    gradients = [torch.zeros(100_000, dtype=torch.bfloat16) for _ in range(3)]
    common = {"dp_process_group": None, "gradient_average": True, "overlap_comm": False, "sequence_parallel_size": 1}
    flatten = vars(stage_1_and_2)["_flatten_dense_tensors"]

    def computed(stage: int, parameters: int = bucket) -> States:
        return model_states(parameters, 1, ZeroLayout(stage), reduce_dtype=reduce_dtype, bucket=bucket)

    two = SimpleNamespace(**common, flatten=flatten)
    measured = most_bytes(lambda: DeepSpeedZeroOptimizer.allreduce_bucket(two, gradients, dtype))
    assert measured / computed(2).reduction == pytest.approx(1, abs=0.01)
    waiting = SimpleNamespace(
        ready_for_gradients=False, micro_step_id=0, contiguous_gradients=True, overlap_comm=True,
        reduce_bucket_size=bucket, ipg_buckets={dtype: SimpleNamespace(buffer=[])},
        _gradient_reduction_buffer_dtype=lambda: torch.bfloat16,
    )  # fmt: skip
    measured = most_bytes(lambda: DeepSpeedZeroOptimizer.setup_buckets(waiting))
    assert measured / computed(2).buffers == pytest.approx(1, abs=0.01)
    # At stage 3 gradients are views of a bucket in the data type of the reduction.
    views = [torch.zeros(100_000, dtype=dtype) for _ in range(3)]
    measured = most_bytes(
        lambda: [part.to(torch.float32) for part in coalesced_collectives.reduce_scatter_coalesced(views)]
    )
    assert measured / computed(3).reduction == pytest.approx(1, abs=0.01)
    # Stage 0 sums gradients of the model; stage 1 in bf16 sums flat fp32 gradients, here of two groups.
    engine = SimpleNamespace(
        flatten=flatten, communication_data_type=dtype, gradient_average=True,
        postscale_gradients=lambda: True, gradient_predivide_factor=lambda: 1.0,
    )  # fmt: skip
    measured = most_bytes(lambda: DeepSpeedEngine.allreduce_bucket(engine, gradients, None))
    assert measured / computed(0).step == pytest.approx(1, abs=0.01) or reduce_dtype == "bf16"
    groups = [torch.zeros(290_000), torch.zeros(10_000)]
    measured = most_bytes(lambda: DeepSpeedEngine.allreduce_bucket(engine, groups, None))
    assert measured / computed(1).step == pytest.approx(1, abs=0.01)
    alone = most_bytes(lambda: DeepSpeedEngine.allreduce_bucket(engine, groups[:1], None))
    beyond = computed(1, 2 * REDUCE_BUCKET).step / (2 * REDUCE_BUCKET)  # bytes a parameter
    assert alone / 290_000 == pytest.approx(beyond, abs=0.01)


def test_reduction_is_counted_beside_activations():
    phi2, layout = load_config("phi2"), ZeroLayout(2)
    half, full = (model_states(PHI_2, 8, layout, reduce_dtype=dtype) for dtype in ("bf16", "fp32"))
    assert full.reduction - half.reduction == 4 * REDUCE_BUCKET
    assert full.peak(1e9) - half.peak(1e9) == pytest.approx(full.reduction + 1e9 - max(half.reduction + 1e9, half.step))
    (fit,) = [fit for fit in capacity(phi2, "8x80", micro_batch=1).fits if fit.layout == layout]
    assert (
        fit.total == full.peak(fit.activations.peak) == full.held + full.buffers + full.reduction + fit.activations.peak
    )
