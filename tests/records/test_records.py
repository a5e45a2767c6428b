"""Reading records: what is accepted, what is noted, and every refusal by its text."""

import gzip
import json
import math

import numpy as np
import pytest

from phigrow.errors import GrowthError
from phigrow.records import RecordWriter, load_run, load_runs
from phigrow.records.readers.phigrow import last_record

RUN = {"type": "run", "arm": "wr", "seed": 3}
COST = {"tokens": 10, "flops": 20.0, "seconds": 0.5}


def record(kind="eval", step=0, loss=4.0, **values):
    return {"type": kind, "step": step, **COST, "loss": loss} | values


def put(tmp_path, *lines, end="\n"):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + end
    (tmp_path / "records.jsonl").write_text(text)
    return tmp_path


def put_runs(tmp_path, seeds=(0,)):
    for arm in ("scratch", "slow", "wr"):
        for seed in seeds:
            folder = tmp_path / "runs" / f"{arm}-{seed}"
            folder.mkdir(parents=True)
            put(folder, {"type": "run", "arm": arm, "seed": seed}, record())
    return tmp_path / "runs"


def test_columns_and_meta(tmp_path):
    step = record("step", step=1, loss=5.0, lr=1e-3, grad_norm=0.7, tokens_per_second=9.0)
    run = load_run(put(tmp_path, RUN | {"parameters": 7}, record(), step, record(step=1, loss=3.5, tokens=30)))
    assert (run.arm, run.seed, run.meta["parameters"], run.notes) == ("wr", 3, 7, ())
    assert run.evals["step"].tolist() == [0, 1]
    assert run.evals["step"].dtype == np.int64
    assert run.evals["tokens"].tolist() == [10.0, 30.0]
    assert run.evals["loss"].tolist() == [4.0, 3.5]
    assert run.steps["grad_norm"].tolist() == [0.7]
    assert (run.held_out(0), run.held_out(1), run.held_out(2)) == (4.0, 3.5, None)
    assert run.diverged_at is None


@pytest.mark.parametrize(("at_most", "step"), [(None, 4), (4, 4), (3, 2), (0, None)])
def test_the_last_record_up_to_a_step(tmp_path, at_most, step):
    found = last_record(put(tmp_path, RUN, record("step", step=2), record("step", step=4)), "step", at_most=at_most)
    assert (found and found["step"]) == step


def test_the_last_record_of_a_kind_is_there_however_long_ago_it_was(tmp_path):
    folder = put(tmp_path, RUN, record("eval", step=0), *[record("step", step=step) for step in range(1, 2000)])
    assert (folder / "records.jsonl").stat().st_size > 10 * 2**14  # far more than is searched first
    assert last_record(folder, "eval")["step"] == 0
    assert last_record(folder, "step")["step"] == 1999
    assert last_record(folder, "diagnostics") is None


def test_optional_columns_are_nan(tmp_path):
    run = load_run(put(tmp_path, RUN, record("step")))
    assert math.isnan(run.steps["lr"][0])
    assert run.evals["loss"].shape == (0,)


@pytest.mark.parametrize("torn", ['{"type": "eval", "step": 1, "tok', '{"type"', "{"])
def test_a_torn_last_line_is_noted(tmp_path, torn):
    run = load_run(put(tmp_path, RUN, record(), torn, end=""))
    assert run.evals["step"].tolist() == [0]
    assert run.notes == ("line 3 is incomplete and was left out",)


def test_a_line_torn_inside_a_character_is_noted(tmp_path):
    put(tmp_path, RUN, record())
    with (tmp_path / "records.jsonl").open("ab") as file:
        file.write('{"type": "eval", "text": "é'.encode()[:-1])
    assert load_run(tmp_path).notes == ("line 3 is incomplete and was left out",)


def test_a_whole_last_line_without_newline_is_kept(tmp_path):
    run = load_run(put(tmp_path, RUN, record(), record(step=1), end=""))
    assert run.evals["step"].tolist() == [0, 1]
    assert run.notes == ()


@pytest.mark.parametrize("loss", [math.nan, math.inf, None])
def test_divergence_is_kept_and_reported(tmp_path, loss):
    run = load_run(put(tmp_path, RUN, record(), record(step=40, loss=loss)))
    assert not np.isfinite(run.evals["loss"][1])
    assert run.diverged_at == 40
    assert run.notes == ("diverged: the loss is not finite at step 40",)


def test_unknown_types_are_noted(tmp_path):
    run = load_run(put(tmp_path, RUN, {"type": "checkpoint"}, {"type": "checkpoint"}))
    assert run.notes == ("2 records of the unknown type 'checkpoint' were skipped",)


