"""Attention, NCCL and memory are checked before any data is read."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from phigrow.errors import GrowthError
from phigrow.models.capacity import GIB
from phigrow.models.config import load_config
from phigrow.training import RunConfig
from phigrow.training.device_check import check_device, check_memory
from phigrow.training.gpu_setup import Gpu, check_gpus_work, check_together
from phigrow.training.process import World, environment_kept, start

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


def gpu(name: str = "A100", memory: int = 80, free: int | None = None, bf16: bool = True, host: str = "a") -> Gpu:
    """Memory in GiB."""
    return Gpu(host, name, memory * GIB, (memory if free is None else free) * GIB, bf16)


@pytest.fixture
def cuda(monkeypatch):
    """A host with two A100 and a PyTorch that sees them, as far as the checks look."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device=None: ones(*size))


def test_working_gpus_are_accepted(cuda):
    check_gpus_work(2, 1)


def test_several_gpus_without_nccl_are_refused_before_the_process_group(cuda, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with environment_kept(), pytest.raises(GrowthError, match=r"2 GPUs cannot communicate[\s\S]*no NCCL"):
        start()
    check_gpus_work(1, 0)  # one GPU needs none


def test_ranks_on_the_cpu_of_a_host_with_gpus_are_no_concern_of_theirs(cuda, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    check_gpus_work(8, 7)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(GrowthError, match="LOCAL_RANK is 7"):
        check_gpus_work(8, 7)


@pytest.mark.parametrize("device", ["cpu", "xpu", "hpu"])
def test_gpus_that_pytorch_does_not_see_are_no_matter_to_a_run_on_another_device(monkeypatch, tmp_path, device):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr("phigrow.training.gpu_setup.DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", device)
    check_gpus_work(1, 0)
    monkeypatch.delenv("DS_ACCELERATOR")
    with pytest.raises(GrowthError, match="PyTorch cannot use them"):
        check_gpus_work(1, 0)


def test_more_ranks_than_gpus_are_refused(cuda, monkeypatch):
    with pytest.raises(GrowthError, match=r"LOCAL_RANK is 2, but this host has 2 devices"):
        check_gpus_work(3, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100 MIG 3g.40gb")
    with pytest.raises(GrowthError, match=r"this host has 1 device\n[\s\S]*sees one MIG instance at most"):
        check_gpus_work(2, 1)


def test_a_gpu_that_this_pytorch_was_not_built_for_is_refused(cuda, monkeypatch):
    def fail(*size: int, device: Any) -> Any:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr(torch, "ones", fail)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P100-PCIE-16GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 0))
    with pytest.raises(GrowthError) as refused:
        check_gpus_work(1, 0)
    assert "the GPU Tesla P100-PCIE-16GB runs no kernel" in str(refused.value)
    assert "no kernel image is available for execution on the device; the GPU is sm_60" in str(refused.value)
    assert "is built for sm_75, sm_80" in str(refused.value)


@pytest.fixture
def device_files(monkeypatch, tmp_path):
    """A host with the device file of one GPU, which PyTorch does not see."""
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr("phigrow.training.gpu_setup.DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def test_gpus_that_pytorch_does_not_see_are_no_run_on_a_cpu(device_files, monkeypatch):
    with pytest.raises(GrowthError, match=r"GPUs, but PyTorch cannot use them\n  where: /dev/nvidia0\n.*without CUDA"):
        check_gpus_work(1, 0)
    monkeypatch.setattr(torch.version, "cuda", "12.8")

    def old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update")

    monkeypatch.setattr(torch.cuda, "init", old)
    with pytest.raises(GrowthError, match=r"too old \(found version 11040\)[\s\S]*what to do: update the driver"):
        check_gpus_work(1, 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(GrowthError, match=r"CUDA_VISIBLE_DEVICES is 7\n[\s\S]*correct CUDA_VISIBLE_DEVICES"):
        check_gpus_work(1, 0)


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_gpus_that_the_user_has_hidden_and_hosts_without_any_are_no_error(device_files, monkeypatch, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    check_gpus_work(1, 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (device_files / "nvidia0").unlink()
    check_gpus_work(1, 0)


def test_the_memory_of_the_gpu_at_hand_is_read(monkeypatch):
    class Facts:
        total_memory, name = 8 * GIB, "small"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Facts)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    with pytest.raises(GrowthError, match="1 GPU of 8 GiB"):
        check_device(RunConfig(model="phi2", zero=1, dtype="bf16"), World(0, 1, 0, 1, torch.device("cuda")))


RUN = RunConfig(model="phi2", zero=1, dtype="bf16")
TWO = World(0, 2, 0, 2, torch.device("cuda"))


def test_memory_that_another_process_uses_is_named():
    with pytest.raises(GrowthError) as refused:
        check_device(RUN, TWO, [gpu(), gpu(free=20, host="b")])
    assert "only 20.0 GiB of the 80 GiB of a GPU are free" in str(refused.value)
    assert "rank 1, A100 on b" in str(refused.value)
    assert "nvidia-smi" in str(refused.value)
    check_device(RUN, TWO, [gpu(), gpu(free=70)])


def test_the_smallest_gpu_counts_and_different_ones_are_named(capsys):
    with pytest.raises(GrowthError, match="2 GPUs of 24 GiB"):
        check_device(RUN, TWO, [gpu(), gpu("L4", 24)])
    check_device(RUN, TWO, [gpu(), gpu("H100")])
    assert "different GPUs (1 x A100, 1 x H100)" in capsys.readouterr().out
    check_device(RUN, TWO, [gpu(), gpu()])
    assert capsys.readouterr().out == ""


def test_gpus_that_differ_in_bf16_and_mig_instances_of_one_host_are_refused():
    both = [gpu(), gpu("T4", bf16=False)]
    with pytest.raises(GrowthError, match=r"only some of the GPUs compute in bf16[\s\S]*ranks 1\n[\s\S]*dtype: fp16"):
        check_together(both, "auto")
    assert "different GPUs" in str(check_together(both, "fp16"))
    assert check_together([gpu("T4", bf16=False)] * 2, "auto") is None
    with pytest.raises(GrowthError, match="several ranks are on MIG instances"):
        check_together([gpu("A100 MIG 3g.40gb")] * 2, "auto")
    assert check_together([gpu("A100 MIG 3g.40gb")], "auto") is None
