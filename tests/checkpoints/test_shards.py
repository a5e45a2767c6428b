"""Checkpoints of ZeRO cut into parameters, and names in them that would lead out of the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from phigrow.checkpoints import universal
from phigrow.checkpoints.integrity import restricted_pickles
from phigrow.checkpoints.shards import cut_shards
from phigrow.errors import GrowthError

# Texts of torch's own modules when DeepSpeed imports them in this process.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SHAPES = {"model.fc1.weight": (3, 4), "model.fc1.bias": (3,)}
CRAFTED = ["../../outside", "/tmp/outside", "a/../../outside", "..", ".", "a..b", "a.", "", "a\0b", 7]


def fragments(shapes: dict[Any, tuple[int, ...]]) -> dict[Any, Any]:
    from deepspeed.utils.tensor_fragment import fragment_address

    out, start = {}, 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        out[name] = fragment_address(numel=size, start=start)
        start += size
    return out


def write(folder: Path, kind: str, shapes: dict[Any, tuple[int, ...]]) -> Path:
    """Write a checkpoint of one rank, as ZeRO 1 (``zero-1``), ZeRO 3 (``zero-3``) or ZeRO 0 (``plain``) does."""
    folder.mkdir(parents=True)
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    flat = torch.arange(float(sum(sizes)))
    state = {0: {"exp_avg": flat + 100, "exp_avg_sq": flat + 200, "step": torch.tensor(5.0)}}
    model: dict[str, Any] = {"param_shapes": [{name: torch.Size(shape) for name, shape in shapes.items()}]}
    model |= {"lr_scheduler": {}, "global_steps": 5, "global_samples": 5, "skipped_steps": 0}
    shard: dict[str, Any] = {}
    if kind == "zero-1":
        shard = {
            "base_optimizer_state": {"state": state, "param_groups": [{}]},
            "single_partition_of_fp32_groups": [flat],
            "param_slice_mappings": [fragments(shapes)],
        }
    elif kind == "zero-3":
        shard = {"optimizer_state_dict": {"state": state}, "fp32_flat_groups": [flat]}
    else:
        parts = [part.reshape(shape) for part, shape in zip(flat.split(sizes), shapes.values(), strict=True)]
        moments = {k: {"exp_avg": part, "exp_avg_sq": part, "step": 5} for k, part in enumerate(parts)}
        model |= {"module": dict(zip(shapes, parts, strict=True)), "phigrow": {"groups": [list(shapes)]}}
        model |= {"optimizer": {"state": moments}}
    if shard:
        torch.save({"optimizer_state_dict": shard}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    return folder


@pytest.mark.parametrize("kind", ["zero-1", "zero-3"])
def test_every_value_of_a_shard_is_written_in_its_place(tmp_path, kind):
    source = write(tmp_path / "source", kind, SHAPES)
    with restricted_pickles():
        cut_shards(source, tmp_path / "out", ("exp_avg", "exp_avg_sq"))
    start = 0
    for name, shape in SHAPES.items():
        wanted = torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
        for key, add in (("fp32", 0), ("exp_avg", 100), ("exp_avg_sq", 200)):
            assert torch.equal(universal.stored(tmp_path / "out", name, key), wanted + add)
        assert not torch.equal(universal.stored(tmp_path / "out", name, "exp_avg"), wanted)
        start += wanted.numel()
    common = torch.load(tmp_path / "out" / "zero" / "optimizer_state.pt", weights_only=True)
    assert common == {"step": 5.0}


@pytest.mark.parametrize("name", CRAFTED)
@pytest.mark.parametrize("kind", ["zero-1", "zero-3"])
def test_a_shard_with_a_crafted_name_is_refused_before_anything_is_written(tmp_path, kind, name):
    source = write(tmp_path / "a" / "source", kind, {**SHAPES, name: (2,)})
    with restricted_pickles(), pytest.raises(GrowthError) as error:
        cut_shards(source, tmp_path / "a" / "out", ("exp_avg", "exp_avg_sq"))
    assert error.value.what == str(GrowthError(f"the checkpoint names a parameter {name!r}"))
    assert error.value.where == str(source)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["source"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("states", [{"exp_avg": 1, "exp_avg_sq": 2}, {"exp_avg": 1}])
@pytest.mark.parametrize("kind", ["zero-1", "zero-3", "plain"])
def test_a_conversion_refuses_crafted_names_by_every_way(tmp_path, kind, states):
    # By DeepSpeed's converter (two states at ZeRO 1 to 3), by `cut_shards` (one), and by phigrow's own (ZeRO 0).
    source = write(tmp_path / "a" / "source", kind, {**SHAPES, "../../../../outside": (2,)})
    with pytest.raises(GrowthError, match=r"the checkpoint names a parameter '\.\./\.\./\.\./\.\./outside'"):
        universal.convert(source, tmp_path / "a" / "out", {"optimizer": {"states": states}})
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["source"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_conversion_refuses_crafted_states_and_experts(tmp_path):
    source = write(tmp_path / "source", "plain", SHAPES)
    with pytest.raises(GrowthError, match=r"the checkpoint names a state '\.\./exp_avg'"):
        universal.convert(source, tmp_path / "out", {"optimizer": {"states": {"../exp_avg": 1}}})
    path = source / "mp_rank_00_model_states.pt"
    torch.save(torch.load(path, weights_only=True) | {"ds_autoep_layers": ["layer"]}, path)
    with pytest.raises(GrowthError, match="the checkpoint has mixture-of-experts layers"):
        universal.convert(source, tmp_path / "out", {})
    assert not (tmp_path / "out").exists()


def test_sound_names_are_converted(tmp_path):
    # The negative control of the refusals above.
    source = write(tmp_path / "source", "plain", SHAPES)
    universal.convert(source, tmp_path / "out", {})
    assert universal.parameters(tmp_path / "out") == sorted(SHAPES)
    assert torch.equal(universal.stored(tmp_path / "out", "model.fc1.bias", "fp32"), torch.tensor([12.0, 13.0, 14.0]))


@pytest.mark.parametrize(
    ("states", "message"),
    [({"../../exp_avg": 1}, "names a state '../../exp_avg'"), (["exp_avg"], "states is ['exp_avg'], but must be")],
)
def test_the_state_of_a_universal_folder_is_read_strictly(tmp_path, states, message):
    (tmp_path / universal.STATE).write_text(json.dumps({"states": states}))
    with pytest.raises(GrowthError) as error:
        universal.read_state(tmp_path)
    assert message in str(error.value)
