"""Whatever weakens a figure stands where the figure stands: on the terminal as in report.md."""

import json
import math

import numpy as np
import pytest
from typer.testing import CliRunner

from phigrow.cli import app
from phigrow.errors import GrowthError
from phigrow.measure import compare, findings, load_runs
from phigrow.measure.data import as_json
from phigrow.measure.report_files import markdown_report
from phigrow.measure.wording import all_notes, finding_lines, mid_schedule_sentences

LINE = [5.0, 4.0, 3.0]
COSTS = [0, 1e6, 2e6]
MACHINE = {"device": "NVIDIA H100", "world_size": 8}
CPU = {"device": "AMD EPYC (1 threads a rank)", "world_size": 1}


def compared(folder, **options):
    return compare(load_runs(folder), **options)


def tokens_of(arm, accounting="sunk"):
    return arm.estimate("tokens", accounting)


@pytest.fixture
def spaced(write_run, power_law):
    """Three seeds of scratch, evaluated at every step of 100, and of an arm of speed 1.5 at every Nth step."""

    def make(every):
        tokens = np.linspace(0, 1e8, 101)
        for seed in range(3):
            write_run("scratch", power_law(tokens), tokens, seed=seed, config={"eval_every": 1})
            kept = np.arange(0, 101, every)
            parent = write_run(
                "wr", power_law(tokens, 1.5)[kept], tokens[kept], seed=seed, steps=kept,
                config={"steps": 100, "eval_every": every},
            ).parent  # fmt: skip
        return compared(parent)

    return make


def test_coarse_evaluations_widen_the_interval_until_it_holds_the_truth(spaced):
    result = spaced(50)
    arm = result["wr"]
    estimate = tokens_of(arm)
    assert estimate.speedup == pytest.approx(1.39, abs=0.01)  # the truth is 1.5: a straight line over 50 steps is poor
    assert estimate.speedup_interval == pytest.approx((1.0, 2.0))
    assert arm.interval_note.endswith(", widened to the spacing of evaluations")
    (note,) = arm.notes
    assert "its evaluations are far apart, so its speedup in tokens may lie anywhere from 1.00x to 2.00x" in note
    assert arm.surroundings == ("eval_every 50 (scratch: 1)",)
    assert "Its runs were made otherwise than scratch's: eval_every 50 (scratch: 1)." in findings(result)[0]


def test_close_evaluations_widen_nothing(spaced):
    # Negative control: the interval of equal seeds ends at the two evaluations around the target, one step apart.
    arm = spaced(1)["wr"]
    low, high = tokens_of(arm).speedup_interval
    assert low <= 1.5 <= high
    assert high / low < 1.02
    assert arm.notes == ()
    assert arm.surroundings == ()


def test_a_wide_interval_over_seeds_stays_as_it_is(experiment):
    estimate = tokens_of(compared(experiment(seeds=(0, 1, 2), noise=0.03))["wr"])
    (low, high), (least, most) = estimate.speedup_interval, estimate.between_evaluations
    assert low < least < estimate.speedup < most < high


def test_an_evaluation_at_the_target_leaves_nothing_open(write_run):
    write_run("scratch", LINE, COSTS)
    arm = compared(write_run("wr", [5.0, 3.0, 1.0], COSTS).parent)["wr"]
    assert tokens_of(arm).between_evaluations == (2.0, 2.0)
    assert arm.notes == ()


def test_one_seed_with_coarse_evaluations_has_a_note_and_no_interval(write_run):
    write_run("scratch", LINE, COSTS)
    arm = compared(write_run("wr", [5.0, 2.0, 1.0], COSTS, source_tokens=1e6).parent)["wr"]
    assert tokens_of(arm).speedup_interval is None
    assert tokens_of(arm).between_evaluations == (2.0, math.inf)
    assert tokens_of(arm, "charged").between_evaluations == (1.0, 2.0)  # the source's 1e6 tokens are no span
    assert "may lie anywhere from 2.00x to inf" in arm.notes[0]


