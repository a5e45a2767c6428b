"""Logs of other trainers: each format gives the figures of our own records, and damaged logs one error or a note."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from console import BLOCK, COMMAND, FILE, without_numbers
from typer.testing import CliRunner

from phigrow.cli import app
from phigrow.errors import GrowthError
from phigrow.measure import compare, load_runs
from phigrow.models.config import load_config
from phigrow.models.cost import count_cost

PAGE = Path(__file__).parents[2] / "docs" / "other-trainers.md"
EACH = 4096
"""Tokens of a step in every log of these tests."""

SPEED = {"scratch": 1.0, "mine": 2.0}
COST = count_cost(load_config("phi-1_5.json"), 512).training_flops
STEPS = np.arange(0, 61) * 10


def losses(arm: str, seed: int = 0) -> list[float]:
    """A falling curve; that of mine is twice as fast."""
    clean = 2.5 + 1.2 * (SPEED[arm] * STEPS / STEPS[-1] + 0.02) ** -0.3
    return (clean + 1e-3 * np.random.default_rng(seed + 7 * len(arm)).normal(size=len(STEPS))).tolist()


def trainer_state(arm: str, seed: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step, loss in zip(STEPS.tolist(), losses(arm, seed), strict=True):
        if step:
            rows.append(
                {"epoch": step / 600, "loss": loss + 0.1, "learning_rate": 1e-3, "grad_norm": 1.0, "step": step}
            )
        rows.append({"epoch": step / 600, "eval_loss": loss, "eval_runtime": 2.0, "step": step})
    return [*rows, {"epoch": 1.0, "train_runtime": 90.0, "train_loss": 3.0, "total_flos": 1e12, "step": 600}]


def write_log(folder: Path, kind: str, arm: str, seed: int) -> str:
    """Write the curve of an arm as a log of a kind; return its entry in the YAML file."""
    name, values = f"{arm}-{seed}", losses(arm, seed)
    if kind == "trainer":
        path = folder / name / "checkpoint-600" / "trainer_state.json"
        path.parent.mkdir(parents=True)
        older = path.parent.with_name("checkpoint-90")
        older.mkdir()
        (older / path.name).write_text('{"log_history": []}')
        path.write_text(json.dumps({"global_step": 600, "log_history": trainer_state(arm, seed)}))
        return name
    if kind == "csv":
        rows = ["step,loss,val_loss,note"]
        for step, loss in zip(STEPS.tolist(), values, strict=True):
            rows += [f"{step},{loss + 0.1!r},,train", f"{step},,{loss!r},eval"]
        (folder / f"{name}.csv").write_text("\n".join(rows) + "\n")
        return f"{name}.csv"
    if kind == "european":
        rows = ["Schritt;val_loss"] + [
            f"{step};{loss!r}".replace(".", ",") for step, loss in zip(STEPS, values, strict=True)
        ]
        (folder / f"{name}.csv").write_text("\ufeff" + "\r\n".join(rows), encoding="utf-8")
        return f"{name}.csv"
    rows_of = [
        {"_step": 2 * k, "train/global_step": int(step), "eval/loss": loss, "_runtime": 3.0 * k, "run_name": name}
        for k, (step, loss) in enumerate(zip(STEPS, values, strict=True))
    ]
    train = [{"_step": 2 * k + 1, "train/global_step": int(s), "train/loss": 9.0} for k, s in enumerate(STEPS)]
    history = sorted(rows_of + train, key=lambda row: row["_step"])
    if kind == "jsonl":
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
        return f"{name}.jsonl"
    import pyarrow as pa
    import pyarrow.parquet as parquet

    columns = {
        key: [row.get(key, np.nan if "loss" in key else None) for row in history] for key in history[0] | history[1]
    }
    parquet.write_table(pa.table(columns), folder / f"{name}.parquet")
    return f"{name}.parquet"


def write_chart(folder: Path) -> None:
    """Write the export of one chart with both arms."""
    metric = "eval/loss"
    head = ["train/global_step", *(f"{arm} - {metric}{end}" for arm in SPEED for end in ("", "__MIN", "__MAX"))]
    rows = [",".join(f'"{name}"' for name in head)]
    for step, one, other in zip(STEPS.tolist(), losses("scratch"), losses("mine"), strict=True):
        rows.append(",".join(f'"{value!r}"' for value in (step, one, one, one, other, other, other)))
    (folder / "chart.csv").write_text("\n".join(rows))


def arms_file(folder: Path, arms: Any, **settings: Any) -> Path:
    path = folder / "arms.yaml"
    path.write_text(json.dumps({"arms": arms, "tokens_per_step": EACH, **settings}))  # JSON is YAML
    return path


@pytest.fixture
def own(write_run) -> list[Any]:
    """Runs of our own records with the same curves."""
    for arm in SPEED:
        for seed in range(3):
            tokens = (STEPS * EACH).tolist()
            write_run(
                arm,
                losses(arm, seed),
                tokens,
                seed=seed,
                steps=STEPS.tolist(),
                source_tokens=None,
                config={"steps": 600},
            )
    folder = write_run("x", [1.0], [0]).parent
    return [run for run in load_runs(folder) if run.arm != "x"]


@pytest.mark.parametrize("kind", ["trainer", "csv", "european", "jsonl", "parquet"])
def test_a_log_gives_the_figures_of_our_own_records(kind, own, tmp_path):
    arms = {arm: [write_log(tmp_path, kind, arm, seed) for seed in range(3)] for arm in SPEED}
    columns = {"columns": {"step": "Schritt"}} if kind == "european" else {}
    path = arms_file(tmp_path, arms, config="phi-1_5.json", seq_len=512, decayed=True, paired=True, **columns)
    notes: list[str] = []
    runs = load_runs(path, notes=notes)
    theirs = [run for run in runs if run.arm == "mine"][1]
    assert (theirs.seed, theirs.budget, theirs.finished) == (1, 600, True)
    assert theirs.evals["tokens"].tolist() == (STEPS * EACH).tolist()
    assert theirs.evals["flops"].tolist() == (STEPS * EACH * COST).tolist()
    assert theirs.evals["loss"].tolist() == losses("mine", 1)
    mine, ours = (compare(each)["mine"].estimate("tokens", "sunk") for each in (runs, own))
    assert mine.speedup == ours.speedup
    assert mine.speedup_interval == ours.speedup_interval
    assert 1.8 < mine.speedup < 2.2
    assert mine.speedup_interval[0] < mine.speedup  # negative control: there is an interval to compare
    assert len(notes) == 1
    assert "no held-out loss by source or by group of text" in notes[0]


def test_a_chart_of_wandb_holds_several_runs(tmp_path):
    write_chart(tmp_path)
    arms: dict[str, Any] = {arm: [{"log": "chart.csv", "run": arm}] for arm in SPEED}
    runs = load_runs(arms_file(tmp_path, arms))
    assert [run.evals["loss"].tolist() for run in runs] == [losses("scratch"), losses("mine")]
    with pytest.raises(GrowthError, match=r"has 2 runs: scratch, mine[\s\S]*run: scratch"):
        load_runs(arms_file(tmp_path, {"scratch": ["chart.csv"]}))
    with pytest.raises(GrowthError, match="has no run 'theirs'"):
        load_runs(arms_file(tmp_path, {"scratch": [{"log": "chart.csv", "run": "theirs"}]}))


def test_what_a_log_lacks_is_stated_and_takes_its_figures_away(tmp_path):
    arms: dict[str, Any] = {
        arm: {"logs": [write_log(tmp_path, "csv", arm, seed) for seed in range(3)]} for arm in SPEED
    }
    arms["mine"]["source"] = {"tokens": 1e5, "config": "phi-1-small.json"}
    notes: list[str] = []
    known = compare(load_runs(arms_file(tmp_path, arms, decayed=True, paired=True)))
    unknown = compare(load_runs(arms_file(tmp_path, arms), notes=notes))
    assert known["mine"].budgets
    assert known["mine"].estimates[0].speedup_interval
    assert not unknown["mine"].budgets
    assert all(estimate.speedup_interval is None for estimate in unknown["mine"].estimates)
    assert unknown["mine"].interval_note == "3 seeds, not known to be paired: no interval"
    assert [word in note for note, word in zip(notes, ("decayed: true", "paired: true", "by source"), strict=True)] == [
        True
    ] * 3
    sunk, charged = (unknown["mine"].estimate("tokens", each) for each in ("sunk", "charged"))
    assert charged.cost - sunk.cost == pytest.approx(1e5)
    assert (
        known["mine"].runs[0].source_cost("flops") == 1e5 * count_cost(load_config("phi-1-small.json")).training_flops
    )
    assert not np.isfinite(unknown["mine"].estimate("flops", "sunk").cost)  # no config.json for the runs
    assert "mine: flops were not recorded" in unknown["mine"].notes


def test_the_page_turns_a_trainer_run_and_a_csv_into_a_report(tmp_path, monkeypatch):
    """Every command of the page runs on tiny logs, in this process, and prints what the page shows."""
    for kind, arm in (("trainer", "scratch"), ("csv", "mine")):
        for seed in range(2):
            write_log(tmp_path, kind, arm, seed)
    for name, config in (("small", "phi-1-small.json"), ("large", "phi-1_5.json")):
        (tmp_path / f"{name}.json").write_text(json.dumps(load_config(config)))
    page = PAGE.read_text(encoding="utf-8")
    for name, content in FILE.findall(page):
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    commands = [found for block in BLOCK.findall(page) for found in COMMAND.findall(block)]
    assert commands
    for command, shown in commands:
        program, *words = shlex.split(command)
        assert program == "phigrow"
        done = CliRunner(env={"COLUMNS": "88"}).invoke(app, words)
        assert done.exit_code == 0, done.output
        assert without_numbers(done.stdout) == without_numbers(shown), done.stdout
    text = Path("report", "report.md").read_text(encoding="utf-8")
    assert "scratch, mine: their logs do not record the learning-rate schedule." in text
    assert "2.00x" in text
    assert not Path("report", "budgets.png").exists()


def one_log(tmp_path: Path, text: str, name: str = "log.csv", **settings: Any):
    (tmp_path / name).write_text(text)
    return load_runs(arms_file(tmp_path, {"scratch": [name]}, **settings))[0]


def table(*rows: tuple[Any, ...], head: str = "step,eval_loss") -> str:
    return "\n".join([head, *(",".join(map(str, row)) for row in rows)]) + "\n"


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        (table((1, 2), head="step,lr"), {}, "no held-out loss"),
        (table((1, 2), head="step,loss"), {}, r"no held-out loss[\s\S]*columns: \{loss: loss\}"),
        (table((1, 2), head="x,eval_loss"), {}, "no column of steps"),
        (table((1, 2)), {"columns": {"loss": "val"}}, "no column 'val'"),
        (table((1, 2, 3), head="step,eval_loss,val_loss"), {}, "several held-out losses"),
        (table((1, 5), (2, 4), (3, 3), (1, 5), (2, 4)), {}, r"two runs: its steps begin again at 1"),
        (table((1, 5), (1, 6), (2, 4), (2, 5), (3, 3), (3, 4)), {}, "two runs: 3 of its 3 steps have two values"),
        (table((1, 5, "a"), (2, 4, "b"), head="step,eval_loss,run"), {}, "has 2 runs: a, b"),
        (table((1, 5)), {"tokens_per_step": None}, r"no column of tokens[\s\S]*tokens_per_step: NUMBER"),
        (table((1, 5, 8), (2, 4, 8), head="step,eval_loss,tokens"), {"tokens_per_step": None}, "stays the same"),
        (table((1, 5, 8), (2, 4, 3), head="step,eval_loss,tokens"), {"tokens_per_step": None}, "it falls"),
        (table((1, 5, 8), (2, 4, ""), head="step,eval_loss,tokens"), {"tokens_per_step": None}, "ends at step 1"),
        (table((0.5, 5)), {}, "step 0.5 is not a whole number"),
        (table((1, "5,1")), {}, r"the row has 3 cells[\s\S]*decimal comma"),
        (table((1, '"5,123"')), {}, "can be read in two ways"),
        (table(), {}, "the table has no rows"),
        ("1,2\n3,4\n", {}, "has no header"),
        ("", {}, "the table is empty"),
        (table((1, 5)), {"color": 1}, "the key 'color' is not known"),
        (table((1, 5)), {"tokens_per_step": -1}, "tokens_per_step is -1"),
    ],
)  # fmt: skip
def test_a_log_that_cannot_be_measured_gets_one_error(tmp_path, text, settings, message):
    with pytest.raises(GrowthError, match=message) as error:
        one_log(tmp_path, text, **settings)
    assert "what to do: " in str(error.value)
    assert "arms.yaml" in str(error.value)


def test_a_restart_duplicates_and_missing_values_are_read_as_the_run_went_on(tmp_path):
    restarted = one_log(tmp_path, table((10, 5), (20, 4), (30, 3.9), (20, 4.1), (30, 3), (40, 2)))
    assert restarted.evals["step"].tolist() == [10, 20, 30, 40]
    assert restarted.evals["loss"].tolist() == [5, 4.1, 3, 2]
    assert any("went back from step 30 to 20" in note for note in restarted.notes)
    twice = one_log(tmp_path, table((10, 5), (20, 4), (20, 4), (30, 3), (30, 3)))
    assert twice.evals["loss"].tolist() == [5, 4, 3]
    assert not twice.notes
    # pandas writes NaN for missing values, as in the rows of training between evaluations.
    rows = table(
        (10, "nan", 6), (10, 5, "nan"), (20, "nan", 5), (20, 4, "nan"), (21, "nan", 4.5), head="step,eval_loss,loss"
    )
    missing = one_log(tmp_path, rows)
    assert missing.evals["loss"].tolist() == [5, 4]
    assert missing.steps["loss"].tolist() == [6, 5, 4.5]
    assert missing.diverged_at is None
    diverged = one_log(tmp_path, table((10, 5), (20, "nan"), (30, "nan")))
    assert (diverged.diverged_at, len(diverged.evals["step"])) == (20, 3)
    explicit = one_log(tmp_path, '{"step": 10, "eval_loss": 5}\n{"step": 20, "eval_loss": NaN}\n', "log.jsonl")
    assert explicit.diverged_at == 20


def test_numbers_are_read_in_every_spelling(tmp_path):
    assert one_log(tmp_path, 'step;eval_loss\n1.000;"3,5"\n2.000;3,25\n').evals["step"].tolist() == [1000, 2000]
    grouped = one_log(tmp_path, 'step,eval_loss\n"1,000",3.5\n"1,234,000",3.25\n')
    assert grouped.evals["step"].tolist() == [1000, 1234000]
    chosen = one_log(tmp_path, 'step,eval_loss\n1,"3,125"\n', decimal=",")
    assert chosen.evals["loss"].tolist() == [3.125]


def test_tokens_come_from_rows_between_which_they_are_interpolated(tmp_path):
    text = table((10, "", 100), (15, 5, ""), (20, "", 400), (20, 4, ""), head="step,eval_loss,num_tokens")
    run = one_log(tmp_path, text, tokens_per_step=None)
    assert run.evals["tokens"].tolist() == [250, 400]


def test_a_training_loss_is_read_only_when_it_is_named(tmp_path):
    run = one_log(tmp_path, table((1, 5), (2, 4), head="step,loss"), columns={"loss": "loss"})
    assert run.evals["loss"].tolist() == [5, 4]
    assert any("training loss" in note for note in run.notes)


def test_wandb_steps_and_clocks_are_named(tmp_path):
    rows = "".join(json.dumps({"_step": k, "eval/loss": 5 - k, "_runtime": 2.0 * k}) + "\n" for k in (1, 2))
    run = one_log(tmp_path, rows, "log.jsonl", columns={"seconds": "_runtime"})
    assert run.evals["seconds"].tolist() == [2, 4]
    assert any("W&B's own count" in note for note in run.notes)
    assert any("'_runtime'" in note for note in run.notes)


def test_a_log_without_a_yaml_file_is_told_about_it(tmp_path):
    (tmp_path / "log.csv").write_text(table((1, 2)))
    with pytest.raises(GrowthError, match=r"YAML file, arms: \{scratch: \[LOG\]"):
        load_runs(tmp_path / "log.csv")
    with pytest.raises(GrowthError, match="the log does not exist"):
        load_runs(arms_file(tmp_path, {"scratch": ["none.csv"]}))
    with pytest.raises(GrowthError, match=r"arms\.mine: decimal"):
        load_runs(arms_file(tmp_path, {"mine": {"logs": ["log.csv"], "decimal": "x"}}))


def test_event_files_need_tensorboard(tmp_path, monkeypatch):
    (tmp_path / "tb").mkdir()
    (tmp_path / "tb" / "events.out.tfevents.1.host").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "tensorboard.backend.event_processing.event_accumulator", None)
    with pytest.raises(GrowthError, match=r"need the package tensorboard[\s\S]*pip install"):
        load_runs(arms_file(tmp_path, {"scratch": ["tb"]}))


def test_event_files_are_read(tmp_path):
    pytest.importorskip("tensorboard", reason="event files are written and read by tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    for arm in SPEED:
        with SummaryWriter(str(tmp_path / arm / "tb")) as writer:
            for step, loss in zip(STEPS.tolist(), losses(arm), strict=True):
                writer.add_scalar("eval/loss", loss, step, new_style=arm == "mine")
                writer.add_scalar("train/loss", loss + 0.1, step)
    runs = load_runs(arms_file(tmp_path, {arm: [arm] for arm in SPEED}, columns={"seconds": "elapsed"}))
    for run in runs:
        np.testing.assert_allclose(run.evals["loss"], losses(run.arm), rtol=1e-6)
        assert run.evals["step"].tolist() == STEPS.tolist()
        assert len(run.steps["step"]) == 60
        assert np.isfinite(run.evals["seconds"]).all()
    with pytest.raises(GrowthError, match="has 2 runs"):
        load_runs(arms_file(tmp_path, {"scratch": ["."]}))
