"""Marks beside figures: rates at the edge of their grid, seconds of a shared machine, targets that the source meets."""

import io
import json

import pytest
from rich.console import Console

from phigrow.errors import GrowthError
from phigrow.measure import budget_figure, compare, curves, findings, latex, load_runs, markdown, report, terminal
from phigrow.measure.page import page
from phigrow.measure.tables import start_in_words
from phigrow.measure.wording import verdict

STEP = 1000
BUDGETS = (100, 200, 400, 800)
SWEEP = {"steps": [200, 800], "seeds": [7], "losses": {}}


def law(budget):
    return 2.5 + 2.0 * budget**-0.3


@pytest.fixture
def write_study(write_run):
    """Three seeds of an arm at four budgets."""

    def write(arm, speed=1.0, *, offset=0.0, source_loss=None, edge=None, lr=1e-3, shared=1, seeds=range(3), **meta):
        study = {"side_by_side": shared} | ({} if source_loss is None else {"source_loss": source_loss})
        for seed in seeds:
            for budget in BUDGETS:
                loss = law(speed * budget) + offset + 0.001 * (seed - 1)
                sweep = SWEEP | {"lr": [lr / 2, lr, 2 * lr], "edge": edge}
                config = {"steps": budget, "schedule": "wsd", "lr": lr, "lr_chosen_by": sweep}
                folder = write_run(
                    arm, [4.0, loss], [0, budget * STEP], seed=seed, steps=[0, budget], name=f"{arm}-{seed}-{budget}",
                    config=config | meta.get("config", {}),
                    study=study, **{key: value for key, value in meta.items() if key != "config"},
                )  # fmt: skip
        return folder.parent

    return write


def everywhere(comparison):
    """The comparison in every form that shows figures."""
    text = io.StringIO()
    Console(file=text, width=200).print(terminal(comparison, "seconds"))
    figure = curves(comparison)
    legend = " ".join(handle.get_text() for axes in figure.axes for handle in axes.get_legend().get_texts())
    return {
        "markdown": markdown(comparison),
        "terminal": text.getvalue(),
        "latex": latex(comparison).replace(r"\dag{}", "†").replace(r"\ddag{}", "‡"),
        "findings": " ".join(findings(comparison)),
        "page": page(comparison, ""),
        "legend": legend,
    }


def test_a_rate_at_the_edge_is_marked_wherever_its_arm_has_a_figure(write_study):
    write_study("scratch")
    parent = write_study("wr", 2.0, edge="high", lr=4e-3, growth={"method": "wr"})
    comparison = compare(load_runs(parent))
    assert comparison["wr"].label == "wr †"
    for form, text in everywhere(comparison).items():
        assert "wr †" in text, form
        assert form == "legend" or "the largest tried, so a better one may exist" in " ".join(text.split()), form
    assert verdict(comparison).startswith("wr † reached")
    assert "wr †" in " ".join(t.get_text() for t in budget_figure(comparison).legends[0].get_texts())
    notes = comparison.baseline.notes
    assert any("3 rates, halved after 200 of 800 steps, with seeds 7, which are not reported" in note for note in notes)


def test_a_rate_inside_its_grid_is_not_marked(write_study):
    write_study("scratch")
    parent = write_study("wr", 2.0, growth={"method": "wr"})
    for form, text in everywhere(compare(load_runs(parent))).items():
        assert "wr †" not in text, form


def test_sweeps_that_differ_in_more_than_their_rates_are_refused(write_study):
    write_study("scratch")
    other = {"lr": [1e-3, 2e-3], "steps": [200, 400], "seeds": [7], "losses": {}, "edge": None}
    parent = write_study("wr", 2.0, lr=2e-3, config={"lr_chosen_by": other})
    with pytest.raises(GrowthError, match=r"config\.lr is 0\.002 against 0\.001"):
        compare(load_runs(parent))


def test_seconds_of_a_shared_machine_are_marked_and_have_no_interval(write_study, tmp_path):
    write_study("scratch")
    parent = write_study("wr", 2.0, shared=2, growth={"method": "wr"})
    comparison = compare(load_runs(parent))
    wr = comparison["wr"]
    assert wr.estimate("tokens", "sunk").speedup_interval is not None
    assert wr.estimate("seconds", "sunk").speedup_interval is None
    for form, text in everywhere(comparison).items():
        if form != "legend":
            assert "2.00x ‡" in text or "2.00$\\times$ ‡" in text or "shared_machine" in text, form
    data = json.dumps(report_data(parent, tmp_path))
    assert data.count('"shared_machine": true') == 2 * (1 + len(BUDGETS))


def report_data(parent, tmp_path):
    report(parent, tmp_path / "report")
    return json.loads((tmp_path / "report" / "report.json").read_text())


def test_a_source_below_the_target_is_named_first(write_study):
    write_study("scratch")
    final = law(800)
    write_study("wr", 3.0, source_loss=final - 0.05, growth={"method": "wr"})
    parent = write_study("continued", 1.5, config={"init": "source"})
    comparison = compare(load_runs(parent))
    text = verdict(comparison)
    assert text.startswith(
        f"The source of wr is already below scratch's final loss ({final - 0.05:.3f} against {final:.3f})."
    )
    assert "The arm to beat is continued, the source trained further: it ends at" in text
    assert "Of these arms, wr ends below it." in text
    assert "Train scratch to a larger budget" in text
    assert "source is below" in page(comparison, "")
    assert comparison["wr"].vanishing("tokens", "sunk").state == "unknown"


def test_an_arm_that_the_source_teaches_is_not_the_source_trained_on(write_study):
    write_study("scratch")
    final = law(800)
    write_study("wr", 3.0, source_loss=final - 0.05, growth={"method": "wr"})
    taught = {"name": "small", "steps": 1200, "weight": 0.5, "flops_per_token": 7.0}
    parent = write_study("salt", 1.5, source_loss=final - 0.05, teacher=taught)
    comparison = compare(load_runs(parent))
    assert "The arm to beat is the source trained further, and these folders have no such arm." in verdict(comparison)
    assert start_in_words(comparison["salt"]) == "random weights; taught by small in 1,200 steps"
    assert start_in_words(comparison["wr"]) == "grown by wr"


def test_budgets_at_which_the_source_meets_the_target_are_not_read(write_study, tmp_path):
    write_study("scratch")
    parent = write_study("wr", 3.0, source_loss=law(300), growth={"method": "wr"})
    comparison = compare(load_runs(parent))
    assert verdict(comparison).startswith("wr reached scratch's final loss")
    points = report_data(parent, tmp_path)["arms"][1]["budgets"]
    assert [point.get("source_meets_target", False) for point in points] == [True, True, False, False]
    assert "is below scratch's loss at 2 of 4 budgets" in findings(comparison)[0]
    assert comparison["wr"].vanishing("tokens", "sunk").state == "never"


def test_no_source_trained_on(write_study):
    write_study("scratch")
    parent = write_study("wr", 3.0, source_loss=2.0, growth={"method": "wr"})
    assert "these folders have no such arm" in verdict(compare(load_runs(parent)))