def test_a_first_evaluation_below_the_target_is_an_upper_bound_of_its_cost(write_run):
    write_run("scratch", LINE, COSTS)
    late = write_run("wr", [2.5, 2.0], COSTS[1:], steps=[1, 2], config={"steps": 2}).parent
    arm = compared(late)["wr"]
    assert tokens_of(arm).between_evaluations == (2.0, math.inf)
    assert "may lie anywhere from 2.00x to inf" in arm.notes[0]


def test_a_seed_below_the_target_at_step_0_is_named_with_the_speedup_of_the_others(write_run):
    for seed, losses in enumerate(([2.9, 2.0, 1.0], [5.0, 3.0, 1.0], [5.0, 3.0, 1.0])):
        write_run("scratch", LINE, COSTS, seed=seed)
        parent = write_run("wr", losses, COSTS, seed=seed).parent
    result = compared(parent)
    assert tokens_of(result["wr"]).speedup == pytest.approx(3.0)  # 2e6 against the mean of 0, 1e6 and 1e6
    note = (
        "wr: at its first evaluation, seed 0 had reached the target, so the mean counts 0 tokens there; the speedup in "
        "tokens over the other 2 of 3 runs is 2.00x"
    )
    assert note in result["wr"].notes
    assert f"note: {note}" in finding_lines(result)
    assert not [each for each in compared(parent, baseline="wr").arms[0].notes if "first evaluation" in each]


def test_seconds_of_two_machines_are_not_compared(write_run):
    for seed in range(3):
        write_run("scratch", LINE, COSTS, seed=seed, **CPU)
        write_run("same", [5.0, 3.0, 1.0], COSTS, seed=seed, **CPU)
        parent = write_run("wr", [5.0, 3.0, 1.0], COSTS, seed=seed, **MACHINE).parent
    result = compared(parent)
    seconds = result["wr"].estimate("seconds", "sunk")
    assert math.isnan(seconds.speedup)
    assert seconds.speedup_interval is None
    why = (
        "wr was trained on NVIDIA H100 with world_size 8, and scratch on AMD EPYC (1 threads a rank) with world_size 1"
    )
    said = {text.split()[0]: text for text in findings(result)}
    assert f"Seconds: not compared, because {why}." in said["wr"]
    assert f"note: wr: seconds are not compared, because {why}" in finding_lines(result)
    assert result["wr"].surroundings == (
        "device NVIDIA H100 (scratch: AMD EPYC (1 threads a rank))", "world_size 8 (scratch: 1)",
    )  # fmt: skip
    # Negative control: the same machine, and costs that no machine changes.
    assert result["same"].estimate("seconds", "sunk").speedup == pytest.approx(2.0)
    assert tokens_of(result["wr"]).speedup == pytest.approx(2.0)
    assert as_json(result)["arms"][-1]["estimates"][-1]["speedup"] is None


def test_seconds_of_decayed_ends_of_two_machines_are_not_compared(write_run):
    for arm, speed, machine in (("scratch", 1, CPU), ("wr", 2, CPU | {"world_size": 2})):
        for steps in (100, 200, 400):
            tokens = np.arange(steps + 1) * 1e4
            losses = 2 + 2 * (speed * tokens / 1e6 + 0.1) ** -0.5
            parent = write_run(arm, losses, tokens, name=f"{arm}-{steps}", **machine).parent
    arm = compared(parent)["wr"]
    assert arm.basis == "ends"
    assert math.isnan(arm.estimate("seconds", "sunk").speedup)
    assert tokens_of(arm).speedup == pytest.approx(2.0, rel=0.05)
    assert any("seconds are not compared" in note for note in arm.notes)


