"""``phigrow.json`` is read in one place, strictly; that of the first release still means the same to every reader.

``tests/golden/first-release`` has three files that the first release wrote, and what its readers made of them
(``readers.json``). Neither is ever written again.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import phi_config, phi_model

import phigrow
from phigrow.checkpoints.provenance import Provenance, TrainingCost, read_provenance, read_training
from phigrow.errors import GrowthError
from phigrow.expansion.provenance import provenance
from phigrow.expansion.verify import read_plan
from phigrow.inspection.plan_file import inspection_json, origin, read_plan_file
from phigrow.training import RunConfig
from phigrow.training.diagnostics import source_indices
from phigrow.training.per_value_lr import copied_mask, copied_values
from phigrow.training.training_cost import source_of

FIRST = Path(__file__).parent.parent / "golden" / "first-release"
SRC, DST = phi_config(8, 2, 16, 2, 2), phi_config(12, 3, 24, 3, 2)
METHODS = ("wr", "lossless", "isometric")


@pytest.mark.parametrize("method", METHODS)
def test_the_first_releases_file_means_the_same_to_every_reader(method):
    folder = FIRST / method
    expected = json.loads((FIRST / "readers.json").read_text())[method]
    read, config = read_plan_file(folder), RunConfig(init=str(folder))
    plan = read_plan(folder)
    assert plan is not None
    assert plan.hash == read.plan.hash == expected["plan_hash"]
    assert inspection_json(read) == expected["inspect"]
    assert [list(row) for row in origin(read)] == expected["origin"]
    source = source_of(config)
    assert (source.arm, source.growth, source.expand_seconds) == tuple(
        expected["source"][key] for key in ("arm", "growth", "expand_seconds")
    )
    assert list(source.cost.values()) == expected["source"]["cost"]
    assert list(source.before.values()) == expected["source"]["before"]
    found = copied_values(config)
    masks = {g.name: copied_mask(found, g.name, g.shape).numpy().tobytes() for g in plan.recipes()}
    assert {k: hashlib.sha256(v).hexdigest()[:16] for k, v in masks.items()} == expected["copied_masks"]
    _, axes = source_indices(read.provenance.plan, folder / "phigrow.json")  # type: ignore[union-attr]
    assert {name: index.tolist() for name, index in axes.items()} == expected["axes"]


@pytest.mark.parametrize("method", METHODS)
def test_the_first_releases_file_survives_reading_and_writing(method):
    content = json.loads((FIRST / method / "phigrow.json").read_text())
    made = read_provenance(FIRST / method)
    assert made is not None
    assert made.to_json() == content
    assert list(made.to_json()) == list(content)


def test_the_same_plan_is_made_today(tmp_path, save_model):
    folder = save_model(phi_model(SRC, torch.float32))
    (folder / "training.json").write_text('{"tokens": 5000, "flops": 6e9, "seconds": 7.5, "steps": 40}')
    out = phigrow.expand(folder, DST, tmp_path / "out", method="wr", depth="identity", seed=3)
    today, first = read_provenance(out), read_provenance(FIRST / "wr")
    assert today is not None
    assert first is not None
    assert (today.plan, today.copied, today.source_training) == (first.plan, first.copied, first.source_training)
    assert today.method_summary == "the source's weights in one block, new random weights around it (weight reuse)"
    assert first.method_summary is None  # the first release did not write it
    assert source_of(RunConfig(init=str(out))).growth["summary"] == today.method_summary
    shutil.copy(FIRST / "wr" / "phigrow.json", out / "phigrow.json")  # its weights, described by the first release
    certificate = phigrow.verify(folder, out, tokens=16)
    assert (certificate.method, certificate.plan_hash) == ("wr", first.plan_hash)
    again = phigrow.expand(out, phi_config(16, 4, 24, 4, 2), tmp_path / "again")
    grown = read_provenance(again)
    assert grown is not None
    assert grown.source_training == first.source_training  # an untrained source cost what its own source did


def test_what_expand_writes_is_read_back(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    plan = phigrow.plan(SRC, DST)
    made = provenance(
        plan, method_summary="in short", source_name="small", revision="main", source=tmp_path, dtype="float32",
        hashes={"model.safetensors": "ab"}, command="phigrow expand", seconds=1.23456, learning={"cost": {"tokens": 4}},
    )  # fmt: skip
    read = Provenance.from_json(json.loads(json.dumps(made.to_json())), tmp_path)
    assert read.to_json() == json.loads(json.dumps(made.to_json()))
    assert (read.plan_hash, read.method_summary) == (plan.hash, "in short")
    assert read.learning_cost == TrainingCost(4, None, None)
    assert read.source_cost == TrainingCost(None, None, None)


def test_a_folder_without_the_files_has_no_provenance(tmp_path):
    assert read_provenance(tmp_path) is None
    assert read_training(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"format": 2}, "this phigrow reads format 1"),
        ({"plan": None}, "it has no plan"),
        ({"plan": [1]}, r"plan is \[1\]"),
        ({"source": 3}, "source is 3"),
        ({"source": {"name": 3}}, r"source\.name is 3"),
        ({"source": {"files": {"a": 1}}}, r"source\.files\.a is 1"),
        ({"source": {"files": {"a": {"bytes": True, "sha256": ""}}}}, r"source\.files\.a\.bytes is True"),
        ({"source": {"files": {"a": {"bytes": 5}}}}, r"source\.files\.a has no bytes and sha256"),
        ({"source": {"training": [1]}}, r"source\.training is \[1\]"),
        ({"source": {"training": {"tokens": "many"}}}, "the cost's tokens is 'many'"),
        ({"copied": {"fresh": []}}, "copied has no spans and fresh"),
        ({"copied": {"spans": {}, "fresh": [1]}}, r"copied\.fresh is not a list of names"),
        ({"copied": {"spans": {}, "fresh": [], "blocks": {"a": "2"}}}, r"copied\.blocks does not hold whole numbers"),
        ({"copied": {"spans": {"a": [[[0, 1, 2]]]}, "fresh": []}}, r"copied\.spans\.a is not a list of ranges"),
        ({"copied": {"spans": {"a": [[[5, 1]]]}, "fresh": []}}, r"copied\.spans\.a is not a list of ranges"),
        ({"copied": {"spans": {"a": [[[-5, 1]]]}, "fresh": []}}, r"copied\.spans\.a is not a list of ranges"),
        ({"learning": 5}, "learning is 5"),
        ({"learning": {"cost": 5}}, "a cost is 5"),
        ({"learning": {"cost": {"flops": True}}}, "the cost's flops is True"),
        ({"dtype": 16}, "dtype is 16"),
        ({"seconds": "1"}, "seconds is '1'"),
        ({"versions": []}, r"versions is \[\]"),
        ({"versions": {"torch": 2}}, r"versions\.torch is 2"),
    ],
)
def test_a_part_of_the_wrong_type_is_named(tmp_path, change, why):
    content = json.loads((FIRST / "wr" / "phigrow.json").read_text()) | change
    (tmp_path / "phigrow.json").write_text(json.dumps(content))
    with pytest.raises(GrowthError, match=rf"phigrow\.json [^\n]*\n  where: .*phigrow\.json\n  why: {why}"):
        read_provenance(tmp_path)


def test_costs_that_are_no_numbers_are_refused(tmp_path):
    (tmp_path / "training.json").write_text('{"tokens": 5, "flops": "6e9"}')
    with pytest.raises(GrowthError, match=r"training\.json cannot[^\n]*\n.*\n  why: the cost's flops is '6e9'"):
        read_training(tmp_path)
    (tmp_path / "training.json").write_text('{"tokens": 5, "flops": null, "dtype": "bf16"}')
    assert read_training(tmp_path) == {"tokens": 5, "flops": None, "dtype": "bf16"}
    (tmp_path / "training.json").write_text('{"tokens": 5, "loss": NaN}')  # of a run that diverged
    assert (read_training(tmp_path) or {})["tokens"] == 5
    (tmp_path / "training.json").write_text('{"tokens": NaN}')
    with pytest.raises(GrowthError, match="the cost's tokens is nan"):
        read_training(tmp_path)
