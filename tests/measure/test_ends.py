"""Costs that are read off a curve through decayed ends: exact cases, noise, ends that went wrong, sources and text."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest

from phigrow.errors import GrowthError
from phigrow.measure import compare, findings, load_runs
from phigrow.measure.ends import Ends, cross
from phigrow.measure.errors_of_means import MeanError, interval_of, over_runs, over_text
from phigrow.measure.loss_fit import LossFit
from phigrow.measure.page import page
from phigrow.measure.wording import interval_sentence

spec = importlib.util.spec_from_file_location(
    "coverage_of_studies", Path(__file__).parents[2] / "benchmarks/coverage.py"
)
simulation = importlib.util.module_from_spec(spec)
spec.loader.exec_module(simulation)

STEP = 1000  # tokens
BUDGETS = (100, 200, 400, 800, 1600)
NAN, INF = math.nan, math.inf


def law(budget):
    return 2.5 + 2.0 * budget**-0.3


@pytest.fixture
def write_ends(write_run):
    """Write an arm's decayed ends: one run for each budget, whose last evaluation is the given loss."""

    def write(arm, losses, *, seed=0, start=5.0, groups=None, **meta):
        folder = None
        study = meta.get("study", {})
        for budget, loss in zip(BUDGETS, losses, strict=False):
            name = f"{arm}-{study.get('source_seed', 'none')}-{seed}-{budget}"
            folder = write_run(
                arm, [start, loss], [0, budget * STEP], seed=seed, steps=[0, budget], name=name,
                config={"steps": budget, "schedule": "wsd"}, **meta,
            )  # fmt: skip
            if groups is not None:
                path = folder / "records.jsonl"
                lines = [json.loads(line) for line in path.read_text().splitlines()]
                lines[-1] |= {"group_losses": [loss + g for g in groups], "group_blocks": [20] * len(groups)}
                path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder.parent

    return write


@pytest.mark.parametrize("speed", [0.8, 1.0, 1.3, 2.0, 5.0])
@pytest.mark.parametrize("power", [-0.3, -1.0, 0.5])
def test_an_arm_that_is_s_times_as_fast_reads_s(speed, power):
    logs = np.log(BUDGETS)

    def curve(budget):
        return 2.5 - 0.4 * (np.asarray(budget) ** power - 1) / power / 1600 ** max(power, 0.0)

    base, arm = (LossFit(logs, curve(s * np.array(BUDGETS, dtype=float)), np.ones(5)) for s in (1.0, speed))
    reading, where = arm.crossing(base.read(math.log(1600)).loss, math.log(1600))
    assert where == "inside"
    assert 1600 / math.exp(reading.at) == pytest.approx(speed, rel=1e-6)


def test_a_baseline_whose_last_end_went_wrong(write_ends):
    """Read between the ends of an isotonic fit, as it once was, the arm seemed 2.88 times as fast."""
    losses = [law(budget) for budget in BUDGETS]
    write_ends("scratch", [*losses[:-1], losses[-2] + 0.01])
    parent = write_ends("wr", [law(2 * budget) for budget in BUDGETS])
    comparison = compare(load_runs(parent))
    assert comparison["wr"].estimate("tokens", "sunk").speedup == pytest.approx(2.0, rel=1e-4)
    better, worse = f"{losses[-2]:.4g}", f"{losses[-2] + 0.01:.4g}"
    note = f"scratch, seed 0: its end of 1600 steps is no better than the one of 800 steps ({worse} against {better})"
    assert f"{note}, so it is left out of the fit" in comparison.baseline.notes
    # A copy has the same wrong end, and the same fit.
    parent = write_ends("copy", [*losses[:-1], losses[-2] + 0.01])
    assert compare(load_runs(parent))["copy"].estimate("tokens", "sunk").speedup == 1.0


def test_losses_that_rise_at_most_budgets_are_no_accident():
    """A model that overfits: its ends are kept, and its curve falls nowhere."""
    ends = Ends(
        ((None, 0),), np.zeros(5, int), np.arange(5), np.array(BUDGETS, float), np.array([3, 3.1, 3.2, 3.3, 3.4])
    )
    assert ends.fit.read(math.log(1600)).slope == 0
    good = Ends(((None, 0),), np.zeros(5, int), np.arange(5), np.array(BUDGETS, float), law(np.array(BUDGETS)))
    assert cross(ends, good, math.log(1600)).where == "after"


@pytest.mark.parametrize("bad", [NAN, INF, 60.0])
def test_ends_that_diverged_are_treated_alike_and_named(write_ends, bad):
    write_ends("scratch", [law(budget) for budget in BUDGETS])
    losses = [law(2 * budget) for budget in BUDGETS]
    parent = write_ends("wr", [*losses[:-1], bad])
    arm = compare(load_runs(parent))["wr"]
    assert arm.estimate("tokens", "sunk").speedup == pytest.approx(2.0, rel=1e-6)
    assert any(note.startswith("wr, seed 0: its end of 1600 steps diverged (loss ") for note in arm.notes)


