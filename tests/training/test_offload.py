"""Optimizer and parameters on the host: what DeepSpeed is told, and the same losses as without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import losses, run_scenarios

from phigrow.errors import GrowthError
from phigrow.training import RunConfig
from phigrow.training.engine import engine_config
from phigrow.training.offload import check_disk, offloads_optimizer

RECIPES = Path(__file__).parents[2] / "phigrow" / "recipes"


def zero(config: RunConfig) -> dict[str, Any]:
    found: dict[str, Any] = engine_config(config, 1, 16)["zero_optimization"]
    return found


def test_the_recipes_keys_reach_deepspeed(tmp_path):
    assert zero(RunConfig(zero=2, offload_optimizer="cpu")) == {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    both = RunConfig(zero=3, offload_optimizer="nvme", offload_param="cpu", offload_dir="/disk")
    assert zero(both)["offload_optimizer"] == {"device": "nvme", "nvme_path": "/disk"}
    assert zero(both)["offload_param"] == {"device": "cpu"}
    path = tmp_path / "engine.json"
    path.write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}}))
    from_file = engine_config(RunConfig(zero=1, deepspeed=str(path)), 1, 16)
    assert from_file["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert offloads_optimizer(from_file)
    assert not offloads_optimizer(engine_config(RunConfig(zero=1), 1, 16))
    with pytest.raises(GrowthError, match="offload_optimizer is nvme, but the DeepSpeed file has cpu"):
        zero(RunConfig(zero=3, deepspeed=str(path), offload_optimizer="nvme", offload_dir="/disk"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero": 0, "offload_optimizer": "cpu"}, "offload_optimizer to cpu requires ZeRO stage 1 or more .got 0"),
        ({"zero": 2, "offload_param": "cpu"}, "offload_param to cpu requires ZeRO stage 3 or more .got 2"),
        (
            {"zero": 2, "offload_optimizer": "nvme", "offload_dir": "/d"},
            "offload_optimizer to nvme requires ZeRO stage 3 or more .got 2",
        ),
        ({"zero": 3, "offload_param": "nvme"}, "offload_param to nvme requires offload_dir"),
        ({"zero": 3, "offload_param": "disk"}, "offload_param is 'disk'"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused(settings, message):
    with pytest.raises(GrowthError, match=message):
        zero(RunConfig(**settings))


def test_a_disk_without_asynchronous_reads_is_refused(monkeypatch):
    from deepspeed.ops import op_builder

    class Missing:
        def is_compatible(self, verbose: bool = True) -> bool:
            return False

    monkeypatch.setattr(op_builder, "AsyncIOBuilder", Missing)
    with pytest.raises(GrowthError, match="its async_io needs libaio"):
        check_disk({"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/d"}}})
    check_disk({"zero_optimization": {"offload_param": {"device": "cpu"}}})


@pytest.mark.long
def test_offload_changes_no_loss(tmp_path: Path):
    """DeepSpeed compiles its CPU Adam first, which takes a minute or two."""
    runs: list[dict[str, Any]] = []
    for dtype in ("fp32", "bf16"):
        runs += [
            {"out": f"{dtype}-2", "dtype": dtype, "zero": 2},
            {"out": f"{dtype}-1-optimizer", "dtype": dtype, "zero": 1, "offload_optimizer": "cpu"},
            {"out": f"{dtype}-2-optimizer", "dtype": dtype, "zero": 2, "offload_optimizer": "cpu"},
            {"out": f"{dtype}-3-optimizer", "dtype": dtype, "zero": 3, "offload_optimizer": "cpu"},
            {"out": f"{dtype}-3-both", "dtype": dtype, "zero": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
        ]
    kept = {"dtype": "bf16", "zero": 3, "offload_optimizer": "cpu", "offload_param": "cpu", "save_every": 3}
    for file in ("zero1", "zero2", "zero3", "zero2-offload", "zero3-offload", "zero3-96"):
        # Buckets of 1 GB are not made for CPU ranks of a test; everything else is the file's.
        engine = json.loads((RECIPES / "deepspeed" / f"{file}.json").read_text())
        for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
            if key in engine["zero_optimization"]:
                engine["zero_optimization"][key] = 100_000
        (tmp_path / f"{file}.json").write_text(json.dumps(engine))
        small = {"dtype": "bf16", "steps": 2, "warmup": 1, "eval_every": 0}
        runs.append({"out": file, **small, "deepspeed": str(tmp_path / f"{file}.json")})
    runs += [{"out": "cut", **kept, "stop_at": 3}, {"out": "cut", **kept}]
    runs.append({"out": "other", "dtype": "fp32", "zero": 2, "offload_optimizer": "cpu", "beta2": 0.5})
    run_scenarios(2, tmp_path, runs)
    for dtype, tolerance in (("fp32", 2e-6), ("bf16", 5e-4)):
        plain = losses(tmp_path / f"{dtype}-2")
        for name in ("1-optimizer", "2-optimizer", "3-optimizer", "3-both"):
            found = losses(tmp_path / f"{dtype}-{name}")
            print(dtype, name, np.abs(np.divide(found, plain) - 1).max())
            np.testing.assert_allclose(found, plain, rtol=tolerance)
    for file in ("zero2", "zero3", "zero2-offload", "zero3-offload", "zero3-96"):
        np.testing.assert_allclose(losses(tmp_path / file), losses(tmp_path / "zero1"), rtol=5e-4)
    assert losses(tmp_path / "cut") == losses(tmp_path / "bf16-3-both")
    # A negative control: another optimizer is another curve.
    assert np.abs(np.divide(losses(tmp_path / "other"), losses(tmp_path / "fp32-2")) - 1).max() > 1e-4
