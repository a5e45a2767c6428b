"""What is printed, drawn and written: wording, tables, the figure, the report, and what importing them loads."""

import dataclasses
import io
import json
import math
import re
import subprocess
import sys
from importlib.resources import files

import numpy as np
import pytest
from rich.console import Console

from phigrow.errors import GrowthError
from phigrow.measure import compare, curves, findings, frame, load_runs, markdown, report, save, terminal
from phigrow.measure.cost_curves import cost_curve
from phigrow.measure.estimates import Estimate
from phigrow.measure.figures import colour_of, line_of, loss_range, marker_of
from phigrow.measure.report_files import definitions
from phigrow.measure.tables import arm_rows, caption
from phigrow.measure.wording import (
    all_notes,
    amount,
    best_first,
    cost_text,
    finding_lines,
    grouped_findings,
    percent,
    saving_text,
    speedup_text,
    times,
    verdict,
)
from phigrow.records.schema import UNITS

LINE, COSTS = [5.0, 4.0, 3.0], [0, 1_000_000, 2_000_000]


@pytest.fixture
def small(write_run):
    """scratch, a wr that is three times as fast, a tile that never gets there, a lossless that is there at once."""
    write_run("scratch", LINE, COSTS)
    write_run("wr", [5.0, 2.0, 1.0], COSTS, source_tokens=400_000)
    write_run("tile", [5.0, 4.5, 4.0], COSTS, source_tokens=500_000)
    return write_run("lossless", [2.9, 2.8, 2.7], COSTS, source_tokens=500_000).parent


def test_g_stack_in_words():
    """G_stack's 194B against 300B tokens, the pair of numbers that is mixed up most often."""
    estimate = Estimate("tokens", "charged", 194e9, 300e9, False)
    assert speedup_text(estimate) == "1.55x"
    assert saving_text(estimate) == "35 %"
    assert cost_text(estimate) == "194B"


@pytest.mark.parametrize(
    ("value", "unit", "like", "text"),
    [
        (590_000, "tokens", 2_460_000, "0.59M"),
        (590_000, "tokens", None, "590k"),
        (1.4e12, "tokens", None, "1.4T"),
        (999_499, "tokens", None, "999k"),
        (999_999, "tokens", None, "1M"),
        (0, "tokens", None, "0"),
        (2.5e15, "flops", None, "2.5e15"),
        (0, "flops", None, "0"),
        (812.4, "seconds", None, "812"),
        (1.234, "seconds", None, "1.23"),
        (math.nan, "tokens", None, "unknown"),
    ],
)
def test_amounts(value, unit, like, text):
    assert amount(value, unit, like) == text


def test_numbers_at_the_edges():
    assert [times(value) for value in (0.804, 9.994, 12.34, 250.2, math.inf, math.nan)] == [
        "0.80x", "9.99x", "12.3x", "250x", "inf", "unknown",
    ]  # fmt: skip
    assert [percent(value) for value in (0.353, -0.25, 0.004, 0.996, 1.0, 0.0, math.nan)] == [
        "35 %", "-25 %", "0.4 %", "99.6 %", "100 %", "0 %", "unknown",
    ]  # fmt: skip


def test_findings(small):
    found = {text.split()[0]: text for text in findings(compare(load_runs(small)))}
    assert found["wr"].startswith(
        "wr reached scratch's final held-out loss (3.00) after 0.67M of 2M tokens. Tokens: 3.00x speedup, 67 % saving. "
        "Counting the source's training: 1.88x speedup, 47 % saving. FLOPs: 3.00x speedup, 67 % saving."
    )
    assert found["wr"].endswith("Its final loss is 1.00; scratch's is 3.00. 1 seed: no interval.")
    assert found["tile"].startswith(
        "tile did not reach scratch's final held-out loss (3.00) within 2M tokens (censored). Tokens: < 1.00x speedup, "
        "< 0 % saving. Counting the source's training: < 0.80x speedup, < -25 % saving."
    )
    assert found["lossless"].startswith(
        "lossless had reached scratch's final held-out loss (3.00) before its first update. Tokens: target reached "
        "before training, 100 % saving. Counting the source's training: 4.00x speedup, 75 % saving. FLOPs: target "
        "reached before training, 100 % saving. Counting the source's training: 12.0x speedup, 92 % saving."
    )
    assert not [text for text in found.values() if "inf" in text]


