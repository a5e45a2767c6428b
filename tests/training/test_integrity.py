"""Checkpoints are what was written, or are passed over with a reason; loading them runs no code."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from phigrow.checkpoints.integrity import (
    MARKER,
    damage,
    digests,
    read_marker,
    restricted_pickles,
    write_marker,
)
from phigrow.checkpoints.run_checkpoints import FOLDER, marked_checkpoints
from phigrow.errors import GrowthError
from phigrow.files.atomic import atomic_json
from phigrow.training.checkpoints import how_to_continue, newest_complete, resumable
from phigrow.training.loop import check_length
from phigrow.training.process import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
FILES = {
    "mp_rank_00_model_states.pt": b"m" * 100,
    "zero_pp_rank_0_mp_rank_00_optim_states.pt": b"0" * 70,
    "zero_pp_rank_1_mp_rank_00_optim_states.pt": b"1" * 80,
}


def checkpoint(out: Path, step: int) -> Path:
    folder = out / FOLDER / f"step-{step}"
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content + bytes([step]))
    progress = {"step": step, "tokens": 10 * step, "seconds": 1.0}
    write_marker(folder, {"progress": progress, "world_size": 2, "stage": 1}, digests(folder))
    return folder


def truncate(folder: Path) -> None:
    path = folder / "mp_rank_00_model_states.pt"
    path.write_bytes(path.read_bytes()[:50])


def flip(folder: Path) -> None:
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)


def remove(folder: Path) -> None:
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()


def cut_marker(folder: Path) -> None:
    path = folder / MARKER
    path.write_text(path.read_text()[:-20])


def edit_marker(folder: Path) -> None:
    path = folder / MARKER
    path.write_text(path.read_text().replace('"step": 9', '"step": 8'))


def old_marker(folder: Path) -> None:
    atomic_json(folder / MARKER, {"progress": {"step": 9, "tokens": 1, "seconds": 1.0}, "world_size": 2})


DAMAGE = {
    truncate: "mp_rank_00_model_states.pt has 50 bytes instead of 101",
    flip: "zero_pp_rank_1_mp_rank_00_optim_states.pt was changed after it was written (its xxh3 differs)",
    remove: "zero_pp_rank_0_mp_rank_00_optim_states.pt is missing",
    cut_marker: "complete.json cannot be read: Unterminated string",
    edit_marker: "complete.json was changed after it was written",
    old_marker: "complete.json has no hashes of the files",
}


@pytest.mark.parametrize("harm", DAMAGE)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, capsys, harm):
    for step in (3, 6, 9):
        checkpoint(tmp_path, step)
    assert resumable(tmp_path, {}, ALONE, resume=True).progress.step == 9  # the negative control: nothing is damaged
    capsys.readouterr()
    harm(tmp_path / FOLDER / "step-9")
    found = resumable(tmp_path, {}, ALONE, resume=True)
    assert found is not None
    assert (found.progress.step, found.world_size, found.stage) == (6, 2, 1)
    said = capsys.readouterr()
    assert f"a damaged checkpoint, step-9: {DAMAGE[harm]}" in said.err
    assert "; it is now damaged-step-9" in said.err
    assert "falling back to the checkpoint of step 6, which is complete" in said.out
    assert sorted(p.name for p in (tmp_path / FOLDER).iterdir()) == ["damaged-step-9", "step-3", "step-6"]


def test_where_no_checkpoint_is_whole_nothing_is_started_over_or_moved(tmp_path):
    for step, harm in ((3, truncate), (6, flip)):
        harm(checkpoint(tmp_path, step))
    with pytest.raises(GrowthError) as error:
        newest_complete(tmp_path, ALONE)
    assert "no checkpoint of this run is complete" in str(error.value)
    assert "step-6: zero_pp_rank_1" in str(error.value)
    assert "step-3: mp_rank_00" in str(error.value)
    assert "put the files back" in str(error.value)
    assert sorted(p.name for p in (tmp_path / FOLDER).iterdir()) == ["step-3", "step-6"]


def test_a_checkpoint_without_a_marker_was_never_there(tmp_path, capsys):
    (checkpoint(tmp_path, 3) / MARKER).unlink()
    atomic_json(tmp_path / "run.json", {})
    assert newest_complete(tmp_path, ALONE) == (None, [])
    assert resumable(tmp_path, {}, ALONE, resume=True) is None
    assert "no complete checkpoint yet: starting at step 0" in capsys.readouterr().out
    assert "starts at step 0" in how_to_continue(tmp_path)
    checkpoint(tmp_path, 6)
    assert "continues from the checkpoint of step 6" in how_to_continue(tmp_path)
    assert "--universal" in how_to_continue(tmp_path)


def test_ranks_share_the_files_and_miss_none(tmp_path):
    folder = checkpoint(tmp_path, 3)
    files = read_marker(folder)["files"]
    assert set(files) == set(FILES)
    assert set(digests(folder, 1, 2)) == {"zero_pp_rank_1_mp_rank_00_optim_states.pt"}
    assert digests(folder, 0, 2) | digests(folder, 1, 2) == files
    for size in (1, 2, 3):
        flip(folder)  # rank 1's file
        assert [len(damage(folder, files, rank, size)) for rank in range(size)] == [0, 1, 0][:size] or size == 1
        flip(folder)
        assert [damage(folder, files, rank, size) for rank in range(size)] == [[]] * size
    outside = {"../step-4/complete.json": {"bytes": 1, "xxh3_128": ""}}
    checkpoint(tmp_path, 4)
    assert damage(folder, outside) == ["../step-4/complete.json is missing"]


class Evil:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("evil-was-here",))


def test_a_checkpoint_with_code_in_it_is_not_run_even_where_deepspeed_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"a": Evil()}, "evil.pt")
    with restricted_pickles(), pytest.raises(pickle.UnpicklingError, match="mkdir"):
        torch.load("evil.pt", weights_only=False)
    assert not Path("evil-was-here").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    torch.load("evil.pt", weights_only=False)  # the negative control: unrestricted, it runs
    assert Path("evil-was-here").exists()


def test_what_deepspeed_saves_beside_tensors_passes_the_restricted_loader(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    scaler = DynamicLossScaler(2.0**16, 1000, 1.0, 2, False)
    content = {"loss_scaler": scaler, "zero_stage": ZeroStageEnum(3), "map": {"a": fragment_address(3, 4)}}
    torch.save(content, tmp_path / "x.pt")
    with restricted_pickles():
        back = torch.load(tmp_path / "x.pt", weights_only=False)
    assert vars(back["loss_scaler"]) == vars(scaler)
    assert (back["zero_stage"], back["map"]) == (content["zero_stage"], content["map"])


@pytest.mark.parametrize(
    "files", [["a"], {"a": 3}, {"a": {"bytes": 3}}, {"a": {"bytes": True, "xxh3_128": ""}}, {"a\0": None}]
)
def test_a_marker_without_sizes_and_hashes_is_damaged(tmp_path, files):
    folder = checkpoint(tmp_path, 3)
    sound = read_marker(folder)["files"]
    content = {"files": files}
    atomic_json(folder / MARKER, content)
    with pytest.raises(ValueError, match="has no hashes of the files"):
        read_marker(folder)
    write_marker(folder, {}, sound)
    assert read_marker(folder) == {"files": sound}  # the negative control


def test_markers_are_sorted_by_step_and_the_hash_covers_the_progress(tmp_path):
    for step in (9, 100, 10):
        checkpoint(tmp_path, step)
    found, damaged = marked_checkpoints(tmp_path)
    assert [item.progress.step for item in found] == [9, 10, 100]
    assert damaged == []
    content = json.loads((found[0].folder / MARKER).read_text())
    assert list(content) == ["progress", "world_size", "stage", "files", "xxh3_128"]


def test_a_marker_whose_step_is_no_number_is_damaged(tmp_path):
    for step in (3, 6):
        checkpoint(tmp_path, step)
    folder = tmp_path / FOLDER / "step-3"
    (folder / MARKER).unlink()
    write_marker(folder, {"progress": {"step": "3"}, "world_size": 2, "stage": 1}, digests(folder))
    complete, damaged = marked_checkpoints(tmp_path)
    assert [found.progress.step for found in complete] == [6]
    assert "its step is '3', not a whole number" in str(damaged[0])


def test_a_run_that_went_further_is_not_shortened(tmp_path):
    checkpoint(tmp_path, 6)
    (found,), _ = marked_checkpoints(tmp_path)
    for steps in (6, 7, None):
        check_length(found, steps, tmp_path)
    with pytest.raises(GrowthError, match=r"(?s)has trained 6 steps, and steps is 5.*give steps: 6 or more"):
        check_length(found, 5, tmp_path)