@pytest.mark.parametrize("bad", [NAN, 60.0])
def test_a_baseline_that_diverged_sets_no_target(write_ends, bad):
    parent = write_ends("scratch", [*[law(budget) for budget in BUDGETS[:-1]], bad])
    with pytest.raises(GrowthError, match="a run that diverged cannot set the target"):
        compare(load_runs(parent))


def test_a_seed_whose_ends_all_diverged_censors_the_arm(write_ends):
    for seed in range(3):
        write_ends("scratch", [law(budget) for budget in BUDGETS], seed=seed)
        parent = write_ends("wr", [NAN] * 5 if seed == 1 else [law(2 * budget) for budget in BUDGETS], seed=seed)
    arm = compare(load_runs(parent))["wr"]
    assert arm.censored_seeds == (1,)
    assert arm.estimate("tokens", "sunk").speedup_interval is None
    assert "wr, seed 1: censored, because all its ends diverged" in arm.notes


def test_two_ends_are_joined_by_a_straight_line(write_ends):
    write_ends("scratch", [3.0, 2.8])
    parent = write_ends("wr", [2.9, 2.7])
    arm = compare(load_runs(parent))["wr"]
    assert arm.estimate("tokens", "sunk").speedup == pytest.approx(math.sqrt(2))
    assert "wr: it has two decayed ends, so costs are read on a straight line over log cost" in arm.notes


def test_a_cost_just_beyond_the_last_end_is_read_and_named(write_ends):
    write_ends("scratch", [law(budget) for budget in BUDGETS])
    parent = write_ends("wr", [law(budget / 1.2) for budget in BUDGETS])
    arm = compare(load_runs(parent))["wr"]
    assert arm.estimate("tokens", "sunk").speedup == pytest.approx(1 / 1.2, rel=1e-6)
    assert "wr: its cost lies 20 % beyond its last end, to which its curve was extended" in arm.notes
    parent = write_ends("slow", [law(budget / 2) for budget in BUDGETS])
    assert compare(load_runs(parent))["slow"].estimate("tokens", "sunk").censored


def test_a_run_that_lacks_a_budget_moves_the_curve_no_more_than_the_others(write_ends):
    """Seed 2 is worse everywhere and lacks the last budget: the mean there must not seem better for it."""
    for seed in range(3):
        shift = 0.1 * (seed == 2)
        write_ends("scratch", [law(budget) + shift for budget in BUDGETS], seed=seed)
        parent = write_ends("wr", [law(2 * b) + shift for b in BUDGETS][: 4 if seed == 2 else 5], seed=seed)
    runs = load_runs(parent)
    arm = compare(runs, budget=800)["wr"]
    assert arm.estimate("tokens", "sunk").speedup == pytest.approx(2.0, rel=1e-3)


def test_the_influence_of_an_end_is_its_derivative():
    rng = np.random.default_rng(0)
    logs = np.log(BUDGETS)
    losses = law(np.array(BUDGETS)) + 0.01 * rng.normal(size=5)
    reading = LossFit(logs, losses, np.ones(5)).read(logs[3])
    for place in range(5):
        moved = losses.copy()
        moved[place] += 1e-6
        derivative = (LossFit(logs, moved, np.ones(5)).read(logs[3]).loss - reading.loss) / 1e-6
        assert reading.influence[place] == pytest.approx(derivative, abs=0.03)


def test_effects_of_text_are_those_of_resampling():
    """Groups of held-out blocks that are drawn again, losses computed anew, curves fitted anew, costs read anew."""
    rng = np.random.default_rng(1)
    noise = simulation.NOISE | {"document": 0.05}
    arm, base, _ = simulation.simulated_study(rng, "scaling law", "1.3x", 2, 3, noise)
    there = cross(arm, base, math.log(20))
    stretches = np.arange(100).reshape(10, 10)
    drawn = []
    for _ in range(300):
        groups = stretches[rng.integers(0, 10, 10)].ravel()
        again = [
            Ends(e.keys, e.run, e.budget, e.tokens, e.groups[:, groups].mean(1)) for e in (arm, base)
        ]  # fmt: skip
        drawn.append(cross(*again, math.log(20)).log_tokens)
    expected = over_text(there.effects.text, arm.blocks).variance * 0.9  # the bootstrap divides by n
    assert np.var(drawn) == pytest.approx(expected, rel=0.3)


def test_over_runs_of_one_source_is_the_textbook_s():
    values = {(None, 0): 1.0, (None, 1): 2.0, (None, 2): 4.0}
    error = over_runs(values)
    assert (error.variance, error.df) == (pytest.approx(np.var([1, 2, 4], ddof=1) / 3), 2)
    low, high = interval_of(0.0, [error])
    assert math.log(high) == pytest.approx(4.302653 * math.sqrt(error.variance), rel=1e-5)
    assert low * high == pytest.approx(1.0)


