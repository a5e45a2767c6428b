"""Steps that go wrong are skipped, counted and named; spikes are flagged; and nobody reads the device meanwhile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import losses, records, run_scenarios

from phigrow.corpus.order import rank_rows, step_rows
from phigrow.errors import GrowthError
from phigrow.measure import load_run
from phigrow.training.anomalies import NonFinite, Spikes
from phigrow.training.step import Reading

STAGES = [("fp32", 0), ("fp32", 2), ("bf16", 0), ("bf16", 1), ("bf16", 2), ("bf16", 3)]
LOSS = {"rank": 1, "calls": [4], "what": "loss"}  # two micro-batches a step: the first one of the third step
GRADIENT = {"rank": 0, "calls": [5], "what": "gradient"}
FOREVER = {"rank": 1, "calls": list(range(4, 100)), "what": "loss"}


def scenarios(folder: Path, ranks: int) -> list[dict[str, Any]]:
    if ranks != 2:
        return []
    runs: list[dict[str, Any]] = []
    for dtype, stage in STAGES:
        base = {"zero": stage, "dtype": dtype, "steps": 5, "micro_batch": 2, "eval_every": 1}
        runs += [
            {"out": f"{dtype}-{stage}-clean", **base, "eval_every": 0, "count_reads": True},
            {"out": f"{dtype}-{stage}-loss", **base, "poison": LOSS},
            {"out": f"{dtype}-{stage}-gradient", **base, "poison": GRADIENT},
        ]
    limit = {"out": "limit", "zero": 2, "steps": 6, "micro_batch": 2, "eval_every": 0, "save_every": 2}
    runs += [
        {**limit, "poison": FOREVER, "nonfinite_limit": 2, "log_every": 1},
        {**limit, "nonfinite_limit": 2},
        {**limit, "out": "limit-clean", "log_every": 1, "count_reads": True},
    ]
    return runs


@pytest.fixture(scope="module")
def runs(launches) -> Path:
    return launches(__name__)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize(("dtype", "stage"), STAGES)
def test_a_step_that_is_not_finite_changes_nothing_on_any_rank(runs, dtype, stage, what):
    run = runs / f"{dtype}-{stage}-{what}"
    held_out, steps = losses(run, "eval"), records(run, "step")
    assert held_out[3] == held_out[2]  # to the bit: no weight moved
    assert len({held_out[k] for k in (1, 2, 4, 5)}) == 4  # the first step has lr 0
    assert [step["step"] for step in steps if step.get("skipped")] == [3]
    assert np.isfinite([step["loss"] for step in steps if step["step"] != 3]).all()
    assert [step["lr"] for step in steps] == [step["lr"] for step in records(runs / f"{dtype}-{stage}-clean", "step")]


@pytest.mark.parametrize(("dtype", "stage"), STAGES)
def test_a_skipped_step_leaves_no_trace_in_the_optimizer(runs, dtype, stage):
    loss, gradient, clean = (losses(runs / f"{dtype}-{stage}-{what}") for what in ("loss", "gradient", "clean"))
    assert loss[3:] == gradient[3:]  # whatever was poisoned, and where
    reference = losses(runs / "fp32-0-loss")[3:]
    np.testing.assert_allclose(loss[3:], reference, rtol=2e-6 if dtype == "fp32" else 1e-3)
    # Negative control: an update more or less is seen by this comparison.
    assert np.abs(np.subtract(clean[3:], loss[3:])).min() > 2e-3


def test_the_blocks_of_the_step_are_recorded(runs):
    rows = step_rows(0, 2, 8, 64)
    (step,) = [step for step in records(runs / "bf16-2-loss", "step") if step.get("skipped")]
    assert step["blocks"] == rank_rows(rows, 1, 2, 2)[0].tolist()
    assert np.isnan(step["loss"])
    (step,) = [step for step in records(runs / "bf16-2-gradient", "step") if step.get("skipped")]
    assert step["blocks"] == rows.tolist()
    assert np.isfinite(step["loss"])
    assert load_run(runs / "bf16-2-loss").diverged_at is None


def test_the_limit_ends_every_rank_and_the_checkpoint_from_before_goes_on(runs):
    for rank in (0, 1):
        text = (runs / "limit" / f"error-{rank}.txt").read_text()
        assert "2 steps of this launch were skipped, the last one at step 4" in text
        rows = rank_rows(step_rows(0, 3, 8, 64), 1, 2, 2)
        listed = ", ".join(str(row) for row in [*rows[0], *rows[1]])
        assert f"the loss is not finite in blocks {listed}\n" in text
        assert "lower lr" in text
    assert losses(runs / "limit") == losses(runs / "limit-clean")


@pytest.mark.parametrize(("dtype", "stage"), STAGES)
def test_the_steps_read_the_device_when_logging_asks_and_not_else(runs, dtype, stage):
    found = json.loads((runs / f"{dtype}-{stage}-clean" / "reads.json").read_text())
    # log_every is 3: read after steps 3 and 5, the last one. What DeepSpeed reads to clip and to skip is its own.
    assert {name: count for name, count in found.items() if name != "deepspeed"} == {"step.py": 2}
    # At stage 0 it looks at every gradient by itself, at stage 3 at every partition; else a few times a step.
    assert (dtype, stage) in (("bf16", 0), ("bf16", 3)) or found.get("deepspeed", 0) <= 4 * 5


def test_every_step_is_read_where_logging_asks_for_every_step(runs):
    # Negative control of the count.
    assert json.loads((runs / "limit-clean" / "reads.json").read_text())["step.py"] == 6


def reading(step: int, loss: float, norm: float, *broken: int) -> Reading:
    return Reading(step, 0.1, 0.0, loss, 1e-3, norm, False, broken)


def test_fp16_overflows_are_not_counted_and_others_are():
    watch = NonFinite(2, "fp16")
    for step in range(9):
        watch.check(reading(step, 2.0, float("inf")), [1, 2])
    assert watch.count == 0
    watch.check(reading(10, float("nan"), float("inf"), 7), [7, 8])
    with pytest.raises(GrowthError, match="2 steps of this launch were skipped, the last one at step 11"):
        watch.check(reading(11, float("nan"), float("inf"), 7), [7, 8])
    strict = NonFinite(1, "bf16")
    with pytest.raises(GrowthError, match=r"a gradient is not finite, over blocks 0, 1.* and 8 more"):
        strict.check(reading(1, 2.0, float("inf")), range(40))
    endless = NonFinite(0, "bf16")
    for step in range(99):
        endless.check(reading(step, float("nan"), float("nan")), [1])
    assert endless.count == 99


def curve(seed: int, steps: int = 2000) -> np.ndarray:
    """A loss as small models have it: a power law with noise of a few percent."""
    noise = np.random.default_rng(seed).normal(0.0, 0.03, steps)
    return 2.0 + 6.0 * (1 + np.arange(steps) / 20) ** -0.5 + noise


def test_spikes_are_flagged_and_noise_is_not():
    wrong = 0
    for seed in range(10):
        spikes, series = Spikes(), curve(seed)
        wrong += sum(spikes.is_spike(loss) for loss in series)
    assert wrong <= 1  # of 20,000 steps
    for seed in range(10):
        spikes, series = Spikes(), curve(seed)
        places = {600, 601, 900, 1500}
        series[list(places)] += 0.5
        found = {step for step, loss in enumerate(series) if spikes.is_spike(loss)}
        assert places <= found
        assert len(found - places) <= 1


def test_a_new_level_is_a_spike_only_until_it_is_the_median():
    spikes, series = Spikes(), curve(0)
    series[1000:] += 1.0
    found = [step for step, loss in enumerate(series) if spikes.is_spike(loss)]
    assert 1000 in found
    assert 40 <= len(found) <= 60
    assert not Spikes().is_spike(1e9)  # nothing is known yet
    assert not Spikes([2.0] * 100).is_spike(float("nan"))  # that is another matter


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "stage", "tolerance"), [("fp32", 0, 2e-6), ("bf16", 1, 1e-3)])
def test_a_compiled_model_loses_as_the_model_does(tmp_path, dtype, stage, tolerance):
    base = {"zero": stage, "dtype": dtype, "steps": 4}
    run_scenarios(1, tmp_path, [{**base, "out": "plain"}, {**base, "out": "compiled", "compile": True}])
    for kind in ("step", "eval"):
        plain, compiled = losses(tmp_path / "plain", kind), losses(tmp_path / "compiled", kind)
        np.testing.assert_allclose(compiled, plain, rtol=tolerance)
    assert compiled != plain  # something was compiled: not one bit would differ otherwise