def test_findings_say_both_accounts_only_where_they_differ(write_run):
    write_run("scratch", LINE, COSTS)
    write_run("stages", [5.0, 2.0, 1.0], COSTS)
    write_run("wr", [5.0, 2.0, 1.0], COSTS, source_tokens=3)  # negative control: next to nothing, but not nothing
    wr, stages = findings(compare(load_runs(write_run("at-once", [2.9, 2.8, 2.7], COSTS).parent)))[1:]
    if wr.startswith("stages"):  # their speedups are equal
        wr, stages = stages, wr
    assert stages == (
        "stages reached scratch's final held-out loss (3.00) after 0.67M of 2M tokens. Tokens: 3.00x speedup, 67 % "
        "saving. FLOPs: 3.00x speedup, 67 % saving. Seconds: 3.00x speedup, 67 % saving. "
        "Its final loss is 1.00; scratch's is 3.00. 1 seed: no interval."
    )
    assert wr.count("Counting the source's training") == 3


def test_findings_for_a_terminal_have_a_line_for_every_unit(small):
    comparison = compare(load_runs(small))
    lines = finding_lines(comparison)
    place = lines.index("wr reached scratch's final held-out loss (3.00) after 0.67M of 2M tokens.")
    assert lines[place + 1 : place + 6] == [
        "    Tokens: 3.00x speedup, 67 % saving. Counting the source's training: 1.88x speedup, 47 % saving.",
        "    FLOPs: 3.00x speedup, 67 % saving. Counting the source's training: 2.50x speedup, 60 % saving.",
        "    Seconds: 3.00x speedup, 67 % saving. Counting the source's training: 2.31x speedup, 57 % saving.",
        "    Its final loss is 1.00; scratch's is 3.00.",
        "    1 seed: no interval.",
    ]
    assert lines[0] == verdict(comparison)
    found, notes = lines[1:19], lines[19:]
    assert " ".join(line.strip() for line in found) == " ".join(findings(comparison))
    assert notes == [f"note: {note}" for note in all_notes(comparison)]
    assert len(notes) == 4


def test_verdicts(small, write_run):
    comparison = compare(load_runs(small))
    assert verdict(comparison) == (
        "lossless had reached scratch's final loss before its first update. "
        "Counting the source's training, it needed 75 % fewer tokens."
    )
    for others, text in (
        (("lossless",), "wr reached scratch's final loss with 67 % fewer tokens (3.00x speedup). Counting the source's "
         "training, it needed 47 % fewer tokens."),
        (("lossless", "wr"), "No arm reached scratch's final loss of 3.00."),
        (("lossless", "wr", "tile"), "There is nothing to compare."),
    ):  # fmt: skip
        left = tuple(arm for arm in comparison.arms if arm.name not in others)
        assert verdict(dataclasses.replace(comparison, arms=left)) == text
    write_run("slow", LINE, [0, 2_000_000, 4_000_000], source_tokens=None)
    slow = dataclasses.replace(comparison, arms=(compare(load_runs(small))["slow"],))
    assert verdict(slow) == (
        "slow reached scratch's final loss with 100 % more tokens (0.50x speedup). The cost of the source's training "
        "is unknown."
    )


