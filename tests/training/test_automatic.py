"""Settings that are auto: the hardware chooses once, the choice is recorded, and a run keeps it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import assert_continued, losses, records, run_scenarios
from scenarios import SETTINGS, TINY

from phigrow.models.config import load_config
from phigrow.training import RunConfig, automatic
from phigrow.training.automatic import Choice, choice_lines, choose, choose_compile, choose_dtype, recorded_choices
from phigrow.training.process import World

CPU, GPU = torch.device("cpu"), torch.device("cuda")
AUTO = {"dtype": "auto", "compile": "auto"}


def timed(monkeypatch, **seconds: float) -> list[tuple[str, ...]]:
    """Give the timing these results; returns the data types that are asked for."""
    asked: list[tuple[str, ...]] = []

    def times(model: Any, seq_len: int, dtypes: tuple[str, ...]) -> dict[str, float]:
        asked.append(dtypes)
        return {name: seconds[name] for name in dtypes}

    monkeypatch.setattr(automatic, "time_passes", times)
    return asked


def record_of(folder: Path, **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "records.jsonl").write_text(json.dumps({"type": "run", "arm": "a", "seed": 0, **fields}) + "\n")
    return folder


def chosen(config: RunConfig, out: Path, device: torch.device = CPU) -> RunConfig:
    return choose(config, World(0, 1, 0, 1, device), out, lambda: dict(TINY), 16)


def test_a_cpu_takes_what_was_faster(monkeypatch):
    timed(monkeypatch, bf16=0.004, fp32=0.001)
    slow = choose_dtype(RunConfig(), TINY, 16, CPU)
    assert (slow.chosen, slow.seconds) == ("fp32", {"bf16": 0.004, "fp32": 0.001})
    assert slow.reason == "the faster in a timing: bf16 4 ms and fp32 1 ms a pass"
    timed(monkeypatch, bf16=0.0005, fp32=0.001)
    assert choose_dtype(RunConfig(), TINY, 16, CPU).chosen == "bf16"


@pytest.mark.parametrize(
    ("has_bf16", "zero", "dtype"), [(True, 0, "bf16"), (True, 3, "bf16"), (False, 1, "fp16"), (False, 0, "fp32")]
)
def test_a_gpu_takes_bf16_or_fp16_and_never_fp16_at_zero_0(monkeypatch, has_bf16, zero, dtype):
    asked = timed(monkeypatch)
    monkeypatch.setattr(automatic, "has_bf16", lambda: has_bf16)
    assert choose_dtype(RunConfig(zero=zero), TINY, 16, GPU).chosen == dtype
    assert not asked


@pytest.mark.parametrize(
    ("content", "dtype"),
    [
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"bf16": {"enabled": False}}, "fp32"),
        ({"bf16": {"enabled": "auto"}}, "bf16"),
    ],
)
def test_a_deepspeed_file_is_not_contradicted(monkeypatch, tmp_path, content, dtype):
    timed(monkeypatch, bf16=1.0, fp32=2.0)
    (tmp_path / "ds.json").write_text(json.dumps(content))
    assert choose_dtype(RunConfig(deepspeed=str(tmp_path / "ds.json")), TINY, 16, CPU).chosen == dtype


def test_compilation_must_save_more_than_it_costs(monkeypatch):
    probes = []

    def saves(share: float) -> Any:
        return lambda: probes.append(share) or {"plain": 0.01, "compiled": 0.01 * (1 - share)}

    def decided(seconds: float, share: float = 0.25, models: int = 1, device: Any = CPU, **settings: Any) -> Choice:
        return choose_compile(RunConfig(**settings), device, seconds, models, saves(share))

    short = decided(199.0)
    assert (short.chosen, short.reason) == (False, "training of about 199 s is too short for 60 s of compilation")
    assert not decided(399.0, models=2).chosen
    assert not probes  # too short to be worth a timing
    assert not decided(201.0).chosen  # 50 s
    assert decided(260.0).chosen  # 65 s
    assert not decided(1e6, share=-0.01).chosen
    assert decided(400.0).reason == (
        "a timing, plain 10 ms and compiled 7.5 ms a pass; about 100 s saved and 60 s of compilation expected"
    )
    assert decided(400.0).seconds == {"plain": 0.01, "compiled": 0.0075}
    probes.clear()
    assert decided(math.inf, zero=3) == Choice(False, "compile requires ZeRO stage 0, 1 or 2")
    assert decided(math.inf, device=GPU) == Choice(False, "auto compiles on CPUs only")
    monkeypatch.setenv("PATH", "")
    assert decided(math.inf) == Choice(False, "there is no C++ compiler")
    assert not probes


def test_the_timing_is_short_and_counts_its_products():
    for name in ("phi2.json", "phi-1"):
        matrices, tokens = automatic.timed_shapes(load_config(name), 128)
        assert max(max(shape) for shape in matrices) <= automatic.LARGEST_SIDE
        assert len(matrices) == 7  # q, k, v, dense, fc1, fc2 and lm_head
        assert tokens >= 16
    assert automatic.timed_shapes(TINY, 16)[0] == [*[(32, 32)] * 4, (64, 32), (32, 64), (96, 32)]
    tokens = automatic.timed_shapes(TINY, 16)[1]
    assert tokens == 1472  # whole blocks of 16, and at most 1e8 FLOPs
    assert automatic.pass_flops(TINY, 16) == 6 * tokens * (4 * 32 * 32 + 2 * 64 * 32 + 96 * 32)
    seconds = automatic.time_passes(TINY, 16, ("bf16", "fp32"))
    assert all(0 < value < math.inf for value in seconds.values())


def test_a_record_is_kept_whatever_the_hardware_says(monkeypatch, tmp_path):
    timed(monkeypatch, bf16=0.1, fp32=0.2)
    config = RunConfig(**SETTINGS | AUTO)
    fresh = chosen(config, tmp_path / "none")
    assert (fresh.dtype, fresh.compile) == ("bf16", False)
    assert fresh.auto_choices is not None
    assert fresh.auto_choices["dtype"]["asked"] == "auto"
    assert fresh.auto_choices["dtype"]["seconds"] == {"bf16": 0.1, "fp32": 0.2}
    # Records of the first release have values and no choices.
    old = record_of(tmp_path / "old", config={"dtype": "fp16", "compile": True})
    kept = chosen(config, old)
    assert (kept.dtype, kept.compile) == ("fp16", True)
    assert choice_lines(kept.auto_choices) == [
        "dtype: fp16 chosen (as in the records of this run)",
        "compile: true chosen (as in the records of this run)",
    ]
    # A choice that a run has recorded comes back with its timing.
    new = record_of(tmp_path / "new", config={"dtype": "bf16", "compile": False}, auto_choices=fresh.auto_choices)
    assert recorded_choices(new) == fresh.auto_choices
    # A branch without records takes its trunk's; one with records of its own keeps them.
    branch = dataclasses.replace(config, schedule="wsd", branch_from=str(old))
    assert chosen(branch, tmp_path / "none").dtype == "fp16"
    assert chosen(branch, new).dtype == "bf16"
    # What was asked is never replaced.
    assert chosen(RunConfig(**SETTINGS), old).dtype == "fp32"
    assert chosen(RunConfig(**SETTINGS), old).auto_choices is None


def test_a_study_chooses_for_its_runs_before_the_hardware_does(monkeypatch, tmp_path):
    asked = timed(monkeypatch)
    choices = {"dtype": Choice("bf16", "a").record(), "compile": Choice(True, "b").record()}
    config = RunConfig(**SETTINGS | AUTO, auto_choices=choices)
    assert (chosen(config, tmp_path).dtype, chosen(config, tmp_path).compile) == ("bf16", True)
    old = record_of(tmp_path / "old", config={"dtype": "fp32", "compile": False})
    assert (chosen(config, old).dtype, chosen(config, old).compile) == ("fp32", False)
    assert not asked


def scenarios(folder: Path, ranks: int) -> list[dict[str, Any]]:
    base = {"zero": 1, "save_every": 2, "log_every": 2, "export": "export"}
    if ranks == 2:
        return [{"out": "two", **base, "dtype": "auto", "compile": "auto"}]
    return [
        {"out": "auto", **base, **AUTO},
        {"out": "bf16", **base, "dtype": "bf16"},
        {"out": "cut", **base, "dtype": "bf16", "stop_at": 4},
        {"out": "cut", **base, **AUTO},  # the timing would say fp32 on a CPU without bf16 instructions
    ]


@pytest.fixture(scope="module")
def runs(launches) -> Path:
    return launches(__name__)


def test_a_run_records_what_was_chosen_and_why(runs):
    for name in ("auto", "two"):
        (run,) = records(runs / name, "run")
        seconds = run["auto_choices"]["dtype"]["seconds"]
        assert run["config"]["dtype"] == min(seconds, key=seconds.get)
        assert run["config"]["compile"] is False  # six steps do not pay for it
        assert set(run["auto_choices"]) == {"dtype", "compile"}
        assert "auto_choices" not in run["config"]
    (asked,) = records(runs / "bf16", "run")
    assert "auto_choices" not in asked


def test_a_resumed_run_keeps_its_data_type(runs):
    assert_continued(runs / "cut", runs / "bf16")


@pytest.mark.long
def test_a_compiled_run_resumes_to_the_bit(tmp_path):
    base = {"zero": 1, "compile": True, "save_every": 2, "log_every": 2, "export": "export", "eval_blocks": 0}
    run_scenarios(1, tmp_path, [{"out": "whole", **base}])
    run_scenarios(1, tmp_path, [{"out": "cut", **base, "stop_at": 4}])
    run_scenarios(1, tmp_path, [{"out": "cut", **base | {"compile": "auto"}}])
    assert_continued(tmp_path / "cut", tmp_path / "whole")
    (run,) = records(tmp_path / "cut", "run")
    assert run["config"]["compile"] is True
    run_scenarios(1, tmp_path, [{"out": "plain", **base | {"compile": False}}])
    assert losses(tmp_path / "plain") != losses(tmp_path / "whole")  # negative control: it was compiled
