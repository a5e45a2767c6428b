"""Studies of several budgets: decayed ends, branches of a trunk, speedup against budget, where the interval meets 0."""

import json
import math

import numpy as np
import pytest

from phigrow.errors import GrowthError
from phigrow.measure import compare, load_runs
from phigrow.measure.estimates import Arm, BudgetPoint, Estimate, Vanishing
from phigrow.measure.wording import vanishing_text

STEP = 1000  # tokens


def curve(speed, tokens, budget):
    """Decayed only at its end: before, the loss lies 0.2 above what the decayed model would have there."""
    decayed = 2.5 + 2.0 * (speed * np.asarray(tokens) / 1e6 + 0.02) ** -0.3
    return decayed + 0.2 * (np.asarray(tokens) < budget * STEP)


@pytest.fixture
def study(write_run):
    """scratch, and an arm `speed(budget)` as fast, at budgets of 100 to 1600 steps."""

    def make(speed=lambda budget: 2.0, *, seeds=(0,), budgets=(100, 200, 400, 800, 1600), jitter=0.0, **meta):
        folder = None
        for seed in seeds:
            rng = np.random.default_rng(seed)
            for arm in ("scratch", "wr"):
                for budget in budgets:
                    tokens = np.linspace(0, budget * STEP, 21)
                    rate = 1.0 if arm == "scratch" else speed(budget) * math.exp(jitter * rng.normal())
                    config = {"steps": budget, "schedule": "wsd"}
                    folder = write_run(
                        arm, curve(rate, tokens, budget), tokens, seed=seed, config=config,
                        name=f"{arm}-{seed}-{budget}", steps=np.linspace(0, budget, 21).astype(int),
                        source_tokens=0 if arm == "scratch" else 1e5, **meta,
                    )  # fmt: skip
        return folder.parent

    return make


def test_costs_are_read_between_decayed_ends(study):
    parent = study()
    wr = compare(load_runs(parent))["wr"]
    assert wr.basis == "ends"
    sunk = wr.estimate("tokens", "sunk")
    assert sunk.baseline_cost == pytest.approx(1.6e6)
    assert sunk.speedup == pytest.approx(2.0, rel=0.01)  # its law has an offset, which the fit has not
    assert wr.estimate("tokens", "charged").cost == pytest.approx(9e5, rel=0.01)
    # Negative control: off the one curve the undecayed loss hides most of it.
    alone = compare([run for run in load_runs(parent) if run.budget == 1600])["wr"]
    assert alone.basis == "curve"
    assert alone.estimate("tokens", "sunk").speedup < 1.4


def test_between_ends_the_logarithm_of_the_cost_is_interpolated(study):
    wr = compare(load_runs(study(speed=lambda b: 1.5)))["wr"]
    assert wr.estimate("tokens", "sunk").speedup == pytest.approx(1.5, rel=0.02)


def test_speedup_against_budget(study):
    wr = compare(load_runs(study()))["wr"]
    assert [point.budget for point in wr.budgets] == [1e5, 2e5, 4e5, 8e5, 1.6e6]
    assert {point.basis for point in wr.budgets} == {"ends"}
    first, *others = (point.estimate("tokens", "sunk") for point in wr.budgets)
    assert first.upper_bound  # its smallest end is below scratch's smallest: how early it got there was not measured
    assert first.speedup == 1.0  # a lower bound
    assert first.speedup_interval is None
    assert [each.speedup for each in others] == pytest.approx([2.0] * 4, rel=0.01)
    charged = [point.estimate("tokens", "charged").speedup for point in wr.budgets[1:]]
    assert charged == pytest.approx([2e5 / 2e5, 4e5 / 3e5, 8e5 / 5e5, 1.6e6 / 9e5], rel=0.01)