@pytest.mark.parametrize(
    ("cost", "upper_bound", "words"),
    [
        (1.5, False, "25 % fewer tokens"),
        (1.5, True, "at least 25 % fewer tokens"),
        (2.5, False, "25 % more tokens"),
        (2.5, True, "at most 25 % more tokens"),
        (2.0, False, "an equal number of tokens"),
        (2.0001, False, "an equal number of tokens"),
        (2.0, True, "at most an equal number of tokens"),
        (1.99, False, "0.5 % fewer tokens"),  # negative control: small, but not nothing
    ],
)
def test_the_verdict_names_the_unit_of_the_charged_saving(small, cost, upper_bound, words):
    comparison = compare(load_runs(small))
    arm = comparison["lossless"]
    charged = Estimate("tokens", "charged", cost, 2.0, False, None, upper_bound)
    others = tuple(each for each in arm.estimates if (each.unit, each.accounting) != ("tokens", "charged"))
    one = dataclasses.replace(comparison, arms=(dataclasses.replace(arm, estimates=(*others, charged)),))
    assert verdict(one) == (
        "lossless had reached scratch's final loss before its first update. "
        f"Counting the source's training, it needed {words}."
    )


def test_sentences_are_short(experiment, tmp_path):
    comparison = compare(load_runs(experiment(seeds=(0, 1, 2), noise=0.003)))
    texts = [*finding_lines(comparison), definitions(comparison), *(caption(comparison, unit) for unit in UNITS)]
    for sentence in (sentence for text in texts for sentence in re.split(r"(?<=[.:;]) ", text)):
        assert len(sentence.split()) <= 25, sentence


def test_the_best_arms_come_first(small):
    assert [arm.name for arm in best_first(compare(load_runs(small)))] == ["lossless", "wr", "tile"]


@pytest.mark.parametrize("unit", UNITS)
def test_every_cost_lies_on_the_curve_that_is_drawn(experiment, unit):
    comparison = compare(load_runs(experiment(seeds=(0, 1, 2), noise=0.01)))
    arm = comparison["wr"]
    points = cost_curve(comparison, arm, unit, 4.0)
    costs, losses = np.array(points).T
    assert len(points) > 20
    assert (np.diff(costs) >= 0).all()
    assert (np.diff(losses) < 0).all()
    (met,) = np.flatnonzero(np.isclose(losses, comparison.target(arm), rtol=0, atol=1e-12))
    assert costs[met] == pytest.approx(arm.estimate(unit, "sunk").cost, rel=1e-12)


def test_an_arm_starts_from_what_its_records_say(write_run):
    words = "copies of <units>"
    growths = {
        "new": {"method": "tile", "summary": words},
        "older": {"method": "tile"},
        "staged": {"method": "tile+wr", "stages": [{}, {}]},
    }
    scratch = write_run("scratch", LINE, COSTS)
    for arm, growth in growths.items():
        write_run(arm, LINE, COSTS, growth=growth)
    starts = {row["arm"]: row["starts from"] for row in arm_rows(compare(load_runs(scratch.parent)))}
    assert starts == {
        "scratch": "random weights",
        "new": words,
        "older": "grown by tile",
        "staged": "trained in stages, grown by tile, wr",
    }


def test_an_arm_that_loses_is_called_slower(write_run):
    write_run("scratch", LINE, [0, 500_000, 1_000_000])
    text = findings(compare(load_runs(write_run("wr", LINE, COSTS).parent)))[0]
    assert "Tokens: 0.50x speedup, -100 % saving (slower)." in text


def test_frame(small):
    table = frame(compare(load_runs(small)))
    assert list(table.index) == ["scratch", "lossless", "tile", "wr"]
    assert table["speedup, tokens, sunk"]["wr"] == pytest.approx(3.0)
    assert table["saving, tokens, charged"]["wr"] == pytest.approx(1 - (2 / 3 + 0.4) / 2)
    assert table["cost, FLOPs, sunk"]["wr"] == pytest.approx(1e15)
    assert math.isnan(table["speedup, tokens, sunk"]["scratch"])
    assert math.isnan(table["speedup, tokens, sunk, low"]["wr"])
    assert table["held-out loss, step 0"]["lossless"] == 2.9
    assert table["held-out loss, final"].tolist() == [3.0, 2.7, 4.0, 1.0]
    assert table["censored"].tolist() == [False, False, True, False]
    assert table["parameters"].tolist() == [1000] * 4


