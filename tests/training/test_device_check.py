"""Attention, NCCL and memory are checked before any data is read."""

from __future__ import annotations

import sys

import pytest
import torch

from phigrow.errors import GrowthError
from phigrow.models.capacity import GIB
from phigrow.models.config import load_config
from phigrow.training import RunConfig
from phigrow.training.device_check import check_device, check_memory
from phigrow.training.process import World

PHI2 = load_config("phi2.json")


def test_states_that_do_not_fit_are_refused_with_their_size():
    config = RunConfig(model="phi2", zero=1, dtype="bf16")
    with pytest.raises(GrowthError) as refused:
        check_memory(config, PHI2, 1, 24 * GIB)
    assert "2.78B parameters do not fit into the memory of a GPU" in str(refused.value)
    assert "zero 1, 1 GPU of 24 GiB" in str(refused.value)
    assert "take 52 GiB on each" in str(refused.value)  # 20 bytes a parameter: 2 + 6 + 12
    check_memory(config, PHI2, 1, 80 * GIB)
    check_memory(RunConfig(model="phi2", zero=3, dtype="bf16"), PHI2, 8, 24 * GIB)
    check_memory(RunConfig(model="phi2", zero=2, dtype="bf16", offload_optimizer="cpu"), PHI2, 1, 24 * GIB)


def test_muon_has_one_moment_for_its_matrices():
    config = RunConfig(model="phi2", zero=1, dtype="bf16", optimizer="muon")
    check_memory(config, PHI2, 1, 45 * GIB)  # 4 bytes less for 2.5B parameters
    with pytest.raises(GrowthError, match="take 42 GiB"):
        check_memory(config, PHI2, 1, 40 * GIB)


def test_a_missing_flash_attention_is_told_before_the_data(monkeypatch, tmp_path):
    from phigrow.training import attention_choice

    monkeypatch.setitem(sys.modules, "flash_attn", None)
    attention_choice.forget_trials()
    config = RunConfig(attention="flash_attention_2", data=str(tmp_path / "missing"), dtype="bf16")
    with pytest.raises(GrowthError, match="attention flash_attention_2 does not work here"):
        check_device(config, World(0, 1, 0, 1, torch.device("cpu")))
    check_device(RunConfig(data=str(tmp_path / "missing")), World(0, 1, 0, 1, torch.device("cpu")))


def test_several_gpus_without_nccl_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    gpus = World(0, 2, 0, 2, torch.device("cuda"))
    with pytest.raises(GrowthError, match=r"2 GPUs cannot communicate[\s\S]*no NCCL"):
        check_device(RunConfig(model="phi2"), gpus)


def test_the_memory_of_the_gpu_at_hand_is_read(monkeypatch):
    class Facts:
        total_memory = 8 * GIB

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Facts)
    with pytest.raises(GrowthError, match="1 GPU of 8 GiB"):
        check_device(RunConfig(model="phi2", zero=1, dtype="bf16"), World(0, 1, 0, 1, torch.device("cuda")))