def test_a_run_resumed_by_other_ranks_has_no_seconds_to_compare(write_run):
    write_run("scratch", LINE, COSTS, **CPU)
    folder = write_run("wr", LINE, COSTS, **CPU)
    assert compared(folder.parent)["wr"].estimate("seconds", "sunk").speedup == 1.0
    with (folder / "records.jsonl").open("a") as file:
        file.write(json.dumps({"type": "resume", "step": 1, "world_size": 4, "zero": 1}) + "\n")
    arm = compared(folder.parent)["wr"]
    assert math.isnan(arm.estimate("seconds", "sunk").speedup)
    assert arm.surroundings == ("world_size 1 then 4 (scratch: 1)",)


def test_other_versions_and_commits_stand_beside_the_figures(write_run):
    write_run("scratch", LINE, COSTS, commit="a" * 40)
    parent = write_run("wr", LINE, COSTS, commit="b" * 40, versions={"torch": "2.5.1", "phigrow": "0.1.0"}).parent
    assert compared(parent)["wr"].surroundings == (
        "version of torch 2.5.1 (scratch: 2.11.0)", f"commit {'b' * 12} (scratch: {'a' * 12})",
    )  # fmt: skip


def test_an_unfinished_run_is_named_in_the_verdict_and_in_its_finding(write_run):
    write_run("scratch", LINE, COSTS)
    parent = write_run("wr", [5.0, 2.0], COSTS[:2], config={"steps": 2}).parent
    verdict, outcome, *_ = finding_lines(compared(parent))
    assert "(3.00x speedup). Its run is unfinished, last evaluated at step 1 of 2." in verdict
    assert outcome.endswith("Its run is unfinished, last evaluated at step 1 of 2.")
    assert any("Its last recorded loss is 2.00" in line for line in finding_lines(compared(parent)))
    for seed in (1, 2):
        write_run("scratch", LINE, COSTS, seed=seed)
        write_run("wr", [5.0, 2.0, 1.0], COSTS, seed=seed)
    assert "1 of its 3 runs is unfinished, last evaluated at step 1 of 2." in finding_lines(compared(parent))[0]


def everything(write_run):
    """A comparison with a censored, a diverged, an unfinished, a coarse and an early arm, on two machines."""
    for seed in range(3):
        write_run("scratch", LINE, COSTS, seed=seed, **CPU)
        write_run("slow", [5.0, 4.5, 4.0], COSTS, seed=seed, **CPU)
        write_run("broken", [5.0, 2.0, math.nan], COSTS, seed=seed, **CPU)
        write_run("wr", [5.0, 2.0, 1.0] if seed else [2.0, 1.0, 0.5], COSTS, seed=seed, **MACHINE)
        folder = write_run("short", [5.0, 3.5], COSTS[:2], seed=seed, config={"steps": 2}, study={"side_by_side": 2})
    return folder.parent