def test_markdown(small):
    text = markdown(compare(load_runs(small)))
    assert (
        "| arm | cost, tokens, sunk | speedup, tokens, sunk | saving, tokens, sunk "
        "| cost, tokens, charged | speedup, tokens, charged | saving, tokens, charged |\n"
    ) in text
    assert "| wr | 0.67M | 3.00x | 67 % | 1.07M | 1.88x | 47 % |" in text
    assert "| tile | > 2M | < 1.00x | < 0 % | > 2.5M | < 0.80x | < -25 % |" in text
    assert "| scratch | 1 | 1,000 | 5.000 | 4.000 | 3.000 |" in text
    assert "1 seed, no interval" in text


def test_terminal_keeps_the_intervals(experiment):
    comparison = compare(load_runs(experiment(seeds=range(3), noise=0.003)))
    low, high = comparison["wr"].estimate("tokens", "sunk").speedup_interval
    out = io.StringIO()
    Console(file=out, width=80).print(terminal(comparison))
    assert f"[{low:.2f}, {high:.2f}]" in out.getvalue()
    assert "3 seeds, 95 % interval" in " ".join(out.getvalue().split())


def test_a_spike_and_a_run_that_blew_up_do_not_flatten_the_figure(write_run, power_law):
    tokens = np.linspace(0, 2.4e6, 61)
    scratch = power_law(tokens)
    scratch[0] = 11.0
    write_run("scratch", scratch.tolist(), tokens.tolist())
    wr = power_law(tokens, 2.0)
    wr[0] = 9.4
    write_run("wr", wr.tolist(), tokens.tolist())
    blown = np.full(61, 12.0)
    blown[30] = math.nan
    comparison = compare(load_runs(write_run("tile", blown.tolist(), tokens.tolist()).parent))
    low, high = loss_range(comparison)
    assert low < wr[-1] < scratch[-1] < high
    shown = scratch[5] - wr[-1]
    assert high - low < 5 * shown
    assert curves(comparison).axes[0].get_ylim() == (low, high)


def test_figure_marks_every_crossing_and_names_every_arm(small):
    sunk, charged = curves(compare(load_runs(small))).axes
    labels = [text.get_text() for text in charged.get_legend().get_texts()]
    assert labels == [
        "scratch", "lossless, 4.00x speedup", "tile, not reached", "wr, 1.88x speedup", "target, 3.00",
    ]  # fmt: skip
    marked = [line.get_xdata()[0] for line in sunk.lines if line.get_linestyle() == "None"]
    assert marked == pytest.approx([0.0, 2 / 3])
    assert sunk.get_xlabel() == "training tokens (millions)"


@pytest.mark.parametrize(("unit", "label"), [("flops", "training FLOPs"), ("seconds", "training time (seconds)")])
def test_figures_in_other_units(small, tmp_path, unit, label):
    figure = curves(compare(load_runs(small)), unit)
    assert figure.axes[0].get_xlabel().startswith(label)
    assert save(figure, tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")


def test_report_folder(experiment, tmp_path):
    out = tmp_path / "deep" / "report"
    comparison = report(experiment(seeds=range(3), noise=0.003), out)
    names = [f"{name}.{end}" for name in ("budgets", "curves") for end in ("pdf", "png", "svg")]
    names += [f"report.{end}" for end in ("html", "json", "md", "tex")]
    assert sorted(path.name for path in out.iterdir()) == names
    png, svg = (out / "curves.png").read_bytes(), (out / "curves.svg").read_text()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 30_000
    assert svg.count("<path") > 50
    text = (out / "report.md").read_text()
    lines = [line for finding in grouped_findings(comparison) for line in finding]
    lines += [verdict(comparison), "](curves.svg)", "## Definitions", "All runs: phigrow 0.1.0, torch 2.11.0."]
    for part in (*lines, "| scratch | 0 | 1,000 | 60 | 2.4M |"):
        assert part in text
    data = json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)
    wr = next(arm for arm in data["arms"] if arm["arm"] == "wr")
    assert wr["estimates"][0]["speedup"] == comparison["wr"].estimate("tokens", "sunk").speedup
    assert len(data["runs"]) == 9


