"""The meter against curves whose speedup is known, its accounting, its intervals and its refusals."""

import json
import math

import numpy as np
import pytest

from phigrow.errors import GrowthError
from phigrow.measure import compare, cost_to_loss, findings, latex, load_runs
from phigrow.measure.estimates import Estimate
from phigrow.measure.page import tables

TOKENS = np.linspace(0, 2.4e6, 61)
LINE = [5.0, 4.0, 3.0]
COSTS = [0, 100, 200]


def compared(parent, **options):
    return compare(load_runs(parent), **options)


def test_known_speedups_without_noise(experiment):
    result = compared(experiment())
    for unit in ("tokens", "flops", "seconds"):
        sunk = result["wr"].estimate(unit, "sunk")
        assert sunk.speedup == pytest.approx(2.0, rel=5e-3)
        assert sunk.saving == pytest.approx(0.5, abs=5e-3)
        assert not sunk.censored
    assert result["slow"].censored_seeds == (0,)
    assert result["wr"].censored_seeds == ()


@pytest.mark.parametrize("speed", [1.3, 2.0, 4.0])
def test_known_speedups_with_noise(write_run, power_law, speed):
    for seed in range(5):
        for place, (arm, rate) in enumerate([("scratch", 1.0), ("wr", speed)]):
            losses = power_law(TOKENS, rate, 0.004, seed=10 * seed + place)
            folder = write_run(arm, losses.tolist(), TOKENS.tolist(), seed=seed)
    estimate = compared(folder.parent)["wr"].estimate("tokens", "sunk")
    assert estimate.speedup == pytest.approx(speed, rel=0.02)
    low, high = estimate.speedup_interval
    assert low < estimate.speedup < high
    assert high - low < 0.2 * speed


def test_a_first_touch_would_have_failed_under_noise(power_law):
    """Negative control: on the same noisy curves the naive rule flatters the arm, the meter does not."""
    target = power_law(TOKENS)[-1]
    naive, metered = [], []
    for seed in range(200):
        grown = power_law(TOKENS, 2.0, 0.04, seed=seed)
        naive.append(TOKENS[-1] / TOKENS[int(np.argmax(grown <= target))])
        metered.append(TOKENS[-1] / cost_to_loss(TOKENS, grown, target).cost)
    assert np.mean(naive) > 2.0 * 1.05
    assert np.mean(metered) == pytest.approx(2.0, rel=0.01)


def test_charged_arithmetic(write_run):
    write_run("scratch", LINE, COSTS)
    parent = write_run("wr", [5.0, 2.0, 1.0], [0, 100, 200], source_tokens=40).parent
    wr = compared(parent)["wr"]
    sunk, charged = wr.estimate("tokens", "sunk"), wr.estimate("tokens", "charged")
    assert (sunk.cost, sunk.baseline_cost) == pytest.approx((200 / 3, 200.0))
    assert sunk.speedup == pytest.approx(3.0)
    assert sunk.saving == pytest.approx(2 / 3)
    assert charged.cost == pytest.approx(200 / 3 + 40)
    assert charged.speedup == pytest.approx(200 / (200 / 3 + 40))
    assert charged.saving == pytest.approx(1 - (200 / 3 + 40) / 200)
    # The source was a third as dear in FLOPs a token, and twice as fast.
    assert wr.estimate("flops", "charged").cost == pytest.approx((200 / 3 + 40 / 3) * 1.5e9)
    assert wr.estimate("seconds", "charged").cost == pytest.approx((200 / 3 + 20) / 4e3)


def test_speedup_and_saving_are_never_mixed():
    estimate = Estimate("tokens", "sunk", 194e9, 300e9, False)
    assert estimate.speedup == pytest.approx(1.546, abs=1e-3)
    assert estimate.saving == pytest.approx(0.353, abs=1e-3)
    assert estimate.saving != pytest.approx(estimate.speedup - 1, abs=0.1)


def test_arms_swapped_give_another_answer(experiment):
    parent = experiment()
    forward, back = compared(parent), compared(parent, baseline="wr")
    assert forward["wr"].estimate("tokens", "sunk").speedup > 1.9
    assert back["scratch"].censored_seeds == (0,)
    assert back["scratch"].estimate("tokens", "sunk").speedup == 1.0  # a bound: it is still on its way
    assert forward.targets[0] > back.targets[0]
    # The source was used by the arm that is now the baseline: there it is counted too.
    assert back["slow"].estimate("tokens", "charged").baseline_cost == pytest.approx(3.0e6)