def test_over_runs_of_several_sources():
    only_sources = over_runs({(a, s): float(a) for a in range(2) for s in range(3)})
    assert (only_sources.variance, only_sources.df) == (pytest.approx(0.25), 1.0)
    only_seeds = over_runs({(a, s): float(s) for a in range(2) for s in range(3)})
    assert (only_seeds.variance, only_seeds.df) == (pytest.approx(1 / 3), 2.0)
    assert over_runs({(0, 0): 1.0, (0, 1): 2.0, (1, 0): 3.0, (1, 1): 1.0}) is None
    gap = over_runs({(0, 0): 1.0, (0, 1): 2.0, (0, 2): 4.0, (1, 0): 3.0})
    assert (gap.sources, gap.seeds, gap.df) == (1, 3, 2)


def test_errors_add_up():
    low, high = interval_of(0.0, [MeanError(0.01, 1e9), MeanError(0.03, 1e9)])
    assert math.log(high / low) == pytest.approx(2 * 1.959964 * 0.2, rel=1e-4)


@pytest.mark.parametrize(
    ("sources", "groups", "words"),
    [
        ((None,), None, "3 seeds: 95 % interval over paired seeds, not over the source or the held-out text"),
        ((None,), 20, "3 seeds: 95 % interval over paired seeds and held-out text, not over the source"),
        ((0, 1), 20, "2 sources and 3 seeds: 95 % interval over sources, paired seeds and held-out text"),
    ],
)
def test_the_report_says_what_an_interval_covers(write_ends, sources, groups, words):
    rng = np.random.default_rng(0)
    shifts = None if groups is None else 0.1 * rng.normal(size=groups)
    for seed in range(3):
        write_ends("scratch", [law(b) + 0.003 * rng.normal() for b in BUDGETS], seed=seed, groups=shifts)
        for source in sources:
            more = {} if source is None else {"study": {"source_seed": source}}
            noisy = [law(2 * b) + 0.003 * rng.normal() for b in BUDGETS]
            parent = write_ends("wr", noisy, seed=seed, groups=shifts, **more)
    comparison = compare(load_runs(parent))
    assert comparison["wr"].interval_note == words
    assert f"{words}." in findings(comparison)[0]
    sentence = f"95 % intervals over {words.partition(' interval over ')[2]}."
    assert interval_sentence(comparison) == interval_sentence(comparison, at_budgets=True) == sentence
    assert page(comparison, "").count(json.dumps(sentence)) == 2
    low, high = comparison["wr"].estimate("tokens", "sunk").speedup_interval
    assert low < 2.0 < high


def test_three_seeds_without_an_interval_are_not_announced_with_one(write_ends):
    for seed in range(3):
        write_ends("scratch", [law(b) for b in BUDGETS], seed=seed)
        parent = write_ends("wr", [law(2 * b) for b in BUDGETS], seed=seed, start=2.0)
    comparison = compare(load_runs(parent))
    assert comparison["wr"].estimate("tokens", "sunk").speedup_interval is None
    assert comparison["wr"].interval_note == "3 seeds, at the target before training: no interval"
    assert interval_sentence(comparison).startswith("There are no intervals (3 seeds, at the target before training).")


def test_other_groups_of_held_out_blocks_are_refused(write_ends):
    write_ends("scratch", [law(b) for b in BUDGETS], groups=[0.0, 0.1])
    parent = write_ends("wr", [law(b) for b in BUDGETS], groups=[0.0, 0.1, 0.2])
    with pytest.raises(GrowthError, match="were evaluated on different groups of held-out blocks"):
        compare(load_runs(parent))


@pytest.mark.parametrize(("sources", "seeds"), [(2, 3), (1, 3)])
def test_coverage_of_studies(sources, seeds):
    """A small sample of `benchmarks/coverage.py`: 95 % +- 3 standard errors."""
    noise = simulation.NOISE | ({} if sources > 1 else {"source": 0.0})
    row = simulation.covered_studies(np.random.default_rng(5), "scaling law", "2.0x", sources, seeds, 300, noise)
    assert 0.91 <= row["covered"] <= 0.99
    assert row["speedup, median"] == pytest.approx(2.0, rel=0.02)


def test_without_its_sources_an_interval_is_too_narrow():
    """Negative control: the same studies, read as if six runs were six seeds."""
    rng = np.random.default_rng(6)
    noise, held = simulation.NOISE | {"source": 0.008, "document": 0.0}, 0
    for _ in range(150):
        arm, base, true = simulation.simulated_study(rng, "scaling law", "1.3x", 2, 3, noise)
        there = cross(arm, base, math.log(20))
        values = {(None, place): value for place, value in enumerate(there.effects.runs.values())}
        low, high = interval_of(math.log(20) - there.log_tokens, [over_runs(values)])
        held += low <= true <= high
    assert held / 150 < 0.85
