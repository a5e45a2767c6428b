"""A T4 or V100, as in free notebooks, shown by stand-ins for PyTorch's answers: emulated bf16, no flash attention."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from jobs import prepared, words
from launching import ROOT

from phigrow.errors import GrowthError
from phigrow.models.capacity import capacity
from phigrow.models.config import load_config
from phigrow.study.foreground import pretrain
from phigrow.training import RunConfig, attention_choice, load_run_config
from phigrow.training.attention import FUNCTIONS
from phigrow.training.attention_choice import Shape, choose_attention, forget_trials
from phigrow.training.automatic import choose_dtype
from phigrow.training.engine import check_dtype, engine_config, micro_batch

GPU = torch.device("cuda")
T4 = 14.7
"""GiB that a T4 of 16 GB reports."""


@pytest.fixture
def notebook() -> RunConfig:
    """The recipe for one GPU of 16 GB."""
    return load_run_config("notebook")


@pytest.fixture
def t4(monkeypatch) -> None:
    """PyTorch on a T4: it counts emulated bf16 as supported, unless it is asked not to."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)


def test_auto_is_fp16_with_a_loss_scale_where_bf16_is_emulated(t4, monkeypatch, notebook):
    chosen = choose_dtype(notebook, load_config("phi-1-small.json"), 2048, GPU)
    assert (chosen.chosen, chosen.reason) == ("fp16", "the device has no bf16")
    written = engine_config(RunConfig(**{**vars(notebook), "dtype": "fp16"}), 1, 2)
    assert written["fp16"] == {"enabled": True}  # DeepSpeed then searches the scale from 2^16
    assert written.get("bf16", {}).get("enabled") is not True
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert choose_dtype(notebook, load_config("phi-1-small.json"), 2048, GPU).chosen == "bf16"  # negative control


def test_bf16_is_refused_where_it_is_emulated(t4, monkeypatch):
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    with pytest.raises(GrowthError, match=r"dtype bf16 does not work on this device[\s\S]*dtype: fp16 or fp32"):
        check_dtype(RunConfig(dtype="bf16"))
    check_dtype(RunConfig(dtype="fp16"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    check_dtype(RunConfig(dtype="bf16"))


@pytest.mark.parametrize("within", [False, True])
def test_attention_falls_back_to_pytorchs_own(monkeypatch, within):
    def ampere(*_: Any, **__: Any) -> Any:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    inputs = attention_choice.random_inputs
    monkeypatch.setattr(attention_choice, "random_inputs", lambda shape, dtype, device: inputs(shape, dtype, "cpu"))  # type: ignore[arg-type]
    for name in ("flash_attention_2", "varlen"):
        monkeypatch.setitem(FUNCTIONS, name, ampere)
    forget_trials()
    chosen = choose_attention("auto", "fp16", GPU, Shape(2, 16, 16, 128, 64, within))
    assert chosen.name == "sdpa"
    assert "flash_attention_2: RuntimeError: FlashAttention only supports Ampere GPUs" in chosen.reason
    with pytest.raises(GrowthError, match="only supports Ampere"):
        choose_attention("flash_attention_2", "fp16", GPU, Shape(2, 16, 16, 128, 64, within))
    forget_trials()


@pytest.mark.parametrize("gpus", [1, 2])
def test_the_recipe_fits_the_memory_that_a_t4_reports(gpus, notebook):
    planned = capacity("phi-1-small.json", f"{gpus}x{T4}", batch=notebook.batch, micro_batch=notebook.micro_batch)
    assert next(fit for fit in planned.fits if fit.layout.stage == notebook.stage).fits
    assert micro_batch(notebook, gpus, 2048) == 2
    larger = capacity("phi-1-small.json", f"{gpus}x{T4}", batch=notebook.batch, micro_batch=8)
    assert not next(fit for fit in larger.fits if fit.layout.stage == notebook.stage).fits  # negative control


def test_a_notebook_with_two_gpus_starts_two_ranks(monkeypatch, tmp_path):
    """Kaggle has two T4; the words after the command are those for one GPU."""
    started: list[list[str]] = []

    class Ended:
        def __init__(self, command: list[str], **_: Any) -> None:
            started.append(command)

        def wait(self) -> int:
            return 0

        def poll(self) -> int:
            return 0

    monkeypatch.setattr("phigrow.study.foreground.subprocess.Popen", Ended)
    for place in ("phigrow.study.foreground", "phigrow.study.launch"):
        monkeypatch.setattr(f"{place}.gpus", lambda: 2)
    assert pretrain(["notebook", "--data", str(tmp_path)]) == 0
    (command,) = started
    assert command[command.index("--module") + 1 :] == ["phigrow.training", "notebook", "--data", str(tmp_path)]


@pytest.mark.long
def test_a_run_needs_no_compiler_and_no_home_that_can_be_written(tmp_path):
    folder = prepared(tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    given = words(folder, "run", steps=6, warmup=1, save_every=3, eval_every=3, compile="auto", dtype="auto")
    done = subprocess.run(
        [sys.executable, "-m", "phigrow.cli", "pretrain", *given],
        env={"PATH": str(tools), "HOME": "/proc/sys/kernel", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "step 6/6  held-out loss" in done.stdout
