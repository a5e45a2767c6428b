"""Saving against the source's age: which arms make a line, the figure, and the page."""

import json

import pytest

from phigrow.measure import compare, load_runs, report
from phigrow.measure.study_figures import age_figure, age_lines

COSTS = [0, 100, 200]


@pytest.fixture
def ages(write_run):
    """wr and tile from sources of ages 20 and 2, and an arm with one age only."""
    write_run("scratch", [5.0, 4.0, 3.0], COSTS)
    for method, losses in (("wr", [5.0, 3.0, 2.0]), ("tile", [5.0, 3.5, 2.5])):
        for age in (20, 2):
            study = {"source_age": age, "source_loss": 3.5}
            folder = write_run(method, losses, COSTS, name=f"{method}-{age}", growth={"method": method}, study=study)
    write_run("stack", [5.0, 3.0, 2.0], COSTS, growth={"method": "stack"}, study={"source_age": 5})
    return folder.parent


def test_a_method_with_several_ages_makes_a_line(ages):
    comparison = compare(load_runs(ages))
    assert [arm.name for arm in comparison.arms] == ["stack", "tile @ 2", "tile @ 20", "wr @ 2", "wr @ 20"]
    lines = [(name, [age for age, _ in line]) for name, line in age_lines(comparison)]
    assert lines == [("tile", [2.0, 20.0]), ("wr", [2.0, 20.0])]
    figure = age_figure(comparison)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["tile", "wr"]
    (line,) = [line for line in figure.axes[0].get_lines() if line.get_label() == "wr"]
    assert line.get_ydata().tolist() == [0.5, 0.5]


def test_arms_whose_source_meets_the_target_make_none(ages):
    runs = load_runs(ages)
    for run in runs:
        run.meta.get("study", {}).pop("source_loss", None)
        if run.arm in ("wr", "tile"):
            run.meta["study"]["source_loss"] = 2.9
    comparison = compare([run for run in runs if run.arm != "stack"])
    # Costs of one budget are read seed by seed, and the target is scratch's end.
    assert age_lines(comparison) == []
    assert age_figure(comparison) is None


def test_the_report_has_the_picture(ages, tmp_path):
    report(ages, tmp_path / "report")
    assert (tmp_path / "report" / "ages.svg").exists()
    assert "## Saving against the source's age" in (tmp_path / "report" / "report.md").read_text()
    page = (tmp_path / "report" / "report.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert [line["method"] for line in data["ages"]] == ["tile", "wr"]
    assert [point["age"] for point in data["ages"][0]["points"]] == [2.0, 20.0]
