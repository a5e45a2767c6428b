"""Bytes that each rank of a host reads and holds at a start from a checkpoint and at a resume."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from phigrow.checkpoints import integrity
from phigrow.checkpoints.integrity import damage, digests, read_marker, write_marker
from phigrow.checkpoints.reader import CheckpointReader
from phigrow.checkpoints.run_checkpoints import FOLDER, Progress, RunCheckpoint
from phigrow.models.config import load_config
from phigrow.models.cost import count_cost
from phigrow.training import RunConfig, checkpoints, zero
from phigrow.training.model import causal_lm_config, empty_model, place_parameters
from phigrow.training.process import World
from phigrow.training.zero import fill_master, fill_parameter

RANKS = 2
WEIGHTS, STATES = "mp_rank_00_model_states.pt", "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def saved(out: Path, values: int, **more: Any) -> RunCheckpoint:
    """Write a checkpoint of two ranks, as DeepSpeed names its files at stages 1 and 2."""
    folder = out / FOLDER / "step-3"
    folder.mkdir(parents=True)
    for name in (WEIGHTS, *(STATES.format(rank) for rank in range(RANKS))):
        torch.save({"values": torch.arange(values, dtype=torch.float32)}, folder / name, **more)
    progress = {"step": 3, "tokens": 30, "seconds": 1.0}
    write_marker(folder, {"progress": progress, "world_size": RANKS, "stage": 1}, digests(folder))
    return RunCheckpoint(folder, Progress(**progress), RANKS, 1, read_marker(folder))


def test_two_ranks_hash_each_file_of_a_checkpoint_once(tmp_path, monkeypatch):
    checkpoint = saved(tmp_path, 1000)
    hashed: list[str] = []
    real = integrity.digest
    monkeypatch.setattr(integrity, "digest", lambda path: (hashed.append(path.name), real(path))[1])
    monkeypatch.setattr(checkpoints, "gather_objects", lambda world, mine: [mine])
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda answer, src: None)
    world = World(0, RANKS, 0, RANKS, torch.device("cpu"))
    found, damaged = checkpoints.newest_complete(tmp_path, world)
    assert (found, damaged) == (checkpoint, [])
    assert hashed == [STATES.format(0), WEIGHTS]
    monkeypatch.setattr(checkpoints, "on_rank_zero", lambda world, work: ([checkpoint], []))
    checkpoints.newest_complete(tmp_path, World(1, RANKS, 1, RANKS, torch.device("cpu")))
    assert sorted(hashed) == sorted(checkpoint.marker["files"])  # each once
    damage(checkpoint.folder, checkpoint.marker["files"])  # the negative control: as if one rank were all
    assert len(hashed) == 2 * len(checkpoint.marker["files"])


class Read:
    """A stored tensor on the meta device, which counts the bytes that are read of it."""

    def __init__(self, name: str, shape: tuple[int, ...], counts: list[int]) -> None:
        self.name, self.shape, self.dtype, self.counts = name, shape, torch.float32, counts

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self._counted(torch.empty(stop - start, *self.shape[1:], device="meta"))

    def values(self, start: int, stop: int) -> torch.Tensor:
        return self._counted(torch.empty(stop - start, device="meta"))

    def _counted(self, part: torch.Tensor) -> torch.Tensor:
        self.counts.append(part.nbytes)
        return part


def test_a_rank_holds_phi_2_in_bf16_and_reads_it_in_blocks():
    """In fp32 each rank of a host would hold 10.4 GiB of its memory, and 0.5 GiB for the largest tensor."""
    phi2 = load_config("phi2")
    with torch.device("meta"):
        model = empty_model(causal_lm_config(phi2), RunConfig(model="phi2", dtype="bf16"), "sdpa")
    parameters, counts = count_cost(phi2).parameters, list[int]()
    assert sum(p.nbytes for p in model.parameters()) == 4 * parameters  # the control: as transformers builds it
    place_parameters(model, torch.bfloat16, torch.device("meta"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fill_parameter(parameter, Read(name, tuple(parameter.shape), counts))
    assert sum(p.nbytes for p in model.parameters()) == 2 * parameters
    assert sum(counts) == 4 * parameters  # every value once
    assert max(counts) <= 4 * zero.BLOCK < 4 * 51200 * 2560 / 30
    print(f"a rank holds {2 * parameters / 2**30:.1f} GiB, and reads {max(counts) / 2**20:.0f} MiB at once")


def test_a_rank_reads_the_values_of_its_own_masters_and_no_more(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    whole = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    save_file({"weight": whole}, tmp_path / "model.safetensors")
    parameter: Any = torch.nn.Parameter(whole.bfloat16())
    share, read = whole.numel() // RANKS, [0] * RANKS
    preadv = os.preadv
    with CheckpointReader(tmp_path) as reader, torch.no_grad():
        for rank in range(RANKS):
            monkeypatch.setattr(
                os,
                "preadv",
                lambda *words, rank=rank: (read.__setitem__(rank, read[rank] + (n := preadv(*words))), n)[1],
            )
            master = parameter.flatten()[rank * share : (rank + 1) * share].float()
            part = SimpleNamespace(start=rank * share, numel=share)
            parameter._hp_mapping = SimpleNamespace(lp_fragment_address=part, hp_fragment=master)
            fill_master(parameter, None, reader.tensors["weight"])
            assert torch.equal(master, whole.flatten()[rank * share : (rank + 1) * share])
    assert read == [whole.nbytes // RANKS] * RANKS


def mapped_file(tensor: torch.Tensor) -> str | None:
    """Return the name of the file whose pages hold a tensor's values; None where the process has memory of its own."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(address, 16) for address in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            fields = line.split(maxsplit=5)
            return Path(fields[5]).name if len(fields) == 6 and fields[5].startswith("/") else None
    return None