def test_a_copy_of_scratch_scores_exactly_one_even_when_its_end_is_pooled(write_run):
    losses = [5.0, 4.0, 3.0, 2.9, 3.1]  # ends above its best point: the fit pools the last three to 3.0
    write_run("scratch", losses, [0, 1, 2, 3, 4])
    result = compared(write_run("copy", losses, [0, 1, 2, 3, 4]).parent)
    estimate = result["copy"].estimate("tokens", "sunk")
    assert (estimate.speedup, estimate.saving) == (1.0, 0.0)
    assert result.targets == {0: 3.1}
    # The level 3.0 stands at the cost 3, and the target 3.1 is met nine tenths of the way from (1, 4.0) to it.
    assert estimate.baseline_cost == pytest.approx(2.8)
    assert result.baseline.notes == (
        "scratch, seed 0: its last evaluations do not improve, so its fit reaches the target after 2.8 of 4 tokens",
    )


def test_scratch_is_charged_to_its_very_end_while_it_still_falls(experiment):
    result = compared(experiment())
    assert result["wr"].estimate("tokens", "sunk").baseline_cost == 2.4e6
    assert result.baseline.notes == ()


def test_a_flat_end_is_reached(write_run):
    losses = [5.0, 0.1, 0.1, 0.1]
    write_run("scratch", losses, [0, 1, 2, 3])
    assert compared(write_run("wr", losses, [0, 1, 2, 3]).parent)["wr"].estimate("tokens", "sunk").speedup == 1.0


def test_censored_is_a_bound_and_is_named(write_run):
    write_run("scratch", LINE, COSTS)
    parent = write_run("tile", [5.0, 4.5, 4.0], COSTS, source_tokens=50).parent
    tile = compared(parent)["tile"]
    sunk, charged = tile.estimate("tokens", "sunk"), tile.estimate("tokens", "charged")
    assert sunk.censored
    assert charged.censored
    assert (sunk.cost, sunk.speedup) == (200.0, 1.0)
    assert charged.speedup == pytest.approx(0.8)
    assert charged.saving == pytest.approx(-0.25)
    assert tile.notes == ("tile, seed 0: censored, its fit ended at 4, above the target of 3",)


def test_below_the_target_from_the_start_costs_the_source_only(write_run):
    write_run("scratch", LINE, COSTS)
    parent = write_run("lossless", [2.9, 2.8, 2.7], COSTS, source_tokens=50).parent
    lossless = compared(parent)["lossless"]
    assert lossless.estimate("tokens", "sunk").cost == 0.0
    assert math.isinf(lossless.estimate("tokens", "sunk").speedup)
    assert lossless.estimate("tokens", "sunk").saving == 1.0
    assert lossless.estimate("tokens", "charged").speedup == pytest.approx(4.0)


def test_an_unrecorded_source_is_unknown_not_free(write_run):
    write_run("scratch", LINE, COSTS, source_tokens=None)
    parent = write_run("wr", [5.0, 2.0, 1.0], COSTS, source_tokens=None).parent
    wr = compared(parent)["wr"]
    assert wr.estimate("tokens", "sunk").speedup == pytest.approx(3.0)
    assert math.isnan(wr.estimate("tokens", "charged").speedup)
    assert "wr: source_tokens was not recorded, so tokens cannot be charged" in wr.notes
    assert "unknown, because the cost was not recorded" in findings(compared(parent))[0]


def test_an_arm_that_diverges_is_censored(write_run):
    write_run("scratch", LINE, COSTS)
    wr = compared(write_run("wr", [5.0, 2.0, math.nan], COSTS).parent)["wr"]
    assert wr.censored_seeds == (0,)
    assert "wr, seed 0: diverged: the loss is not finite at step 2" in wr.notes


def test_losses_at_steps(write_run):
    costs = list(range(12))
    for seed, shift in ((0, 0.0), (1, 0.2)):
        parent = write_run("scratch", [9.0 - 0.5 * k + shift for k in costs], costs, seed=seed).parent
    base = compared(parent).baseline
    assert base.loss_at == pytest.approx({0: 9.1, 1: 8.6, 10: 4.1})
    assert base.initial_loss == pytest.approx(9.1)
    assert base.final_loss == pytest.approx(3.6)


def test_intervals_need_three_seeds(experiment):
    parent = experiment(seeds=(0, 1), noise=0.003)
    wr = compared(parent)["wr"]
    assert wr.interval_note == "2 seeds: no interval"
    assert wr.estimate("tokens", "sunk").speedup_interval is None
    one = compare([run for run in load_runs(parent) if run.seed == 0])["wr"]
    assert one.interval_note == "1 seed: no interval"


def test_intervals_match_in_both_measures_and_are_repeatable(experiment):
    parent = experiment(seeds=range(4), noise=0.003)
    first, again = (compared(parent)["wr"].estimate("tokens", "charged") for _ in range(2))
    assert first == again
    low, high = first.speedup_interval
    assert low <= first.speedup <= high
    assert first.saving_interval == pytest.approx((1 - 1 / low, 1 - 1 / high))
    assert compared(parent)["wr"].interval_note == (
        "4 seeds: 95 % interval over paired seeds, not over the source or the held-out text, widened to the spacing of "
        "evaluations"
    )
    assert compared(parent)["slow"].interval_note == "4 seeds, 4 censored: no interval"