@pytest.mark.parametrize(
    ("share", "ratio", "expected"),
    [
        (0.9, 1.5, ("rank 5 was the slowest in 180 of 200 steps and needed 1.50 times the median",)),
        (0.7, 1.5, ()),  # too seldom
        (0.9, 1.1, ()),  # hardly slower
        (0.4, 1.5, ()),
    ],
)
def test_a_rank_that_was_slow_in_most_steps_is_noted(tmp_path, share, ratio, expected):
    steps = [
        record(
            "step", step=step + 1, slowest_rank=5 if step % 10 < 10 * share else 0, slowest_seconds=ratio,
            median_seconds=1.0,
        )
        for step in range(200)
    ]  # fmt: skip
    assert load_run(put(tmp_path, RUN, record(), *steps)).notes == expected
    (tmp_path / "short").mkdir()
    assert load_run(put(tmp_path / "short", RUN, record(), *steps[:90])).notes == ()


@pytest.mark.parametrize(("each", "noted"), [(20.0, True), (30.0, False)])
def test_a_slow_rank_that_cost_little_is_not_noted(tmp_path, each, noted):
    """It costs 0.5 s in a step: 2.5 % of 20 s, and 1.7 % of 30 s."""
    steps = [
        record(
            "step", step=step + 1, seconds=each * step, slowest_rank=5, slowest_seconds=1.5, median_seconds=1.0
        )
        for step in range(200)
    ]  # fmt: skip
    assert bool(load_run(put(tmp_path, RUN, record(), *steps)).notes) is noted


def test_sources_flags_and_diagnostics(tmp_path):
    run = load_run(
        put(
            tmp_path,
            RUN,
            record(sources={"web": 4.5}),
            record("step", step=1, skipped=True),
            record("step", step=2, spike=True, skipped=False),
            record(step=2, sources={"web": 4.0, "code": 2.0}),
            {"type": "diagnostics", "step": 1, "copy_cosine": 1.0},
            {"type": "diagnostics", "step": 2, "copy_cosine": 0.5, "effective_rank": 30.5, "other": "x"},
        )
    )
    assert run.sources["web"].tolist() == [4.5, 4.0]
    assert np.isnan(run.sources["code"]).tolist() == [True, False]
    assert (run.steps["skipped"].tolist(), run.steps["spike"].tolist()) == ([1, 0], [0, 1])
    assert run.diagnostics["copy_cosine"].tolist() == [1.0, 0.5]
    assert run.diagnostics["step"].tolist() == [1, 2]
    assert np.isnan(run.diagnostics["effective_rank"]).tolist() == [True, False]
    assert run.notes == ("no update was made in 1 of 2 steps", "the loss jumped in 1 of 2 steps")


@pytest.mark.parametrize(
    ("meta", "budget", "is_trunk"),
    [
        ({}, None, False),
        ({"config": {"steps": 9}}, 9, False),
        ({"config": {"steps": 9}, "budget": 5, "trunk": "t"}, 5, False),
        ({"config": {"steps": 9}, "budget": None, "trunk": "t"}, 9, True),
        ({"config": {"steps": True}, "budget": "5"}, None, False),
    ],
)
def test_budgets_and_trunks(tmp_path, meta, budget, is_trunk):
    run = load_run(put(tmp_path, RUN | meta, record()))
    assert (run.budget, run.is_trunk) == (budget, is_trunk)


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ([RUN, record(sources=[1])], "'sources' is [1], but must be an object\n  where: {path}, line 2"),
        ([RUN, record(sources={"web": "low"})], "'web' is 'low', but must be a number\n  where: {path}, line 2"),
        ([RUN, {"type": "diagnostics", "step": -1}], "'step' is -1\n  where: {path}, line 2"),
        (
            [RUN, {"type": "diagnostics", "step": 1, "copy_cosine": "x"}],
            "'copy_cosine' is 'x', but must be a number\n  where: {path}, line",
        ),
        ([RUN, '{"type": "ev', record()], "the record is not valid JSON\n  where: {path}, line 2"),
        ([RUN, "[1]"], "the record has no type\n  where: {path}, line 2"),
        ([RUN, {"step": 1}], "the record has no type\n  where: {path}, line 2"),
        ([record()], "there is no run record\n  where: {path}\n"),
        ([RUN, RUN], "there is a second run record\n  where: {path}, line 2"),
        ([{"type": "run", "seed": 1}], "the run record has no 'arm'\n  where: {path}, line 1"),
        ([RUN | {"seed": "1"}], "'seed' of the run record is '1'\n  where: {path}, line 1"),
        ([RUN, {"type": "eval", "step": 0, **COST}], "the eval record has no 'loss'\n  where: {path}, line 2"),
        ([RUN, {"type": "step", "step": 0, "loss": 1.0}], "the step record has no 'tokens'\n  where: {path}, line 2"),
        ([RUN, record(loss="low")], "'loss' is 'low', but must be a number\n  where: {path}, line 2"),
        ([RUN, record(tokens=math.nan)], "'tokens' is nan\n  where: {path}, line 2"),
        ([RUN, record(step=0.5)], "'step' is 0.5\n  where: {path}, line 2"),
        ([RUN, record(step=-1)], "'step' is -1\n  where: {path}, line 2"),
        ([RUN, record(step=2), "", record(step=2)], "out of order: step 2 comes after step 2\n  where: {path}, line 4"),
        ([RUN, record("step", step=2), record("step", step=1)], "step records are out of order: step 1 comes after"),
        ([RUN, record(), record(step=1, seconds=0.25)], "'seconds' falls from 0.5 to 0.25\n  where: {path}, line 3"),
    ],
)  # fmt: skip
def test_refusals_name_file_and_line(tmp_path, lines, text):
    put(tmp_path, *lines)
    with pytest.raises(GrowthError) as caught:
        load_run(tmp_path)
    assert text.replace("{path}", str(tmp_path / "records.jsonl")) in f"{caught.value}\n"
    assert caught.value.fix


