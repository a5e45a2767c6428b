"""What differs between two plans: complete (nothing if and only if the hashes agree), and said with its place."""

import dataclasses
import itertools
import json
import random

import numpy as np
import pytest
from tiny_models import phi_config, random_growth

import phigrow
from phigrow.errors import GrowthError
from phigrow.growth.matrices import Maps
from phigrow.growth.plan import Plan
from phigrow.inspection.difference import ABSENT, Difference, differences
from phigrow.inspection.plan_file import inspection_json, origin, read_plan_file

SRC, DST = phi_config(32, 4, 48, 2, 4), phi_config(72, 6, 70, 5, 4, vocab=70)


def by_name(found):
    return {(d.part, d.name): d for d in found}


def test_nothing_differs_if_and_only_if_the_hashes_agree():
    rng = random.Random(0)
    src, dst = random_growth(rng)
    other = random_growth(rng)
    choices = [
        {}, {"seed": 1}, {"noise": 0.1}, {"depth": "stack"}, {"rounding": "half-up"}, {"scale": "rms"},
        {"anchor": "center"}, {"method": "wr"}, {"method": "lossless"},
    ]  # fmt: skip
    plans = [phigrow.plan(src, dst, **{"method": "tile"} | choice) for choice in choices]
    plans += [phigrow.plan(*pair, "tile") for pair in (other, (src, dst | {"resid_pdrop": 0.1}), (src, dst))]
    equal = 0
    for one, two in itertools.product(plans, repeat=2):
        found = differences(one, two)
        assert (not found) == (one.hash == two.hash)
        assert json.loads(json.dumps([d.to_json() for d in found])) == [d.to_json() for d in found]
        # The other way round, the same with its sides exchanged.
        mirrored = {(d.part, d.name): (d.second, d.first) for d in differences(two, one)}
        assert mirrored == {(d.part, d.name): (d.first, d.second) for d in found}
        equal += not found
    assert equal == len(plans) + 2  # each with itself, and the last with the first, either way


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Plan)])
def test_no_part_of_a_plan_is_forgotten(field):
    plan = phigrow.plan(SRC, DST, "tile")
    hidden = plan.axes["hidden"]
    bumped = {
        "family": "phi",
        "method": "wr",
        "options": {"anchor": "center", "scale": "none"},
        "depth": "stack",
        "depth_options": {"rounding": "floor"},
        "axes": plan.axes | {"hidden": dataclasses.replace(hidden, read=hidden.read * 2)},
        "layers": (0, 0, 0, 1, 1),
        "identity_layers": frozenset({1}),
        "seed": 9,
        "noise": 0.5,
        "noise_on": "all",
        "src_config": plan.src_config | {"resid_pdrop": 0.3},
        "dst_config": plan.dst_config | {"resid_pdrop": 0.3},
        "approximations": (),
        "notes": ("mind the gap",),
        "maps": Maps("5" * 64),
        "method_files": {"mine": "6" * 64},
    }
    other = dataclasses.replace(plan, **{field: bumped[field]})
    found = differences(plan, other)
    assert bool(found) == (plan.hash != other.hash)
    assert bool(found) == (field != "family")  # there is only one family
    parts = {d.part for d in found}
    expected = {
        "options": {"options"},
        "depth_options": {"depth options"},
        "axes": {"axis"},
        "layers": {"layer"},
        "identity_layers": {"layer"},
        "src_config": {"source"},
        "dst_config": {"destination"},
        "approximations": {"exact", "approximations"},
        "family": set(),
        "method_files": {"method file"},
    }
    assert parts == expected.get(field, {field})


def test_axis_maps_say_how_many_coordinates_and_where():
    tile = phigrow.plan("phi-1_5", "phi2.json", "tile")
    lossless = phigrow.plan("phi-1_5", "phi2.json", "lossless")
    found = by_name(differences(tile, lossless))
    assert found["axis", "hidden, source"] == Difference("axis", "hidden, source", "0..511", "mean", 512, (2048, 2560))
    write = found["axis", "hidden, write gain"]
    assert (write.coordinates, write.span, write.first) == (2560, (0, 2560), 1.0)
    assert write.second == pytest.approx(np.sqrt(1.25))
    assert found["axis", "normed, read gain"].second == "random"
    assert found["axis", "q, source"] == Difference("axis", "q, source", "32..47", "fresh", 16, (64, 80))
    assert found["axis", "vocab, bias of new coordinates"].second == -100.0
    assert found["layer", "1"] == Difference("layer", "1", "1", "0, identity layer")
    assert found["options", "scale"].second == ABSENT
    assert found["exact", ""] == Difference("exact", "", False, True)
    assert ("layer", "0") not in found
    assert not any(part.endswith("size") for part, _ in found)
    wider = phigrow.plan(SRC, DST | {"hidden_size": 96, "partial_rotary_factor": 0.25}, "tile")
    sizes = by_name(differences(phigrow.plan(SRC, DST, "tile"), wider))
    assert sizes["destination size", "hidden"].second == 96
    assert sizes["axis", "hidden"] == Difference("axis", "hidden", "32 -> 72", "32 -> 96")


