"""Runs of several models in one report: sources left out, arms of two models and baselines of another size refused."""

import json

import pytest

from phigrow.errors import GrowthError
from phigrow.measure import compare, load_runs
from phigrow.measure.sizes import without_sources

LINE, COSTS = [5.0, 4.0, 3.0], [0, 1_000_000, 2_000_000]
GREW = {"growth": {"method": "wr"}, "parameters": 4000}


@pytest.fixture
def source_and_grown(write_run):
    """A source of 1,000 parameters that calls itself scratch, as a first run does, and wr, grown from it to 4,000."""

    def make(**of_wr):
        source = write_run("scratch", LINE, COSTS, name="small", config={"steps": 40})
        spent = json.loads((source / "records.jsonl").read_text().splitlines()[-1])
        # training.json rounds seconds to thousandths
        cost = {f"source_{unit}": round(spent[unit], 3) for unit in ("flops", "seconds")} | of_wr
        return source, write_run("wr", [2.9, 2.8, 2.7], COSTS, source_tokens=2e6, **GREW, **cost)

    return make


def test_a_source_is_no_baseline(source_and_grown):
    source, grown = source_and_grown()
    with pytest.raises(GrowthError, match="no run of the baseline 'scratch'") as caught:
        compare(load_runs([source, grown]))
    left_out = f"arms in these folders: wr; {source} is left out: it is the source of wr"
    assert caught.value.where == left_out
    assert "of the model trained from scratch" in caught.value.fix


def test_a_source_beside_the_scratch_arm_is_left_out_with_a_note(source_and_grown, write_run):
    source, grown = source_and_grown()
    large = write_run("scratch", LINE, COSTS, parameters=4000)
    comparison = compare(load_runs([source, large, grown]))
    assert comparison.notes == (f"{source} is left out: it is the source of wr",)
    assert [run.folder for run in comparison.baseline.runs] == [large]
    assert comparison.ends == {}  # not two budgets of one arm
    assert comparison["wr"].estimate("tokens", "charged").speedup == 1.0


def test_a_source_of_a_study_is_no_arm_before_anything_is_grown_from_it(source_and_grown, write_run):
    """Its other seeds are trained before the arms that grow from them, and the report goes on."""
    _, grown = source_and_grown()
    large = write_run("scratch", LINE, COSTS, parameters=4000, name="large")
    other = write_run("source", LINE, [0, 1e6, 5e6], seed=7, name="other", study={"side_by_side": 2})
    comparison = compare(load_runs([large, grown, other]))
    assert f"{other} is left out: it is the source of arms that have no run here" in comparison.notes
    # A run that no study trained keeps its name, and is refused as any arm without a baseline is.
    mine = write_run("source", LINE, COSTS, seed=8, name="mine", parameters=4000)
    with pytest.raises(GrowthError, match="source, seed 8, has no run of scratch to compare with"):
        compare(load_runs([large, grown, mine]))


def test_one_unit_is_not_enough_to_know_a_source(source_and_grown):
    source, grown = source_and_grown()
    records = grown / "records.jsonl"
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    del lines[0]["source_flops"], lines[0]["source_seconds"]
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert without_sources(load_runs([source, grown]))[1] == {}


@pytest.mark.parametrize("unit", ["seconds", "flops"])
def test_units_that_were_not_recorded_do_not_hide_a_source(source_and_grown, unit):
    source, grown = source_and_grown()
    for folder in (source, grown):
        lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
        for line in lines:
            line.pop(unit, None)
            line.pop(f"source_{unit}", None)
        (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept, sources = without_sources(load_runs([source, grown]))
    assert ([run.folder for run in kept], sources) == ([grown], {str(source): "wr"})


@pytest.mark.parametrize("other", [{"source_seconds": 501.0}, {"source_flops": 3.1e15}, {"parameters": 1000}])
def test_a_run_that_cost_something_else_is_no_source(source_and_grown, other):
    """Negative control: of other seconds or FLOPs, or of the same size, it stays, and is then refused or compared."""
    source, grown = source_and_grown(**{key: value for key, value in other.items() if key != "parameters"})
    if "parameters" in other:
        records = grown / "records.jsonl"
        records.write_text(records.read_text().replace('"parameters": 4000', '"parameters": 1000'))
        kept, sources = without_sources(load_runs([source, grown]))
        assert (len(kept), sources) == (2, {})
        return
    with pytest.raises(GrowthError) as caught:
        compare(load_runs([source, grown]))
    assert caught.value.what == "wr was grown to 4,000 parameters, but the baseline scratch has 1,000"
    assert caught.value.where == f"{grown} and {source}"
    assert caught.value.fix.startswith("use runs of the grown model from scratch as the baseline")


def test_a_grown_run_that_was_grown_again_is_a_source_too(source_and_grown, write_run):
    _, grown = source_and_grown(expand_seconds=1.5)
    cost = {"source_tokens": 4e6, "source_flops": 6e15, "source_seconds": 1001.5}
    again = write_run("again", LINE, COSTS, growth={"method": "wr"}, parameters=9000, **cost)
    kept, sources = without_sources(load_runs([grown, again]))
    assert ([run.arm for run in kept], sources) == (["again"], {str(grown): "again"})


def test_an_arm_that_was_not_grown_may_be_smaller(write_run):
    """The source trained on, which studies call continued; the same run grown is refused."""
    write_run("scratch", LINE, COSTS, parameters=4000)
    parent = write_run("continued", [4.0, 3.0, 2.5], COSTS, source_tokens=5e5).parent
    assert compare(load_runs(parent))["continued"].estimate("tokens", "sunk").speedup == 2.0
    write_run("tile", [4.0, 3.0, 2.5], COSTS, source_tokens=5e5, growth={"method": "tile"})
    with pytest.raises(GrowthError, match="tile was grown to 1,000 parameters, but the baseline scratch has 4,000"):
        compare(load_runs(parent))


@pytest.mark.parametrize(
    ("one", "other", "what"),
    [
        ({}, {"parameters": 4000}, "the runs of scratch train two different models: parameters 1,000 against 4,000"),
        (
            {"model": {"hidden_size": 64, "num_hidden_layers": 4}},
            {"model": {"hidden_size": 64, "num_hidden_layers": 2}},
            "the runs of scratch train two different models: num hidden layers 4 against 2",
        ),
    ],
)
def test_an_arm_of_two_models_is_refused(write_run, one, other, what):
    first = write_run("scratch", LINE, COSTS, name="a", config={"steps": 40}, **one)
    second = write_run("scratch", LINE, COSTS, name="b", config={"steps": 2}, **other)
    with pytest.raises(GrowthError) as caught:
        compare(load_runs(first.parent))
    assert caught.value.what == what
    assert caught.value.where == f"{first} and {second}"
    assert "--arm source" in caught.value.fix
    assert "leave one of them out" in caught.value.fix


def test_seeds_may_read_texts_of_their_own_and_old_records_say_nothing(write_run):
    """Negative control: another fingerprint in another seed, other keys of a model, and a record without either."""
    write_run("scratch", LINE, COSTS, data_fingerprint="a", model={"hidden_size": 64, "torch_dtype": "float32"})
    write_run("scratch", LINE, COSTS, seed=1, data_fingerprint="b", model={"hidden_size": 64, "torch_dtype": "bf16"})
    parent = write_run("scratch", LINE, COSTS, seed=2, parameters=None).parent
    assert compare(load_runs(parent)).baseline.seeds == (0, 1, 2)