def loading(folder: Path, places: dict[str, str | None]) -> Any:
    """Return a stand-in for an engine that loads files as DeepSpeed does, and tells where their values are."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    reader = TorchCheckpointEngine()

    def load_checkpoint(root: str, tag: str) -> tuple[str, dict[str, Any]]:
        for name in (WEIGHTS, STATES.format(0)):
            values = reader.load(str(folder / name), map_location=lambda storage, _: storage)["values"]
            assert torch.equal(values, torch.arange(len(values), dtype=torch.float32))
            places[name] = mapped_file(values)
        return root, {}

    return SimpleNamespace(checkpoint_engine=reader, load_checkpoint=load_checkpoint)


def resolved(stage: int) -> Any:
    world = World(0, RANKS, 0, RANKS, torch.device("cpu"))
    return SimpleNamespace(world=world, stage=stage, optimizer_device="device")


@pytest.mark.skipif(sys.platform != "linux", reason="mappings are read from /proc")
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_file_with_all_weights_is_mapped_and_not_copied_by_each_rank(tmp_path, monkeypatch, stage):
    """A rank's own state is copied, because torch may keep it; so is all of stage 0, as the control."""
    checkpoint, places = saved(tmp_path, 1 << 16), dict[str, str | None]()
    monkeypatch.setattr(RunCheckpoint, "fits", lambda *_: True)
    engine = loading(checkpoint.folder, places)
    assert checkpoints.load(engine, checkpoint, resolved(stage)) == checkpoint.progress
    assert places == {WEIGHTS: WEIGHTS if stage else None, STATES.format(0): None}
    assert "load" not in vars(engine.checkpoint_engine)


def test_files_in_the_old_format_of_torch_are_read(tmp_path):
    checkpoint = saved(tmp_path, 1 << 12, _use_new_zipfile_serialization=False)
    places: dict[str, str | None] = {}
    assert checkpoints.load(loading(checkpoint.folder, places), checkpoint, resolved(1)) == checkpoint.progress
    assert places == {WEIGHTS: None, STATES.format(0): None}