def test_report_again_is_the_same_to_the_byte(small, tmp_path):
    for name in ("a", "b"):
        report(small, tmp_path / name)
    for name in sorted(path.name for path in (tmp_path / "a").iterdir()):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_infinite_numbers_become_null(small, write_run, tmp_path):
    write_run("broken", [5.0, 2.0, math.nan], COSTS, odd=math.inf)
    report(small, tmp_path / "out")
    data = json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=pytest.fail)
    arms = {arm["arm"]: arm for arm in data["arms"]}
    assert arms["lossless"]["estimates"][0]["speedup"] is None
    assert arms["lossless"]["estimates"][0]["at_target_from_the_start"]
    assert arms["broken"]["final_loss"] is None
    assert arms["broken"]["diverged_at_step"] == {"0": 2}


def test_a_report_that_is_refused_writes_nothing(small, tmp_path):
    with pytest.raises(GrowthError, match="no run of the baseline"):
        report(small, tmp_path / "out", baseline="missing")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["/proc/report", "file", "file/report"])
def test_an_output_that_cannot_be_written_is_found_out_first(small, tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(
        sys.modules["phigrow.measure.report_files"], "load_runs", lambda *_, **__: pytest.fail("computed before")
    )
    with pytest.raises(GrowthError, match="the output cannot be written") as caught:
        report(small, tmp_path / place)
    assert caught.value.where == str(tmp_path / place)
    assert caught.value.why.startswith("[Errno ")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_that_fills_while_writing(small, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys.modules["phigrow.measure.report_files"],
        "write_picture",
        lambda *_, **__: (_ for _ in ()).throw(OSError(28, "no space")),
    )
    with pytest.raises(
        GrowthError, match=r"the output cannot be written\n  where: .*out\n  why: \[Errno 28\] no space"
    ):
        report(small, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_a_refused_report_leaves_the_earlier_one(small, tmp_path):
    """Negative control of what is taken away again: nothing that was there before."""
    report(small, tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(GrowthError, match="no run of the baseline"):
        report(small, tmp_path / "out", baseline="missing")
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_without_records_are_in_the_notes(small, tmp_path):
    failed = tmp_path / "g1"
    failed.mkdir()
    (failed / "run.json").write_text("{}")
    note = f"{failed} is left out: there is no records.jsonl in it or below it"
    assert report([small, failed], tmp_path / "out").notes == (note,)
    for name in ("report.md", "report.html", "report.json"):
        assert note in (tmp_path / "out" / name).read_text()
    assert report(small, tmp_path / "whole").notes == ()


def test_scratch_alone(write_run, tmp_path):
    comparison = report(write_run("scratch", LINE, COSTS), tmp_path / "out")
    assert comparison.arms == ()
    assert "There is nothing to compare." in (tmp_path / "out" / "report.md").read_text()


def test_imports_are_light_and_never_reach_torch(small, tmp_path):
    code = f"""
import sys
import phigrow.measure
heavy = {{"torch", "transformers", "pandas", "scipy", "matplotlib", "rich", "phigrow.training"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
comparison = phigrow.measure.report({str(small)!r}, {str(tmp_path / "out")!r})
phigrow.measure.frame(comparison), phigrow.measure.terminal(comparison)
assert not {{"torch", "transformers", "phigrow.training", "matplotlib.pyplot"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_dozen_arms_have_colours_and_markers_of_their_own():
    assert len({colour_of(place) for place in range(13)}) == 13
    assert len({marker_of(place) for place in range(1, 13)}) == 12
    looks = [(colour_of(place), marker_of(place), line_of(place)) for place in range(37)]
    assert len({(colour, marker) for colour, marker, _ in looks}) == len(set(looks)) == 37
    assets = files("phigrow.measure") / "assets"
    style = (assets / "report.css").read_text()
    light, dark, paper = (block.partition("}")[0] for block in style.split(":root {")[1:])
    for block in (light, dark, paper):
        found = dict(re.findall(r"--arm(\d+): (#\w{6});", block))
        assert len(set(found.values())) == len(found) == 13
    assert "((place - 1) % 12)" in (assets / "report.js").read_text()