def test_no_file(tmp_path):
    with pytest.raises(GrowthError, match="the run has no records"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(GrowthError, match=r"there is no records\.jsonl in them or below them"):
        load_runs(tmp_path)


def test_folders_without_records(tmp_path):
    parent, empty = put_runs(tmp_path), tmp_path / "empty"
    empty.mkdir()
    notes = []
    assert len(load_runs([parent, empty], notes=notes)) == 3
    assert notes == [f"{empty} is left out: there is no records.jsonl in it or below it"]
    give = "what to do: give the folders that runs were trained into (their --out), or a folder that holds them"
    # Without a place for notes nothing is left out; with one, something has to be there; a folder has to exist.
    for folders, said in (([parent, empty], None), ([empty], notes), ([parent, tmp_path / "missing"], notes)):
        with pytest.raises(GrowthError) as caught:
            load_runs(folders, notes=said)
        assert str(caught.value).startswith(
            ("the folders hold no runs" if empty in folders else "the folder does not exist") + "\n  where: "
        )
        assert caught.value.where == str(folders[-1])
        assert give in str(caught.value)
    assert len(notes) == 1


def test_load_runs_takes_parents_and_folders_once(tmp_path):
    parent = put_runs(tmp_path, seeds=(0, 1))
    assert [(run.arm, run.seed) for run in load_runs(parent)] == [
        ("scratch", 0), ("scratch", 1), ("slow", 0), ("slow", 1), ("wr", 0), ("wr", 1),
    ]  # fmt: skip
    named = [parent / "wr-0", str(parent / "scratch-0"), parent / "wr-0"]
    assert [run.arm for run in load_runs(named)] == ["wr", "scratch"]
    assert len(load_runs(parent / "wr-0")) == 1


def test_packed_records_are_read_where_there_are_no_others(tmp_path):
    plain, packed = tmp_path / "a", tmp_path / "b" / "c"
    for folder, loss in ((plain, 3.0), (packed, 2.0)):
        folder.mkdir(parents=True)
        put(folder, RUN, record(loss=loss))
    file = packed / "records.jsonl.gz"
    file.write_bytes(gzip.compress((packed / "records.jsonl").read_bytes()))
    (packed / "records.jsonl").unlink()
    assert [run.evals["loss"].tolist() for run in load_runs(tmp_path)] == [[3.0], [2.0]]
    assert load_runs(packed)[0].folder == packed
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(GrowthError, match=r"the records cannot be unpacked\n  where: .*records.jsonl.gz\n  why: "):
        load_run(packed)


@pytest.mark.parametrize("missing", ["flops", "seconds"])
def test_a_unit_that_a_run_does_not_have_may_be_missing(tmp_path, missing):
    def less(record):
        return {key: value for key, value in record.items() if key != missing}

    run = load_run(put(tmp_path, RUN, less(record()), less(record("step", step=1)), less(record(step=1, tokens=20))))
    assert np.isnan(run.evals[missing]).all()
    assert np.isnan(run.steps[missing]).all()
    assert [unit for unit in ("tokens", "flops", "seconds") if not run.has_unit(unit)] == [missing]
    put(tmp_path, RUN, record(), less(record(step=1)))
    with pytest.raises(GrowthError, match=f"{missing!r} is in some eval records and missing from others"):
        load_run(tmp_path)


def test_the_writer_knows_every_field(tmp_path):
    writer = RecordWriter(tmp_path, run={"arm": "wr", "seed": 0, "anything": [1]})
    writer.write("step", step=1, tokens=2, loss=3.0)
    with pytest.raises(AssertionError, match=r"step records have no \['other'\]"):
        writer.write("step", step=2, tokens=4, loss=3.0, other=1)
    writer.close()
    assert load_run(tmp_path).meta["anything"] == [1]
