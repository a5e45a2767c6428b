"""Refined ends: trained where a cost was read between two others, and the report on how far off that reading was."""

import math

import pytest

from phigrow.measure import compare, load_runs
from phigrow.measure.ends import Ends
from phigrow.measure.pairing import grouped
from phigrow.measure.refined import tokens_to_refine

STEP = 1000  # tokens
BUDGETS = (100, 200, 400, 800, 1600)


def law(budget):
    return 2.5 + 2.0 * budget**-0.3


@pytest.fixture
def write_end(write_run):
    def write(arm, budget, loss, seed, **study):
        return write_run(
            arm, [5.0, loss], [0, budget * STEP], seed=seed, steps=[0, budget], name=f"{arm}-{seed}-{budget}",
            config={"steps": budget, "schedule": "wsd"}, study=study,
        ).parent  # fmt: skip

    return write


@pytest.fixture
def arms(write_end):
    """A baseline, and an arm that is 1.3 times as fast, with two seeds."""
    for seed in (0, 1):
        for budget in BUDGETS:
            write_end("scratch", budget, law(budget) + 0.001 * seed, seed)
            folder = write_end("wr", budget, law(1.3 * budget) + 0.001 * seed, seed)
    return folder


def crossing(folder):
    found = grouped(load_runs(folder))
    base = {seed: runs for (_, seed), runs in found["scratch"].items()}
    ends = Ends.of({(None, seed): runs for seed, runs in base.items()})
    return tokens_to_refine(found["wr"], {seed: runs[1600] for seed, runs in base.items()}, ends)


def test_the_cost_is_read_without_refined_ends(arms, write_end):
    assert crossing(arms) == pytest.approx(1600 * STEP / 1.3, rel=1e-4)
    before = crossing(arms)
    for seed in (0, 1):
        write_end("wr", 1231, 3.0, seed, refined=True)
    assert crossing(arms) == before


@pytest.mark.parametrize("speed", [1.0, 1.3])
def test_the_report_says_how_far_off_the_reading_was(arms, write_end, speed):
    """An end on the curve changes nothing. One that lies higher moves the cost, and the note has the difference."""
    without = compare(load_runs(arms))["wr"].estimate("tokens", "sunk").cost
    loss = law(speed * 1231)
    for seed in (0, 1):
        write_end("wr", 1231, loss + 0.001 * seed, seed, refined=True)
    arm = compare(load_runs(arms))["wr"]
    (note,) = [note for note in arm.notes if "refined" in note]
    target = law(1600) + 0.0005
    assert f"ends of 1231 steps, which have a loss of {loss + 0.0005:.4f} (target {target:.4f})" in note
    off = without / arm.estimate("tokens", "sunk").cost - 1
    assert (abs(off) < 1e-3) == (speed == 1.3)
    assert note.endswith(f"its cost would read {abs(off):.1%} {'more' if off > 0 else 'less'}")


def test_a_refined_end_of_another_budget_is_not_spoken_of(arms, write_end):
    for seed in (0, 1):
        write_end("wr", 1231, law(1.3 * 1231), seed, refined=True)
    at_800 = compare(load_runs(arms), budget=800)["wr"]
    assert not [note for note in at_800.notes if "refined" in note]
    assert at_800.estimate("tokens", "sunk").speedup == pytest.approx(1.3, rel=1e-2)


def test_nothing_is_refined_where_nothing_was_interpolated(write_end):
    for budget in BUDGETS:
        write_end("scratch", budget, law(budget), 0)
        folder = write_end("wr", budget, law(budget / 1.2), 0)  # its curve meets the target after its last end
    assert crossing(folder) is None


def test_a_diverged_run_is_not_refined(arms, write_end):
    for budget in BUDGETS:
        write_end("wr", budget, math.nan, 2)
        write_end("scratch", budget, law(budget), 2)
    assert crossing(arms) is None
