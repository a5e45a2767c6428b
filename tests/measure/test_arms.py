"""Sources and their ages as arms of a report, and the errors of folders that do not make one study."""

import pytest

from phigrow.errors import GrowthError
from phigrow.measure import compare, load_runs
from phigrow.measure.arms import labelled
from phigrow.measure.one_study import covering_folders

LINE, FAST, COSTS = [5.0, 4.0, 3.0], [5.0, 3.0, 2.0], [0, 100, 200]


def grown(write_run, arm="wr", losses=FAST, *, seed=0, name, **study):
    return write_run(arm, losses, COSTS, seed=seed, name=name, growth={"method": "wr"}, study=study)


@pytest.fixture
def two_sources(write_run):
    """Scratch with three seeds, and wr from two sources at two ages."""
    for seed in range(3):
        write_run("scratch", LINE, COSTS, seed=seed)
        for source in (0, 1):
            for age in (2, 20):
                name = f"wr-{age}-{source}-{seed}"
                folder = grown(write_run, seed=seed, name=name, source_seed=source, source_age=age + 0.001 * source)
    return folder.parent


def test_ages_are_arms_and_source_seeds_are_not(two_sources):
    comparison = compare(load_runs(two_sources))
    assert [arm.name for arm in comparison.arms] == ["wr @ 2", "wr @ 20"]
    for arm in comparison.arms:
        assert [run.key for run in arm.runs] == [(a, b) for a in (0, 1) for b in range(3)]
        assert (arm.seeds, arm.source_seeds) == ((0, 1, 2), (0, 1))
        assert arm.estimate("tokens", "sunk").speedup == 2.0


def test_one_age_leaves_the_name_alone_and_old_records_mix_in(two_sources, write_run):
    write_run("old", FAST, COSTS)
    runs = [run for run in load_runs(two_sources) if run.study.get("source_age", 2) < 3]
    comparison = compare(runs)
    assert [arm.name for arm in comparison.arms] == ["old", "wr"]
    assert comparison["old"].runs[0].key == (None, 0)
    assert comparison["wr"].runs[0].name == "wr, source seed 0, seed 0"


def test_labels_name_only_what_differs(write_run):
    starts = [
        {"source": "wide", "source_age": 2},
        {"source": "shallow", "source_age": 2},
        {"source": "wide", "source_age": 2, "source_constant": True},
        {"source": "wide", "source_age": 2, "same_text": True},
    ]
    for number, study in enumerate(starts):
        folder = grown(write_run, name=str(number), **study)
    names = [run.arm for run in labelled(load_runs(folder.parent))]
    assert names == ["wr from wide", "wr from shallow", "wr from wide, constant rate", "wr from wide, same text"]


def test_two_runs_of_one_arm_source_seed_and_seed_are_refused(write_run):
    write_run("scratch", LINE, COSTS)
    first = grown(write_run, name="a", source_seed=1)
    second = grown(write_run, name="b", source_seed=1)
    with pytest.raises(GrowthError) as caught:
        compare(load_runs(first.parent))
    assert caught.value.what == "there are two runs of wr, source seed 1, seed 0, 2 steps"
    assert caught.value.where == f"{first} and {second}"


def test_a_baseline_of_two_sources_is_refused(two_sources):
    with pytest.raises(GrowthError, match="wr @ 2 has runs of several sources with seed 0, source seed 1 among them"):
        compare(load_runs(two_sources), "wr @ 2")


@pytest.mark.parametrize("key", ["data_fingerprint", "eval_fingerprint", "content_fingerprint"])
def test_two_studies_in_one_folder_are_sorted(write_run, key):
    write_run("scratch", LINE, COSTS, name="one/scratch", **{key: "a" * 64})
    first = write_run("wr", LINE, COSTS, name="one/wr", **{key: "a" * 64}).parent
    second = write_run("scratch", LINE, COSTS, name="two/scratch", **{key: "b" * 64})
    with pytest.raises(GrowthError) as caught:
        compare(load_runs(first.parent))
    assert caught.value.what.startswith("these folders hold runs of 2 studies: their ")
    assert key in caught.value.what
    assert caught.value.where == f"aaaaaaaaaaaa: {first} (2 runs); bbbbbbbbbbbb: {second} (1 run)"
    assert "one report for each of these groups" in caught.value.fix
    # Negative control: without the other study there is a report.
    assert compare(load_runs(first)).arms[0].name == "wr"


def test_covering_folders(write_run):
    for name in ("a/x/1", "a/x/2", "a/y/1", "b/1"):
        folder = write_run("wr", LINE, COSTS, name=name)
    top = folder.parents[1]
    runs = load_runs(top)
    paths = {str(run.folder.relative_to(top)): run.folder for run in runs}
    one = [paths["a/x/1"], paths["a/x/2"]]
    assert covering_folders(one, runs) == [top / "a" / "x"]
    assert covering_folders([*one, paths["a/y/1"]], runs) == [top / "a"]
    assert covering_folders([*one, paths["b/1"]], runs) == [top / "a" / "x", top / "b" / "1"]


@pytest.mark.parametrize(
    ("study", "text"),
    [
        ([1], r"'study' of the run record is \[1\]"),
        ({"source_seed": "0"}, "'source_seed' of 'study' is '0'"),
        ({"source_age": -1}, "'source_age' of 'study' is -1"),
        ({"flat": 1}, "'flat' of 'study' is 1"),
        ({"side_by_side": 0}, "'side_by_side' of 'study' is 0"),
    ],
)
def test_damaged_study_records_are_errors(write_run, study, text):
    folder = write_run("wr", LINE, COSTS, study=study)
    with pytest.raises(GrowthError, match=text) as caught:
        load_runs(folder)
    assert "line 1" in caught.value.where