def test_equal_seeds_have_an_interval_of_no_width(write_run):
    for seed in range(3):
        write_run("scratch", LINE, COSTS, seed=seed)
        parent = write_run("wr", [5.0, 3.0, 1.0], COSTS, seed=seed).parent  # one evaluation is at the target itself
    assert compared(parent)["wr"].estimate("tokens", "sunk").speedup_interval == pytest.approx((2.0, 2.0))


def test_pairing_matters(write_run):
    """Seeds that are hard for both arms cancel when they are paired."""
    for seed, stretch in enumerate((1, 2, 4)):
        write_run("scratch", LINE, [cost * stretch for cost in COSTS], seed=seed)
        parent = write_run("wr", [5.0, 3.0, 1.0], [cost * stretch for cost in COSTS], seed=seed).parent
    estimate = compared(parent)["wr"].estimate("tokens", "sunk")
    assert estimate.speedup_interval == pytest.approx((2.0, 2.0))
    assert estimate.baseline_cost == pytest.approx(200 * 7 / 3)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"data_fingerprint": "b"}, "these folders hold runs of 2 studies: their text differs (data_fingerprint)"),
        ({"config": {"steps": 1}}, "config.steps is 1 against 2"),
        ({"config": {"lr": 2e-3}}, "config.lr is 0.002 against 0.001"),
        ({"config": {"schedule": "constant"}}, "config.schedule is 'constant' against 'cosine'"),
        ({"config": {"batch": 16}}, "config.batch is 16 against 8"),
        ({"config": {"eval_blocks": 4}}, "config.eval_blocks is 4 against 2"),
        ({"config": {"documents": "within"}}, "config.documents is 'within' against 'plain'"),
        ({"config": {"mixture": {"code": 1}}}, "config.mixture is {'code': 1} against None"),
        ({"seed": 7}, "wr, seed 7, has no run of scratch to compare with"),
    ],
)
def test_unpaired_arms_are_refused(write_run, other, text):
    config = {"batch": 8, "eval_blocks": 2, "documents": "plain", "mixture": None}
    write_run("scratch", LINE, COSTS, data_fingerprint="a", config=config)
    parent = write_run("wr", LINE, COSTS, **({"data_fingerprint": "a"} | other)).parent
    with pytest.raises(GrowthError) as caught:
        compared(parent)
    assert text in str(caught.value)


SETTINGS = {"warmup": 20, "min_lr": 0.1, "weight_decay": 0.1, "grad_clip": 1.0, "dtype": "bf16", "rewarm": None}


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"warmup": 0}, "warmup 0 (scratch: 20)"),
        ({"min_lr": 0.0}, "min_lr 0 (scratch: 0.1)"),
        ({"weight_decay": 0.0}, "weight_decay 0 (scratch: 0.1)"),
        ({"grad_clip": 0.5, "dtype": "fp32"}, "grad_clip 0.5 (scratch: 1), dtype fp32 (scratch: bf16)"),
        ({"rewarm": 5}, "rewarm 5 (scratch: 0)"),
        ({"rewarm": 0}, None),
        ({}, None),
        ({"log_every": 5, "fresh_lr": 2.0}, None),  # the first is operational, the second unknown of scratch
    ],
)
def test_other_settings_of_an_arm_stand_beside_its_figures(write_run, other, text):
    for seed in (0, 1):
        write_run("scratch", LINE, COSTS, seed=seed, config=SETTINGS | {"log_every": 10})
        write_run("same", LINE, COSTS, seed=seed, config=SETTINGS)
        parent = write_run("wr", LINE, COSTS, seed=seed, config=SETTINGS | other).parent
    result = compared(parent)
    said = {text.split()[0]: text for text in findings(result)}
    assert ", ".join(result["wr"].settings) == (text or "")
    assert (f"Its settings differ from scratch's: {text}. " in said["wr"]) == (text is not None)
    assert "settings differ" not in said["same"]


def test_records_say_which_settings_are_compared(write_run):
    # A setting of a later release: this code knows its name from the records alone.
    compare = {"equal": ["steps", "curriculum"], "named": ["momentum"], "unset": {"momentum": 0.5}}
    write_run("scratch", LINE, COSTS, config={"momentum": None, "curriculum": "a"}, compare=compare)
    folder = write_run("wr", LINE, COSTS, config={"momentum": 0.9, "curriculum": "a"}, compare=compare)
    assert compared(folder.parent)["wr"].settings == ("momentum 0.9 (scratch: 0.5)",)
    write_run("mup", LINE, COSTS, config={"curriculum": "b"}, compare=compare)
    with pytest.raises(GrowthError, match=r"config.curriculum is 'b' against 'a'"):
        compared(folder.parent)


