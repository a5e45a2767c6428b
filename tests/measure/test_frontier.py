"""The flat frontier: its envelope against one that is worked out, savings, bounds, intervals, and where it is shown."""

import json
import math

import numpy as np
import pytest

from phigrow.measure import compare, findings, latex, load_runs, markdown, report
from phigrow.measure.frontier import frontier_of
from phigrow.measure.loss_fit import REACH
from phigrow.measure.page import page

SIZES = {"flat-40": 40, "flat-60": 60, "scratch": 100, "flat-160": 160}
BUDGETS = (50, 100, 200, 400, 800)
STEP = 100  # tokens


def law(size, tokens):
    """A scaling law in parameters and tokens."""
    return 1.5 + 6.0 * size**-0.35 + 40.0 * tokens**-0.35


@pytest.fixture
def write_flat(write_run):
    """Flat models of four sizes, and an arm that is ``speed`` times as fast as scratch."""

    def write(
        speed=2.0, *, offset=0.0, seeds=(0,), noise=0.0, sizes=SIZES, source_tokens=1e4, groups=None, budgets=BUDGETS
    ):
        rng = np.random.default_rng(0)
        parent = None
        for name in (*sizes, "wr"):
            size = SIZES.get(name, 100)
            for seed in seeds:
                for budget in budgets:
                    tokens = budget * STEP
                    loss = (
                        law(size, tokens * (speed if name == "wr" else 1.0))
                        + offset * (name == "wr")
                        + noise * rng.normal()
                    )
                    study = {"flat": True} if name.startswith("flat") else {}
                    folder = write_run(
                        name, [6.0, loss], [0, tokens], seed=seed, steps=[0, budget], name=f"{name}-{seed}-{budget}",
                        config={"steps": budget, "schedule": "wsd"}, parameters=size, study=study,
                        source_tokens=source_tokens if name == "wr" else 0.0,
                        growth={"method": "wr"} if name == "wr" else None,
                    )  # fmt: skip
                    path = folder / "records.jsonl"
                    lines = [json.loads(line) for line in path.read_text().splitlines()]
                    for line in lines[1:]:
                        line["flops"] = 6.0 * size * line["tokens"]
                    if name == "wr":
                        lines[0]["source_flops"] = 6.0 * 40 * source_tokens
                    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
                    parent = folder.parent
        return parent

    return write


def best_flops(loss):
    """FLOPs of the best of the four sizes at a loss, in closed form."""
    needed = []
    for size in SIZES.values():
        rest = loss - 1.5 - 6.0 * size**-0.35
        tokens = (rest / 40.0) ** (-1 / 0.35) if rest > 0 else math.inf
        if BUDGETS[0] * STEP <= tokens <= BUDGETS[-1] * STEP:  # no further than a model was trained
            needed.append(6.0 * size * tokens)
    return min(needed)


def test_the_envelope_is_that_of_the_best_size(write_flat):
    frontier = frontier_of(compare(load_runs(write_flat())))
    assert list(frontier.sizes) == ["flat-40", "flat-60", "scratch", "flat-160"]
    for loss in np.linspace(3.6, 4.6, 11):
        point = frontier.at_loss(loss)
        assert point.where == "inside"
        # Where two sizes meet, the hull lies a little below both.
        assert math.exp(point.log_flops) == pytest.approx(best_flops(loss), rel=0.06)
        assert math.exp(point.log_flops) <= best_flops(loss) * 1.001


def test_flat_models_are_no_arms_and_savings_are_those_of_the_law(write_flat):
    comparison = compare(load_runs(write_flat()))
    assert [arm.name for arm in comparison.arms] == ["wr"]
    assert set(comparison.flat) == {"flat-40", "flat-60", "flat-160"}
    sunk, charged = comparison["wr"].frontier
    spent = 6.0 * 100 * 800 * STEP
    loss = law(100, 2 * 800 * STEP)
    assert sunk.loss == pytest.approx(loss)
    assert sunk.cost == spent
    assert charged.cost == spent + 6.0 * 40 * 1e4
    assert sunk.saving == pytest.approx(1 - spent / best_flops(loss), abs=0.06)
    assert not sunk.bound


def test_a_loss_below_every_flat_model_is_a_bound(write_flat):
    comparison = compare(load_runs(write_flat(offset=-1.0)))
    sunk, _ = comparison["wr"].frontier
    assert (sunk.bound, sunk.interval) == ("at least", None)
    assert "> " in markdown(comparison).split("frontier saving, sunk")[1]


def test_the_bound_follows_from_how_far_the_frontier_is_read(write_flat):
    """Just inside and just outside of what is read, the savings of two arms are nearly the same."""
    frontier = frontier_of(compare(load_runs(write_flat())))
    end, least, name = frontier.hull[-1]
    border = frontier.sizes[name].fit.read(end + REACH).loss
    assert border < least
    inside, outside = frontier.at_loss(border + 1e-6), frontier.at_loss(border - 1e-6)
    assert (inside.where, outside.where) == ("inside", "after")
    assert outside.log_flops == end + REACH
    assert inside.log_flops == pytest.approx(outside.log_flops, abs=1e-4)


def test_intervals_hold_the_truth_and_need_seeds_of_every_size(write_flat):
    parent = write_flat(seeds=range(3), noise=0.002)
    runs = load_runs(parent)
    sunk, charged = compare(runs)["wr"].frontier
    truth = 1 - 6.0 * 100 * 800 * STEP / best_flops(law(100, 1600 * STEP))
    assert sunk.interval[0] < truth < sunk.interval[1]
    assert charged.interval[0] < charged.saving < charged.interval[1]
    one_seed = [run for run in runs if not run.is_flat or run.seed == 0]
    assert compare(one_seed)["wr"].frontier[0].interval is None


def test_the_frontier_is_in_every_form(write_flat, tmp_path):
    parent = write_flat(seeds=range(3), noise=0.002)
    comparison = report(parent, tmp_path / "report")
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"frontier.svg", "frontier.png", "frontier.pdf"} <= names
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [each["accounting"] for each in data["arms"][1]["frontier"]] == ["sunk", "charged"]
    assert len(data["flat"]["sizes"]) == 4
    assert "frontier saving, charged" in latex(comparison)
    for text in (" ".join(findings(comparison)), page(comparison, ""), markdown(comparison)):
        assert "flat" in text
    assert "Saving against the flat frontier, in FLOPs" in findings(comparison)[0]


def test_without_flat_models_the_report_says_so(write_flat, tmp_path):
    parent = write_flat(sizes={"scratch": 100})
    comparison = report(parent, tmp_path / "report")
    assert comparison["wr"].frontier == ()
    assert not (tmp_path / "report" / "frontier.svg").exists()
    sentence = "These folders have no flat models of other sizes, so there is no flat frontier to compare with."
    assert sentence in (tmp_path / "report" / "report.md").read_text()
    assert sentence in (tmp_path / "report" / "report.html").read_text()