def test_values_differ_as_their_json_does():
    plan = phigrow.plan(SRC, DST | {"use_cache": 1})
    other = dataclasses.replace(plan, dst_config=plan.dst_config | {"use_cache": True})
    assert plan.hash != other.hash
    assert [(d.part, d.name) for d in differences(plan, other)] == [("destination", "use_cache")]


def test_plans_are_read_from_a_folder_its_record_or_printed_json(tmp_path):
    plan = phigrow.plan(SRC, DST, "lossless")
    record = {
        "format": 1,
        "plan": {"hash": plan.hash, **plan.to_json()},
        "source": {"name": "small"},
        "dtype": "float32",
    }
    (tmp_path / "phigrow.json").write_text(json.dumps(record))
    (tmp_path / "bare.json").write_text(json.dumps(plan.to_json()))
    reads = [read_plan_file(tmp_path / name) for name in ("", "phigrow.json", "bare.json")]
    assert [read.plan.hash for read in reads] == [plan.hash] * 3
    assert [read.provenance is None for read in reads] == [False, False, True]
    facts = dict(origin(reads[0]))
    assert facts["source"] == "small, revision not named"
    assert facts["plan"] == f"{plan.hash} (checked against its content)"
    assert facts["layers"] == "2 -> 5 by identity, 3 identity"
    assert "source" not in dict(origin(reads[2]))
    said = inspection_json(reads[0])
    assert said["plan"]["hash"] == plan.hash
    assert sum(said["all"].values()) == said["parameters"]["destination"] == plan.cost()[1].parameters


def test_what_the_source_cost_is_said(tmp_path):
    plan = phigrow.plan(SRC, DST)
    training = {"tokens": 1_000_000, "flops": 1.5e15, "seconds": 12.25}
    files = {"model.safetensors": {"bytes": 2048, "sha256": "ab" * 32}}
    source = {"name": "small", "revision": "main", "files": files, "training": training}
    content = {"hash": plan.hash, **plan.to_json()}
    (tmp_path / "phigrow.json").write_text(json.dumps({"plan": content, "source": source}))
    facts = dict(origin(read_plan_file(tmp_path)))
    assert facts["source"] == "small, revision main"
    assert facts["file"] == f"model.safetensors, 2,048 bytes, sha256 {'ab' * 32}"
    assert facts["trained"] == "tokens 1,000,000, flops 1.5e+15, seconds 12.25"


def test_what_is_no_plan_is_refused(tmp_path):
    plan = phigrow.plan(SRC, DST)
    file = tmp_path / "plan.json"
    content = {"hash": plan.hash, **plan.to_json()}
    for text, message in (
        (
            json.dumps(content | {"seed": 5}),
            r"the plan was altered\n  where: .*plan.json\n  why: its stored hash differs",
        ),
        (json.dumps({"plan": {"hash": "x", **plan.to_json()}}), "the plan was altered"),
        ("{", "the plan cannot be read"),
        ("[1]", "the plan cannot be read"),
        (json.dumps({"plan": 3}), r"plan.json cannot be read\n  where: .*plan.json\n  why: plan is 3"),
        (json.dumps({"plan": plan.to_json()}), "the plan was altered"),
        (json.dumps(content | {"format": 9}), r"the plan has format 9, not 1\n  where: .*plan.json"),
        (json.dumps({k: v for k, v in content.items() if k != "axes"}), "the plan has no 'axes'"),
        (json.dumps(content | {"axes": [1]}), "the file is not a plan"),
    ):
        file.write_text(text)
        with pytest.raises(GrowthError, match=message):
            read_plan_file(file)
    with pytest.raises(
        GrowthError, match=r"there is no plan in .*\n  where: .*phigrow.json\n  why: the folder has no phigrow.json"
    ):
        read_plan_file(tmp_path)
    for record in ({"source": 3}, {"source": {"files": {"a": 1}}}, {"versions": []}, {"source": {"training": [1]}}):
        file.write_text(json.dumps({"plan": content, **record}))
        with pytest.raises(GrowthError, match=r"plan.json cannot be read\n  where: .*plan.json"):
            read_plan_file(file)
    file.write_text(json.dumps({"plan": content, "command": "phigrow \x1b[2Jexpand"}))
    assert dict(origin(read_plan_file(file)))["command"] == "phigrow ?[2Jexpand"
    with pytest.raises(GrowthError, match="there is no such file or folder"):
        read_plan_file(tmp_path / "nothing.json")