def test_the_budget_where_the_gain_vanishes(study):
    """The arm's head start melts: 3 times as fast at the smallest budget, slower at the largest."""
    fades = {100: 3.0, 200: 2.4, 400: 1.7, 800: 1.15, 1600: 0.9}
    wr = compare(load_runs(study(fades.__getitem__, seeds=range(5), jitter=0.03)))["wr"]
    found = wr.vanishing("tokens", "sunk")
    assert found.state == "met"
    assert 8e5 < found.budget <= 1.6e6  # there it is censored
    lows = {p.budget: p.estimate("tokens", "sunk").speedup_interval for p in wr.budgets}
    assert lows[4e5][0] > 1


def test_a_gain_that_holds_does_not_vanish(study):
    runs = load_runs(study(seeds=range(4), jitter=0.03, budgets=(200, 400, 800)))
    assert compare(runs)["wr"].vanishing("tokens", "sunk") == Vanishing("never")
    few = compare([run for run in runs if run.seed < 2])["wr"]
    assert few.vanishing("tokens", "sunk") == Vanishing("unknown")


def point(budget, low):
    estimate = Estimate("tokens", "sunk", 1.0, 1.0, False, None if low is None else (low, 2 * low))
    return BudgetPoint(budget, 3.0, "ends", (0,), (estimate,))


@pytest.mark.parametrize(
    ("lows", "state", "budget"),
    [
        ((2.0, 1.5), "never", None),
        ((0.9, 0.8), "always", None),
        ((None, None), "unknown", None),
        ((2.0, 0.5), "met", 10 ** (1 / 3)),  # savings 0.5 and -1: a third of the way in log budget
        ((None, 2.0, 1.0), "met", 100.0),
    ],
)
def test_vanishing(lows, state, budget):
    arm = Arm("wr", (), 3.0, {}, budgets=tuple(point(10.0**i, low) for i, low in enumerate(lows)))
    found = arm.vanishing("tokens", "sunk")
    assert found.state == state
    assert found.budget == (None if budget is None else pytest.approx(budget))
    assert found.above_from is None


def test_an_interval_that_rises_above_zero_is_not_above_zero_at_every_budget():
    arm = Arm("wr", (), 3.0, {}, budgets=tuple(point(10.0**i, low) for i, low in enumerate((2.0, 0.9, 1.1, 1.2))))
    found = arm.vanishing("tokens", "sunk")
    assert (found.state, found.above_from) == ("never", 100.0)
    sentence = "The interval of the saving in tokens is above zero only from a budget of 100 tokens on."
    assert vanishing_text(arm, "sunk") == sentence
    always = Arm("wr", (), 3.0, {}, budgets=tuple(point(10.0**i, 1.1) for i in range(4)))
    assert vanishing_text(always, "sunk") != sentence
    assert "above zero up to the largest budget, 1k tokens" in vanishing_text(always, "sunk")


def test_a_budget_can_be_asked_for(study):
    parent = study()
    comparison = compare(load_runs(parent), budget=400)
    assert comparison["wr"].estimate("tokens", "sunk").baseline_cost == pytest.approx(4e5)
    with pytest.raises(GrowthError, match=r"no run of scratch has a budget of 300 steps\n.*100, 1600, 200, 400, 800"):
        compare(load_runs(parent), budget=300)