@pytest.mark.parametrize(
    ("stages", "text"),
    [
        ([{"rewarm": 5}], "rewarm 0 then 5 from stage 2 (scratch: 0)"),
        ([{"rewarm": 5}, {}], "rewarm 0 then 5 from stage 2 then 0 from stage 3 (scratch: 0)"),
        (
            [{"rewarm": 5}, {"rewarm": 5, "batch": 4}],
            "rewarm 0 then 5 from stage 2 (scratch: 0), batch 8 then 4 from stage 3 (scratch: 8)",
        ),
        ([{}, {}], None),
        ([{"log_every": 5}], None),
        ("not a list", None),
    ],
)
def test_settings_of_later_stages_stand_beside_the_figures_of_a_staged_arm(write_run, stages, text):
    config = SETTINGS | {"batch": 8, "log_every": 10}
    write_run("scratch", LINE, COSTS, config=config)
    parent = write_run("staged", LINE, COSTS, config=config, stage_settings=stages).parent
    result = compared(parent)
    assert ", ".join(result["staged"].settings) == (text or "")
    assert ("settings differ" in findings(result)[0]) == (text is not None)


def test_a_notebook_and_latex_name_the_settings_that_differ(write_run):
    write_run("scratch", LINE, COSTS, config=SETTINGS)
    write_run("same", LINE, COSTS, config=SETTINGS)
    result = compared(write_run("wr", LINE, COSTS, config=SETTINGS | {"weight_decay": 0.0}).parent)
    assert "wr: settings differ from scratch&#x27;s: weight_decay 0 (scratch: 0.1)." in tables(result)
    assert r"wr: settings differ from scratch's: weight\_decay 0 (scratch: 0.1)." in latex(result)
    assert "same: settings" not in tables(result) + latex(result)


def test_a_run_that_did_not_record_a_setting_is_not_taken_to_differ(write_run):
    write_run("scratch", LINE, COSTS)
    parent = write_run("wr", LINE, COSTS, config=SETTINGS).parent
    assert compared(parent)["wr"].settings == ()


def test_keys_that_one_run_lacks_are_not_compared(write_run):
    write_run("scratch", LINE, COSTS, data_fingerprint="a", config={"batch": 8})
    assert compared(write_run("wr", LINE, COSTS).parent)["wr"].estimate("tokens", "sunk").speedup == 1.0


@pytest.mark.parametrize(
    ("scratch", "options", "text"),
    [
        (LINE, {"baseline": "none"}, "no run of the baseline 'none'\n  where: arms in these folders: scratch, wr"),
        ([5.0, 4.0, math.nan], {}, "scratch, seed 0, ended at a held-out loss of nan"),
        ([3.0, 3.0, 4.0], {}, "scratch, seed 0, never fell below its first loss"),
    ],
)
def test_baselines_that_set_no_target(write_run, scratch, options, text):
    write_run("scratch", scratch, COSTS)
    parent = write_run("wr", LINE, COSTS).parent
    with pytest.raises(GrowthError) as caught:
        compared(parent, **options)
    assert text in str(caught.value)


def test_an_unfinished_baseline_is_refused_and_an_unfinished_arm_noted(write_run):
    write_run("scratch", LINE, COSTS)
    parent = write_run("wr", [5.0, 2.0], [0, 100], config={"steps": 2}).parent
    assert compared(parent)["wr"].notes[0] == "wr, seed 0: unfinished, last evaluated at step 1 of 2"
    with pytest.raises(GrowthError, match="wr, seed 0, was last evaluated at step 1 of 2"):
        compared(parent, baseline="wr")


def test_doubles_and_no_runs_are_refused(write_run, tmp_path):
    run = load_runs(write_run("scratch", LINE, COSTS))[0]
    with pytest.raises(GrowthError, match="there are two runs of scratch, seed 0"):
        compare([run, run, load_runs(run.folder)[0]])
    with pytest.raises(GrowthError, match="arms in these folders: none"):
        compare([])


def test_a_unit_that_was_not_recorded_is_unknown_and_changes_no_other(experiment):
    parent = experiment()
    whole = compared(parent)["wr"]
    for path in parent.rglob("records.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            record.pop("seconds", None)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    arm = compared(parent)["wr"]
    assert arm.estimate("tokens", "charged") == whole.estimate("tokens", "charged")
    assert arm.estimate("flops", "sunk") == whole.estimate("flops", "sunk")
    assert math.isnan(arm.estimate("seconds", "sunk").speedup)
    assert "wr: seconds were not recorded" in arm.notes