def test_the_terminal_prints_every_finding_and_note_of_the_report(write_run, tmp_path):
    done = CliRunner(env={"COLUMNS": "120"}).invoke(
        app, ["report", str(everything(write_run)), "--out", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    printed = {line.removeprefix("note: ").strip() for line in done.stdout.splitlines()}
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    sections = text.split("\n## ")
    notes = next(part for part in sections if part.startswith("Notes"))
    bullets = [line.strip().removeprefix("- ") for line in (sections[0] + notes).splitlines() if "- " in line[:4]]
    assert len(bullets) > 30
    assert [bullet for bullet in bullets if bullet not in printed] == []
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "last evaluated at step 1 of 2" in page
    # Negative control: a note that only the report has would have been found.
    assert "a note that nobody wrote" not in printed


def test_the_notes_of_single_arms_are_in_the_one_list(write_run):
    result = compared(everything(write_run))
    notes = all_notes(result)
    for arm in (result.baseline, *result.arms):
        assert set(arm.notes) <= set(notes)
    assert len(notes) == len(set(notes))
    assert all(f"- {note}" in markdown_report(result) for note in notes)
    assert any(note.startswith("‡ Other runs shared the machine") for note in notes)


FLAT = {"flat": True, "side_by_side": 1}
CONFIG = {"documents": "plain", "eval_blocks": 8, "mixture": None, "batch": 8, "warmup": 20}


def with_flat(write_run, *, base=CONFIG, flat=CONFIG, **meta):
    tokens = np.arange(5) * 1e6
    for steps in (2, 4):
        for arm, config, study in (("scratch", base, {}), ("wr", base, {}), ("small", flat, FLAT)):
            extra = meta if arm == "small" else {}
            parent = write_run(
                arm, 5 - 0.5 * np.arange(steps + 1), tokens[: steps + 1], name=f"{arm}-{steps}", study=study,
                config={"steps": steps} | config, parameters=500 if arm == "small" else 1000, **extra,
            ).parent  # fmt: skip
    return parent


@pytest.mark.parametrize(
    "other", [{"documents": "within"}, {"eval_blocks": 4}, {"mixture": {"code": 1}}], ids=lambda each: next(iter(each))
)
def test_a_flat_model_on_other_text_is_refused(write_run, other):
    key = next(iter(other))
    with pytest.raises(GrowthError, match=f"small, seed 0, cannot be compared with scratch: config.{key}"):
        compared(with_flat(write_run, flat=CONFIG | other))


def test_a_baseline_whose_budgets_read_other_text_is_refused(write_run):
    parent = with_flat(write_run)
    for arm in ("scratch", "wr"):
        write_run(arm, [5, 4, 3, 2], np.arange(4) * 1e6, name=f"{arm}-3", config=CONFIG | {"documents": "within"})
    with pytest.raises(GrowthError, match=r"config.documents is 'plain' against 'within'|'within' against 'plain'"):
        compared(parent)


def test_other_differences_of_a_flat_model_are_notes(write_run):
    result = compared(with_flat(write_run, flat=CONFIG | {"batch": 4, "warmup": 5, "lr": 2e-3}, device="NVIDIA H100"))
    note = "small: it differs from scratch in batch 4 (scratch: 8), lr 0.002 (scratch: 0.001), warmup 5 (scratch: 20)"
    assert note in result.notes
    assert f"note: {note}" in finding_lines(result)


@pytest.mark.parametrize(("decays", "noted"), [((12, 24), False), ((11, 25), False), ((12, 36), True)])
def test_a_decay_over_the_same_share_of_more_steps_is_no_difference(decays, noted, write_run):
    for budget, (steps, decay) in enumerate(zip((20, 40), (4, 8), strict=True)):
        for arm in ("scratch", "wr", "small"):
            small = arm == "small"
            schedule = {"steps": 3 * steps, "decay": decays[budget]} if small else {"steps": steps, "decay": decay}
            evaluated = np.linspace(0, schedule["steps"], 5).astype(int)
            parent = write_run(
                arm, 5 - 0.5 * np.arange(5) - 0.1 * budget, 1e6 * steps * np.arange(5), name=f"{arm}-{steps}",
                steps=evaluated, config=CONFIG | {"schedule": "wsd"} | schedule, parameters=500 if small else 1000,
                study=FLAT if small else {},
            ).parent  # fmt: skip
    assert any("decay" in note for note in compared(parent).notes) == noted


def test_a_flat_model_like_the_others_needs_no_note(write_run):
    # Negative control of the two tests before.
    result = compared(with_flat(write_run))
    assert list(result.flat) == ["small"]
    assert not [note for note in result.notes if "differs" in note]


def test_sentences_on_the_middle_of_schedules_say_whose_rate_had_not_decayed(write_run):
    tokens = np.arange(5) * 1e6
    losses = 5 - 0.5 * np.arange(5)
    for steps in (2, 3, 4):
        write_run("scratch", losses[: steps + 1], tokens[: steps + 1], name=f"s{steps}", config={"steps": steps})
    parent = write_run("wr", losses - 0.2, tokens, config={"steps": 4}).parent
    assert mid_schedule_sentences(compared(parent)) == [
        "Runs of wr have one budget, so their learning rate had not decayed where they reached the decayed ends of "
        "scratch.",
        "Their speedups are too low.",
    ]
    for steps in (2, 3):
        write_run("wr", losses[: steps + 1], tokens[: steps + 1], name=f"w{steps}", config={"steps": steps})
    assert mid_schedule_sentences(compared(parent)) == []
    only = [run for run in load_runs(parent) if run.budget == 4]
    assert mid_schedule_sentences(compare(only))[1] == "This flatters the arm that starts faster."


def test_an_unfinished_flat_model_is_named(write_run):
    parent = with_flat(write_run)
    write_run("small", [5.0, 4.0], [0, 1e6], name="small-8", study=FLAT, config=CONFIG | {"steps": 8}, parameters=500)
    assert "small, seed 0: the run of 8 steps is left out: its last evaluation is at step 1" in compared(parent).notes


def test_a_run_that_has_just_started_is_left_out_with_a_note(write_run, tmp_path):
    write_run("scratch", LINE, COSTS)
    started = write_run("lossless", [], [], config={"steps": 2})
    parent = write_run("wr", [5.0, 3.0, 1.0], COSTS).parent
    for name, content in (("empty", ""), ("cut", '{"type": "run", "arm": "ti')):
        (parent / name).mkdir()
        (parent / name / "records.jsonl").write_text(content)
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["report", str(parent), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert f"note: lossless, seed 0: {started} is left out, because it has no evaluations yet" in lines
    for name in ("empty", "cut"):
        assert f"note: {parent / name} is left out: its records.jsonl has no record yet" in lines
    assert "wr reached scratch's final loss with 50 % fewer tokens (2.00x speedup)." in lines


def test_a_baseline_that_has_just_started_takes_its_seed_with_it(write_run):
    for seed in range(3):
        write_run("scratch", LINE[: 3 - seed], COSTS[: 3 - seed], seed=seed, config={"steps": 2})
        parent = write_run("wr", [5.0, 3.0, 1.0], COSTS, seed=seed).parent
    write_run("scratch", [], [], seed=3)
    write_run("wr", [5.0, 3.0, 1.0], COSTS, seed=3)
    result = compared(parent)
    assert result["wr"].seeds == (0,)
    assert tokens_of(result["wr"]).speedup == pytest.approx(2.0)
    notes = all_notes(result)
    for seed in (1, 2, 3):
        assert f"scratch, seed {seed}: left out with all runs of this seed, because it has not ended" in notes
    with pytest.raises(GrowthError, match="has no run of scratch to compare with"):  # nobody has begun this one
        compared(write_run("wr", LINE, COSTS, seed=7).parent)


def test_a_report_of_runs_that_have_all_just_started_says_so(write_run):
    with pytest.raises(GrowthError, match="no run of the baseline 'scratch'") as caught:
        compared(write_run("scratch", [], []).parent)
    assert "it has no evaluations yet" in str(caught.value)


def test_a_budget_that_some_seeds_have_not_finished_is_not_chosen(write_run):
    for seed in (0, 1):
        for arm in ("scratch", "wr"):
            for steps in (2, 4):
                ended = steps + 1 if steps == 2 or seed == 0 else 2
                parent = write_run(
                    arm, 5 - 0.5 * np.arange(ended), np.arange(ended) * 1e6, seed=seed, name=f"{arm}-{steps}-{seed}",
                    config={"steps": steps},
                ).parent  # fmt: skip
    result = compared(parent)
    assert {run.budget for run in result.baseline.runs} == {2}
    assert any("scratch, seed 1: the run of 4 steps is left out" in note for note in all_notes(result))


@pytest.mark.parametrize("unit", ["seconds", "flops"])
def test_a_baseline_without_cost_in_one_unit_is_named(write_run, unit):
    for arm in ("scratch", "wr"):
        folder = write_run(arm, LINE, COSTS)
        records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
        for record in records:
            if unit in record:
                record[unit] = 0
        (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(GrowthError, match=f"scratch, seed 0, recorded 0 {unit} where it reached a loss of 3"):
        compared(folder.parent)