def test_a_copy_of_scratch_scores_one_at_every_budget_though_its_ends_are_noisy(write_run):
    finals = {100: 3.0, 200: 3.1, 400: 2.8, 800: 2.9}
    for arm in ("scratch", "copy"):
        for budget, final in finals.items():
            tokens = np.linspace(0, budget * STEP, 3)
            steps = (0, budget // 2, budget)
            folder = write_run(
                arm, [5.0, 4.0, final], tokens, config={"steps": budget}, name=f"{arm}-{budget}", steps=steps
            )
    copy = compare(load_runs(folder.parent))["copy"]
    assert [point.estimate("tokens", "sunk").speedup for point in copy.budgets] == [1.0] * 4
    assert copy.estimate("tokens", "charged").speedup == 1.0


def test_branches_begin_with_their_trunk(write_run):
    """A trunk that never decays, and two decayed ends that branch off it, whose records begin where they do."""
    for arm, speed in (("scratch", 1.0), ("wr", 2.0)):
        trunk = f"{arm}-0"
        tokens = np.linspace(0, 4e5, 41)
        steps = np.linspace(0, 400, 41).astype(int)
        write_run(arm, curve(speed, tokens, 1e9), tokens, name=f"{arm}-trunk", steps=steps, trunk=trunk, budget=None)
        for budget in (200, 400):
            late = np.linspace(0.8 * budget, budget, 3)
            folder = write_run(
                arm, curve(speed, late * STEP, budget), late * STEP, name=f"{arm}-{budget}", steps=late.astype(int),
                config={"steps": budget}, trunk=trunk, budget=budget,
            )  # fmt: skip
    comparison = compare(load_runs(folder.parent))
    base = comparison.baseline
    assert base.runs[0].evals["step"].tolist() == [*range(0, 320, 10), 320, 360, 400]
    assert set(base.loss_at) == {0, 10, 100}
    assert len(base.runs) == 1  # the trunk is no run of its own
    assert comparison["wr"].estimate("tokens", "sunk").speedup == pytest.approx(2.0, rel=1e-3)


def test_one_budget_is_marked_as_mid_schedule(experiment):
    wr = compare(load_runs(experiment()))["wr"]
    assert {point.basis for point in wr.budgets} == {"curve"}
    assert wr.budgets[-1].estimates == wr.estimates
    assert len(wr.budgets) > 8
    speeds = [point.estimate("tokens", "sunk").speedup for point in wr.budgets]
    assert speeds[1:] == pytest.approx([2.0] * (len(speeds) - 1), rel=0.02)
    assert speeds[0] == pytest.approx(2.0, rel=0.06)  # between its second and third evaluation, which are far apart


def test_a_constant_schedule_has_no_middle(write_run, power_law):
    tokens = np.linspace(0, 2.4e6, 61)
    for arm, speed in (("scratch", 1), ("wr", 2)):
        folder = write_run(arm, power_law(tokens, speed), tokens, config={"schedule": "constant"})
    assert compare(load_runs(folder.parent))["wr"].basis == "constant"


def test_seeds_and_arms_without_the_budget_are_named(study, tmp_path):
    runs = load_runs(study(seeds=(0, 1), budgets=(100, 200, 400)))
    short = [run for run in runs if not (run.arm == "wr" and run.seed == 1 and run.budget == 400)]
    wr = compare(short)["wr"]
    assert wr.seeds == (0,)
    assert "wr, seed 1: left out, because it and scratch do not both have a run of 400 steps" in wr.notes
    none = [run for run in runs if not (run.arm == "wr" and run.budget == 400)]
    assert compare(none).notes == ("wr is left out: it has no run of 400 steps",)


def test_an_end_that_diverged_is_no_end(study):
    parent = study()
    path = next(path for path in parent.glob("wr-0-1600/records.jsonl"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[-1]["loss"] = math.nan
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    wr = compare(load_runs(parent))["wr"]
    assert "wr, seed 0: diverged: the loss is not finite at step 1600" in wr.notes
    assert wr.estimate("tokens", "sunk").speedup == pytest.approx(2.0, rel=1e-3)  # at 800 steps it was there


def test_the_expansion_is_on_the_account_of_seconds(write_run):
    line, costs = [5.0, 4.0, 3.0], [0, 4000, 8000]  # one and two seconds
    write_run("scratch", line, costs)
    parent = write_run("wr", [5.0, 3.0, 2.0], costs, source_tokens=8000, expand_seconds=0.5).parent
    wr = compare(load_runs(parent))["wr"]
    assert wr.estimate("seconds", "sunk").cost == pytest.approx(1.5)
    assert wr.estimate("seconds", "charged").cost == pytest.approx(2.5)
    assert wr.estimate("tokens", "sunk").cost == pytest.approx(4000)
