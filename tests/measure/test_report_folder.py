"""A report replaces the files of an earlier report, and no others."""

import json

import pytest

from phigrow.errors import GrowthError
from phigrow.files.output import check_file
from phigrow.measure import report
from phigrow.records.concatenation import is_concatenated
from phigrow.records.schema import FILE
from phigrow.study.results import check_result_files

LINE = [5.0, 4.0, 3.0]
COSTS = [0, 1e6, 2e6]


@pytest.fixture
def runs(write_run):
    write_run("scratch", LINE, COSTS)
    return write_run("wr", [5.0, 3.0, 1.0], COSTS).parent


@pytest.mark.parametrize("name", ["report.md", "curves.png", "report.json", "budgets.pdf"])
def test_a_file_of_a_user_is_not_replaced(runs, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(GrowthError, match=f"{name} exists, and it is not a file of an earlier report"):
        report(runs, out)
    assert [path.name for path in out.iterdir()] == [name]
    assert (out / name).read_text() == "mine"


def test_a_report_replaces_its_own_files_and_keeps_others(runs, tmp_path):
    out = tmp_path / "out"
    report(runs, out)
    files = json.loads((out / "report.json").read_text())["files"]
    assert sorted(path.name for path in out.iterdir()) == files
    (out / "notes.md").write_text("mine")
    (out / "report.md").write_text("of an earlier report")
    (out / ".report.partial").write_text("mine")
    report(runs, out)
    assert (out / "report.md").read_text().startswith("# Growth against scratch")
    assert (out / "notes.md").read_text() == (out / ".report.partial").read_text() == "mine"
    (out / "frontier.png").write_text("mine")  # no report has written this one
    report(runs, out)
    assert (out / "frontier.png").read_text() == "mine"


def test_a_report_of_an_older_release_is_replaced(runs, tmp_path):
    out = tmp_path / "out"
    report(runs, out)
    content = json.loads((out / "report.json").read_text())
    del content["files"]
    (out / "report.json").write_text(json.dumps(content | {"format": 2}))
    report(runs, out)
    assert json.loads((out / "report.json").read_text())["format"] == 3


@pytest.mark.parametrize(
    ("name", "own"), [("sweep.json", {"arms": {}, "steps": 4}), ("choices.json", {"dtype": {"value": "bf16"}})]
)
def test_results_of_a_study_replace_their_own_kind_only(tmp_path, name, own):
    (tmp_path / name).write_text(json.dumps(own))
    check_result_files(tmp_path)
    (tmp_path / name).write_text('{"my": "own"}')
    with pytest.raises(GrowthError, match=r"the output exists, and it is not the .* that phigrow wrote"):
        check_result_files(tmp_path)
    check_result_files(tmp_path / "elsewhere")


def test_a_report_folder_of_a_user_stops_a_study_before_it_trains(tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.md").write_text("mine")
    with pytest.raises(GrowthError, match=r"report.md exists, and it is not a file of an earlier report"):
        check_result_files(tmp_path)


def test_records_of_stages_replace_records_of_stages_only(write_run):
    """`phigrow grow-train` into the folder of a run would replace the records of that run."""
    run, stages = write_run("wr", LINE, COSTS), write_run("staged", LINE, COSTS, stage_settings=[{}])

    def check(folder):
        check_file(folder / FILE, is_concatenated, "the records of stages", "--out")

    check(stages)
    with pytest.raises(GrowthError, match=r"it is not the records of stages that phigrow wrote"):
        check(run)
